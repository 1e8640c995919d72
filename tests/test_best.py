"""--method best through the real programs: compensated and refitted sub-networks, and sizes without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import (
    COMMON,
    NAME,
    PROXY,
    TRAIN,
    Road,
    assert_same,
    exit_code,
    load_subnetwork,
    run,
    snapshot,
    tiny_digits_model,
)
from safetensors.torch import load_file

import datasets
import supernet
from datasets import preprocessing
from engine import evaluate
from files import load_checkpoint
from models.backbone import full_widths
from models.elastic import make_elastic, set_widths
from models.extraction import extract
from piad.mask_table import MaskTable
from supernet.facts import stamp_of
from wpac.compensation import COMPENSATION, load_compensation
from wpac.refit import Refit

BEST = [*COMMON, *PROXY, "--method", "best", "--mask-table", "--dropout-ratio", 0.9]
SIZES = ["--op-code", 0, 40, -1]


@pytest.fixture(scope="module")
def best(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    run("reparam.py", *BEST, "--no-eval", "--checkpoint", road.pretrained / "checkpoint_3.pth", "--output-dir", folder)
    return folder


def model_in(folder: Path, compensated: bool) -> torch.nn.Module:
    model = tiny_digits_model()
    model.load_state_dict(load_file(folder / "contracted.safetensors"))
    if compensated:
        load_compensation(folder / COMPENSATION, model, stamp_of(model.parameters()))
    return model.eval()


def evaluated(folder: Path, output: Path, *flags: Any) -> dict[str, Any]:
    """frontier.json of main.py --eval on the contracted weights of a folder."""
    run("main.py", "--eval", *COMMON, *PROXY, "--checkpoint", folder / "contracted.safetensors", *SIZES, *flags,
        "--output-dir", output)  # fmt: skip
    return json.loads((output / "frontier.json").read_text())


def loss_of(model: torch.nn.Module) -> float:
    val = datasets.open_images("digits", None, "val")
    batches = datasets.eval_loader(val, preprocessing(model, {}), batch_size=256, workers=0)
    return evaluate(model, batches, torch.device("cpu"))["loss"]


def test_the_function_stays_and_what_was_done_is_written_down(road: Road, best: Path):
    facts = json.loads((best / "contracted.json").read_text())
    assert facts["target_difference"] < 1e-5
    assert (facts["method"], facts["basis"], facts["order"]) == ("best", "fisher", "fisher")
    assert facts["not_compensated"] == []
    before = tiny_digits_model()
    before.load_state_dict(road.weights(road.pretrained / "checkpoint_3.pth"))
    assert loss_of(model_in(best, compensated=True)) == pytest.approx(loss_of(before.eval()), rel=1e-4)


def test_the_mask_table_is_one_of_the_model_and_reaches_what_was_asked(best: Path):
    table = MaskTable.load(best / "mask_table.json")
    table.check(full_widths(tiny_digits_model()), NAME)
    facts = json.loads((best / "contracted.json").read_text())
    assert table.meta == {"made_by": "contraction, without training", "stamp": facts["stamp"]}
    assert len(table) > 50
    macs = [sum(row.values()) for row in (table.rows[0], table.rows[-1])]
    assert macs[1] < 0.15 * macs[0]


def test_sizes_are_compensated_unless_told_otherwise(best: Path, tmp_path: Path):
    table = MaskTable.load(best / "mask_table.json")
    found = {
        "compensated": evaluated(best, tmp_path / "a"),
        "cut": evaluated(best, tmp_path / "b", "--no-compensate"),
    }
    for grade, report in found.items():
        assert report["grade"] == grade
        model = model_in(best, grade == "compensated")
        for row in report["sizes"]:
            small = extract(model, table.widths(row["op_code"]))
            assert row["loss"] == pytest.approx(loss_of(small), rel=1e-4)
    whole, half, _ = ([report["sizes"][i]["loss"] for report in found.values()] for i in range(3))
    assert whole[0] == pytest.approx(whole[1])
    assert half[0] < half[1]


def test_sizes_are_refitted_and_written_as_folders(best: Path, tmp_path: Path):
    report = evaluated(best, tmp_path, "--refit", "--write-sub-networks", "--proxy-samples", 1024)
    plain = evaluated(best, tmp_path / "plain")
    assert report["grade"] == "refitted"
    assert "refitted" in {row["grade"] for row in report["sizes"]}
    for row, before in zip(report["sizes"], plain["sizes"], strict=True):
        model, config = load_subnetwork(tmp_path / f"op_{row['op_code']}")
        # A size that refitting does not bring nearer to the whole network stays as it was.
        assert config["grade"] == row["grade"] == ("refitted" if row["loss"] != before["loss"] else "compensated")
        assert config["accuracy"]["top1"] == row["top1"]
        assert config["widths"] == MaskTable.load(best / "mask_table.json").widths(row["op_code"])
        assert loss_of(model) == pytest.approx(row["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "grade"),
    [([], "compensated"), (["--no-compensate"], "cut"), (["--refit", "--proxy-samples", 1024], "refitted")],
)
def test_finetuning_starts_from_the_grade_asked_for(flags: list[str], grade: str, best: Path, tmp_path: Path):
    """With a learning rate of nothing it stays there."""
    sizes = evaluated(best, tmp_path / "evaluated", *flags)["sizes"]
    row = next(row for row in sizes[::-1] if row["grade"] == grade)  # refitting does not help every size
    run("main.py", "--stage", "finetune", *COMMON, *PROXY, *TRAIN, "--lr", 0, "--min-lr", 0, "--epochs", 1,
        "--mixup", 0, "--cutmix", 0, "--checkpoint", best / "contracted.safetensors", "--op-code", row["op_code"],
        *flags, "--output-dir", tmp_path / "peeled")  # fmt: skip
    model, config = load_subnetwork(tmp_path / "peeled")
    assert config["grade"] == f"{grade}, then fine-tuned"
    assert loss_of(model) == pytest.approx(row["loss"], rel=1e-3)


def test_training_keeps_the_compensation(best: Path, tmp_path: Path):
    """The sizes are trained compensated, with factors that stay; a resumed run with a rate per step is the same."""
    flags = ["main.py", "--stage", "piad", *COMMON, *TRAIN, "--progressive-epochs", 0, "--teacher-model", "self"]
    flags += ["--op-code-sampling", "inverse-macs", "--distillation-type", "soft", "--epochs", 2, "--checkpoint", best]
    run(*flags, "--sched-on-updates", "--output-dir", tmp_path / "a")
    net = supernet.load(tmp_path / "a")
    assert net.grade == "compensated"
    images = torch.randn(4, *net.preprocessing["input_size"])
    with torch.no_grad():
        found, plain = net.cut(-1)(images), supernet.load(tmp_path / "a", compensate=False).cut(-1)(images)
        make_elastic(net.model)
        set_widths(net.model, net.table.widths(-1))
        torch.testing.assert_close(found, net.model(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, rtol=0.01)
    start, kept = (load_file(folder / "compensation.safetensors") for folder in (best, tmp_path / "a"))
    assert start.pop("stamp") != kept.pop("stamp")
    assert_same(kept, start)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "a/log.txt").read_text().splitlines()]
    assert rates[1] == pytest.approx(1e-5) and rates[1] < rates[0]
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a/checkpoint_0.pth", tmp_path / "b")
    run(*flags, "--sched-on-updates", "--resume", "auto", "--output-dir", tmp_path / "b")
    assert_same(load_checkpoint(tmp_path / "b/checkpoint_1.pth"), load_checkpoint(tmp_path / "a/checkpoint_1.pth"))
    run(*flags, "--no-compensate", "--output-dir", tmp_path / "a")
    assert not (tmp_path / "a/compensation.safetensors").exists() and supernet.load(tmp_path / "a").grade == "cut"


def test_contracting_anew_the_papers_way_leaves_no_compensation_behind(road: Road, tmp_path: Path):
    """It would be one of other weights."""
    checkpoint = road.pretrained / "checkpoint_3.pth"
    for flags in (BEST, [*COMMON, *PROXY]):
        run("reparam.py", *flags, "--no-eval", "--checkpoint", checkpoint, "--output-dir", tmp_path)
    assert not (tmp_path / COMPENSATION).exists()
    assert json.loads((tmp_path / "contracted.json").read_text())["method"] == "paper"


def test_basis_and_order_can_be_chosen_apart(road: Road, tmp_path: Path):
    checkpoint = road.pretrained / "checkpoint_3.pth"
    found = {}
    for flags in ([], ["--basis", "fisher"], ["--order", "fisher"], ["--order", "hessian"]):
        folder = tmp_path / "-".join(flags)
        run("reparam.py", *COMMON, *PROXY, *flags, "--no-eval", "--checkpoint", checkpoint, "--output-dir", folder)
        assert json.loads((folder / "contracted.json").read_text())["target_difference"] < 1e-5
        found["-".join(flags)] = load_file(folder / "contracted.safetensors")
    plain = found[""]
    for flags, weights in found.items():
        same = {part: torch.equal(weights[f"blocks.0.{part}.weight"], plain[f"blocks.0.{part}.weight"])
                for part in ("attn.qkv", "mlp.fc1")}  # fmt: skip
        assert same == {"attn.qkv": "basis" not in flags, "mlp.fc1": "order" not in flags}


BAD = {
    "no compensation there": (["--compensate"], "compensation.safetensors does not exist; reparam.py --method best"),
    "of other weights": ([], "was made for other weights than"),
    "cut to pieces": ([], "compensation.safetensors cannot be read, it is damaged or cut short"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_compensation(name: str, best: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    flags, said = BAD[name]
    for file in ("contracted.safetensors", "mask_table.json", COMPENSATION):
        (tmp_path / file).write_bytes((best / file).read_bytes())
    if name == "no compensation there":
        (tmp_path / COMPENSATION).unlink()
    elif name == "cut to pieces":
        (tmp_path / COMPENSATION).write_bytes((best / COMPENSATION).read_bytes()[:-100])
    else:
        weights = bytearray((best / "contracted.safetensors").read_bytes())
        weights[-1] ^= 1
        (tmp_path / "contracted.safetensors").write_bytes(weights)
    before = snapshot(tmp_path)
    arguments = ["--eval", *COMMON, "--checkpoint", tmp_path / "contracted.safetensors", *flags]
    assert exit_code("main.py", *arguments, "--output-dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("after", "grade"), [(0.5, "refitted"), (1.0, "compensated")])
def test_the_grade_of_finetuning_says_whether_refitting_helped(
    after: float, grade: str, best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("main.refit", lambda *_: Refit(before=1.0, after=after, error=0.1))
    command = ["main.py", "--stage", "finetune", *COMMON, *PROXY, *TRAIN, "--op-code", 40, "--refit", "--epochs", 1,
        "--checkpoint", best / "contracted.safetensors", "--resume", "auto", "--output-dir", tmp_path]  # fmt: skip
    run(*command)
    assert load_subnetwork(tmp_path)[1]["grade"] == f"{grade}, then fine-tuned"
    (tmp_path / "config.json").unlink()
    monkeypatch.delattr("main.refit")  # a resumed run does not refit again
    run(*command)
    assert load_subnetwork(tmp_path)[1]["grade"] == f"{grade}, then fine-tuned"


def test_a_folder_that_is_cut_already_is_not_refitted(road: Road, tmp_path: Path, capsys: pytest.CaptureFixture):
    flags = ["--eval", *COMMON, "--sub-network", road.peeled, "--refit", "--output-dir", tmp_path / "out"]
    assert exit_code("main.py", *flags) == 2
    assert f"{road.peeled} is a sub-network, which is cut already: leave --refit out" in capsys.readouterr().err


def test_a_mask_table_needs_the_best_method(road: Road, tmp_path: Path, capsys: pytest.CaptureFixture):
    flags = [*COMMON, "--checkpoint", road.pretrained / "checkpoint_3.pth", "--mask-table"]
    assert exit_code("reparam.py", *flags, "--output-dir", tmp_path / "out") == 2
    assert "--mask-table needs --method best" in capsys.readouterr().err
