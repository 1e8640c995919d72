"""What the weights say is the truth: silent flags take it from them, contradicting flags are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from programs import COMMON, DIGITS, MODEL, MODEL_KWARGS, NAME, PIAD, PROXY, TRAIN, Road, exit_code, run

import supernet
from files import load_checkpoint
from piad.mask_table import MaskTable
from utils import UserError

ODD = ["--mean", "0.25", "--std", "0.125", "--crop-pct", "1", "--interpolation", "bilinear"]
SAID = {"mean": [0.25], "std": [0.125], "crop_pct": 1.0, "interpolation": "bilinear", "input_size": [1, 16, 16]}


@pytest.fixture(scope="module")
def oddly(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole road from weights that were contracted under an odd preprocessing, never told again."""
    folder = tmp_path_factory.mktemp("oddly")
    weights = as_from_elsewhere(road, folder)
    run("reparam.py", *DIGITS, *PROXY, *ODD, *MODEL, "--checkpoint", weights, "--method", "best", "--mask-table",
        "--no-eval", "--output-dir", folder / "best")  # fmt: skip
    run("main.py", "--stage", "piad", *DIGITS, *TRAIN, *PROXY, "--progressive-epochs", 1, "--epochs", 1, "--checkpoint",
        folder / "best", "--output-dir", folder / "piad")  # fmt: skip
    run("main.py", "--stage", "finetune", *DIGITS, *TRAIN, "--epochs", 1, "--op-code", 3, "--checkpoint",
        folder / "piad", "--output-dir", folder / "finetuned")  # fmt: skip
    return folder


def as_from_elsewhere(road: Road, folder: Path) -> Path:
    """Weights alone, which do not say what they are."""
    from safetensors.torch import save_file

    save_file(road.weights(road.pretrained / "checkpoint_3.pth"), folder / "elsewhere.safetensors")
    return folder / "elsewhere.safetensors"


@pytest.mark.parametrize("place", ["best", "piad", "piad/checkpoint_0.pth", "finetuned", "finetuned/checkpoint_0.pth"])
def test_every_program_writes_on_what_the_weights_say(oddly: Path, place: str, tmp_path: Path):
    net = supernet.load(oddly / place)
    assert net.preprocessing.items() >= SAID.items()
    assert (net.name, net.model_kwargs) == (NAME, {**MODEL_KWARGS, "num_classes": 10})
    run(
        "main.py",
        "--eval",
        *DIGITS,
        "--checkpoint",
        oddly / place,
        "--write-sub-networks",
        "--output-dir",
        tmp_path / "e",
    )
    run("export.py", oddly / place, *(["--op-code", -1] if len(net.table) > 1 else []), "--output", tmp_path / "x")
    written = [*(tmp_path / "e").glob("op_*/config.json"), tmp_path / "x" / "config.json"]
    assert len(written) >= 2
    for path in written:
        assert json.loads(path.read_text())["preprocessing"] == net.preprocessing


CONTRADICTIONS = {
    "--mean": (["--mean", "0.5"], "says mean [0.25], --mean says [0.5]: leave --mean out"),
    "--crop-pct": (["--crop-pct", "0.9"], "says crop_pct 1.0, --crop-pct says 0.9"),
    "--interpolation": (["--interpolation", "nearest"], "says interpolation bilinear, --interpolation says nearest"),
    "--model": (["--model", "vit_small"], f"says that its model is {NAME}"),
    "--model-kwargs": (["--model-kwargs", "num_heads=6"], "says num_heads=3, --model-kwargs says num_heads=6"),
    "another argument": (["--model-kwargs", "qk_norm=True"], "--model-kwargs says qk_norm=True: leave it out"),
}
FINETUNE = ("main.py", "--stage", "finetune", *DIGITS, "--epochs", "1", "--op-code", "1")
PROGRAMS = {
    "reparam": ("reparam.py", *DIGITS, *PROXY, "--no-eval", "--checkpoint", "{0}/piad"),
    "piad": ("main.py", "--stage", "piad", *DIGITS, *PROXY, "--epochs", "1", "--checkpoint", "{0}/best"),
    "pretrain": ("main.py", "--stage", "pretrain", *DIGITS, *PROXY, "--epochs", "1", "--checkpoint", "{0}/best"),
    "finetune": (
        "main.py",
        "--stage",
        "finetune",
        *DIGITS,
        "--epochs",
        "1",
        "--op-code",
        "1",
        "--checkpoint",
        "{0}/piad",
    ),
    "evaluation": ("main.py", "--eval", *DIGITS, "--checkpoint", "{0}/piad"),
    "evaluation of a sub-network": ("main.py", "--eval", *DIGITS, "--sub-network", "{0}/finetuned"),
    "export": ("export.py", "{0}/finetuned"),
}


@pytest.mark.parametrize("flag", CONTRADICTIONS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_contradicting_flag_is_one_line_with_both_values(program, flag, oddly: Path, tmp_path: Path, capsys):
    flags, says = CONTRADICTIONS[flag]
    words = [word.format(oddly) for word in PROGRAMS[program]]
    output = "--output" if words[0] == "export.py" else "--output-dir"
    assert exit_code(*words, *flags, output, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and not (tmp_path / "out").exists()


def test_flags_that_agree_are_no_contradiction(oddly: Path, tmp_path: Path):
    run("main.py", "--eval", *COMMON, *ODD, "--checkpoint", oddly / "best", "--op-code", 0, "--output-dir", tmp_path)
    assert (tmp_path / "frontier.json").exists()


def test_training_arguments_may_be_given_beside_any_weights(oddly: Path):
    net = supernet.load(oddly / "best", model_kwargs={"drop_rate": 0.1}, drop_path=0.2)
    assert net.model.head_drop.p == 0.1 and net.model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)


def test_weights_from_elsewhere_take_flags_and_then_say_it(oddly: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    weights = oddly / "elsewhere.safetensors"
    assert exit_code("reparam.py", *DIGITS, *PROXY, "--checkpoint", weights, "--output-dir", tmp_path) == 2
    assert "does not say of which model it is: give its name (--model, --model-kwargs)" in capsys.readouterr().err


def test_tuples_go_through_every_program_and_format(tmp_path: Path):
    """A .pth keeps tuples and JSON makes lists of them: both are the same argument."""
    flags = ["--model", "swin_tiny_patch4_window7_224", "--model-kwargs", "img_size=(16,32)", "patch_size=2",
             "window_size=4", "embed_dim=16", "depths=(1,1)", "num_heads=(2,2)", "in_chans=1"]  # fmt: skip
    short = ["--proxy-samples", 32, "--epochs", 1]
    run("main.py", "--stage", "pretrain", *DIGITS, *TRAIN, *short, *flags, "--output-dir", tmp_path / "pre")
    run("reparam.py", *DIGITS, *short[:2], "--no-eval", "--method", "best", "--mask-table", "--checkpoint",
        tmp_path / "pre", *flags, "--output-dir", tmp_path / "best")  # fmt: skip
    run("main.py", "--stage", "finetune", *DIGITS, *TRAIN, *short, "--op-code", 5, "--checkpoint", tmp_path / "best",
        "--output-dir", tmp_path / "tuned")  # fmt: skip
    for place in ("pre/checkpoint_0.pth", "best", "tuned/checkpoint_0.pth", "tuned"):
        net = supernet.load(tmp_path / place, plain_weights=place.startswith("pre"))
        assert net.model.patch_embed.img_size == (16, 32) and len(net.model.layers) == 2
    run(
        "export.py", tmp_path / "best", "--op-code", 5, "--format", "folder", "torch-export", "--output", tmp_path / "x"
    )
    assert supernet.load(tmp_path / "x").preprocessing["input_size"] == [1, 16, 32]
    # As a run of main.py resumes, its settings, which hold the arguments, have to be found equal.
    run(
        "main.py",
        "--stage",
        "pretrain",
        *DIGITS,
        *TRAIN,
        *short,
        *flags,
        "--resume",
        "auto",
        "--output-dir",
        tmp_path / "pre",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Stamps


def test_an_older_contraction_leaves_nothing_stale(oddly: Path, tmp_path: Path):
    shutil.copytree(oddly / "best", tmp_path / "net")
    (tmp_path / "net" / "latency.json").write_text("[]")
    run("reparam.py", *DIGITS, *PROXY, "--no-eval", "--checkpoint", oddly / "best", "--output-dir", tmp_path / "net")
    left = {path.name for path in (tmp_path / "net").iterdir()}
    assert left == {"contracted.safetensors", "contracted.json", "spectra.png", "tensorboard"}


def test_what_was_made_for_other_weights_is_refused(oddly: Path, tmp_path: Path):
    run("reparam.py", *DIGITS, "--proxy-samples", 32, "--no-eval", "--method", "best", "--mask-table", "--checkpoint",
        oddly / "best", "--output-dir", tmp_path / "other")  # fmt: skip
    for name in ("mask_table.json", "compensation.safetensors", "contracted.json", "contracted.safetensors"):
        shutil.copytree(oddly / "best", tmp_path / name)
        shutil.copy(tmp_path / "other" / name, tmp_path / name)
        with pytest.raises(UserError, match="was made for other weights"):
            supernet.load(tmp_path / name)
    with pytest.raises(UserError, match="was made for other weights"):
        supernet.load(oddly / "piad", mask_table=oddly / "best" / "mask_table.json")


def test_a_table_without_a_stamp_is_taken(oddly: Path, tmp_path: Path):
    """As the authors' tables have none."""
    table = json.loads((oddly / "best" / "mask_table.json").read_text())
    del table["meta"]
    (tmp_path / "table.json").write_text(json.dumps(table))
    net = supernet.load(oddly / "best", mask_table=tmp_path / "table.json")
    assert net.table.rows == MaskTable.load(oddly / "best" / "mask_table.json").rows


def test_a_run_and_its_table_carry_one_stamp(oddly: Path):
    net = supernet.load(oddly / "piad")
    on_disk = json.loads((oddly / "piad" / "mask_table.json").read_text())["meta"]["stamp"]
    assert net.stamp == net.table.meta["stamp"] == on_disk != supernet.load(oddly / "best").stamp


# ---------------------------------------------------------------------------------------------------------------------
# Grades


def test_a_resumed_refit_keeps_its_grade(oddly: Path, tmp_path: Path):
    words = ["--stage", "finetune", *DIGITS, *TRAIN, *PROXY, "--op-code", 3, "--refit", "--checkpoint", oddly / "best"]
    run("main.py", *words, "--epochs", 2, "--output-dir", tmp_path)
    (tmp_path / "checkpoint_1.pth").unlink()
    (tmp_path / "config.json").unlink()
    run("main.py", *words, "--epochs", 2, "--resume", "auto", "--output-dir", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["grade"] == "refitted, then fine-tuned"
    assert load_checkpoint(tmp_path / "checkpoint_1.pth")["settings"]["grade"] == "refitted"


def test_sub_networks_are_not_contracted_or_made_super_networks(oddly: Path, tmp_path: Path, capsys):
    for words in (("reparam.py", *DIGITS, *PROXY), ("main.py", *PIAD[:2], *DIGITS, *PROXY, "--epochs", 1)):
        assert exit_code(*words, "--checkpoint", oddly / "finetuned", "--output-dir", tmp_path / "out") == 2
        assert "is a sub-network" in capsys.readouterr().err
