"""The whole road through the real programs, on the digits: what each stage writes is what the next one reads."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import scalars
from PIL import Image
from programs import (
    COMMON,
    DIGITS,
    MODEL_KWARGS,
    NAME,
    PIAD,
    PROXY,
    Road,
    assert_same,
    load_subnetwork,
    run,
    save_subnetwork,
    tiny_digits_model,
)
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import supernet
from datasets import eval_loader, open_images, preprocessing
from files import load_checkpoint
from models.backbone import full_widths
from models.extraction import extract
from models.macs import count_macs, count_params
from piad.mask_table import MaskTable
from supernet.amounts import format_amount


def model_of(weights: dict[str, torch.Tensor]) -> VisionTransformer:
    model = tiny_digits_model()
    model.load_state_dict(weights)
    return model.eval()


def super_network(road: Road, key: str = "model") -> tuple[VisionTransformer, MaskTable]:
    return model_of(load_checkpoint(road.super_network)[key]), MaskTable.load(road.mask_table)


@torch.no_grad()
def measured(model: VisionTransformer) -> dict[str, float]:
    """top1, top5 and loss on the digits' val split, in one batch and counted plainly."""
    images = open_images("digits", None, "val")
    batches = eval_loader(images, preprocessing(model, {}), batch_size=len(images), workers=0)
    ((images, targets),) = batches
    logits = model(images)
    ranked = logits.argsort(dim=1, descending=True)
    return {
        "top1": 100 * (ranked[:, 0] == targets).double().mean().item(),
        "top5": 100 * (ranked[:, :5] == targets[:, None]).any(1).double().mean().item(),
        "loss": F.cross_entropy(logits.double(), targets).item(),
    }


def assert_measures(row: dict[str, Any], model: VisionTransformer) -> None:
    for name, value in measured(model).items():
        assert row[name] == pytest.approx(value, rel=1e-5), name


@torch.no_grad()
def assert_faithful(row: dict[str, Any], model: VisionTransformer, whole: VisionTransformer) -> None:
    """agreement and kl on the digits' val split, counted plainly."""
    images = open_images("digits", None, "val")
    ((images, _),) = eval_loader(images, preprocessing(whole, {}), batch_size=len(images), workers=0)
    found, expected = (network(images).double().softmax(1) for network in (model, whole))
    assert row["agreement"] == pytest.approx(100 * (found.argmax(1) == expected.argmax(1)).double().mean().item())
    kl = (expected * (expected / found).log()).sum(1).mean().item()
    assert row["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-9)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "frontier.json").read_text())["sizes"]


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# The stages


def test_pretraining_learns_and_logs(road: Road):
    lines = log_lines(road.pretrained)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] and lines[-1]["top1"] > 20  # chance is 10
    rates = [line["lr"] for line in lines]
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(2e-2 * 256 / 512)
    assert_measures(lines[-1], model_of(road.weights(road.pretrained / "checkpoint_3.pth")))


def test_wpac_moves_the_weights_and_keeps_the_function(road: Road):
    before, after = road.weights(road.pretrained / "checkpoint_3.pth"), road.weights(road.contracted)
    moved = {key.split(".", 2)[-1] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", *(f"mlp.fc{n}.weight" for n in (1, 2)),
                     "mlp.fc1.bias"}  # fmt: skip
    images = torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model_of(after)(images), model_of(before)(images), rtol=1e-4, atol=1e-5)


def test_wpac_says_how_it_was_made(road: Road):
    facts = json.loads((road.reparamed / "contracted.json").read_text())
    assert facts["model"] == NAME and facts["model_kwargs"] == {**MODEL_KWARGS, "num_classes": 10}
    assert (facts["proxy_samples"], facts["cost"], facts["averaged_weights"]) == (64, "logit", False)
    assert facts["checkpoint"].endswith("pretrained/checkpoint_3.pth") and 0 < facts["target_difference"] < 1e-5
    whole = measured(model_of(road.weights(road.contracted)))["top1"]
    found = facts["evaluation"]
    assert found["before"]["top1"] == found["after"]["top1"] == pytest.approx(whole)
    assert found["before"].keys() == {"top1", "top5", "loss"} and found["after"]["agreement"] == 100
    assert len(found) == 5
    assert facts["shares"].keys() == full_widths(tiny_digits_model()).keys()
    for parts in facts["shares"].values():
        for shares in parts.values():
            assert 0 < shares[0] <= shares[1] <= shares[2] <= 1
            assert all(found >= share for found, share in zip(shares, (0.25, 0.5, 0.75), strict=True))


def test_wpac_measures_the_truncated_models(road: Road):
    facts = json.loads((road.reparamed / "contracted.json").read_text())
    model = model_of(road.weights(road.contracted))
    for share, name in ((0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75")):
        full = full_widths(model)
        widths = {key: int(width * share) if key.endswith("attn") else width for key, width in full.items()}
        found = next(value for key, value in facts["evaluation"].items() if key.startswith(f"at {name} "))
        assert_measures(found, extract(model, widths))
        assert_faithful(found, extract(model, widths), model)


def test_wpac_refits_the_truncated_models(road: Road, tmp_path: Path):
    run("reparam.py", *COMMON, *PROXY, "--refit", "--checkpoint", road.pretrained / "checkpoint_3.pth",
        "--output-dir", tmp_path)  # fmt: skip
    cut, refitted = (
        json.loads((folder / "contracted.json").read_text())["evaluation"] for folder in (road.reparamed, tmp_path)
    )
    assert refitted["after"] == cut["after"]
    name = next(name for name in cut if name.startswith("at 0.25"))
    assert refitted[name]["kl"] < cut[name]["kl"]


def test_piad_trains_a_super_network(road: Road):
    state = load_checkpoint(road.super_network)
    assert_same(state["mask_table"], json.loads(road.mask_table.read_text()))
    model, table = super_network(road)
    table.check(full_widths(model), NAME)
    dropped = count_macs(model) - count_macs(model, table.widths(-1))
    assert dropped >= 0.875 * count_macs(model)  # P_e = 2 epochs are over
    lines = log_lines(road.peelable)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[0]["op_codes"] < lines[1]["op_codes"] == len(table)
    for name, op_code in (("full", 0), ("smallest", -1)):
        row = {key: lines[-1][f"{key}_{name}"] for key in ("top1", "top5", "loss")}
        assert_measures(row, extract(model, table.widths(op_code)))
    assert lines[-1]["top1"] == pytest.approx((lines[-1]["top1_full"] + lines[-1]["top1_smallest"]) / 2)


def test_piad_logs_what_is_sampled_and_how_the_table_grows(road: Road):
    model, table = super_network(road)
    logged = scalars(road.peelable)
    share = [count_macs(model, row) / count_macs(model) for row in table.rows]
    assert [value for _, value in logged["macs_share"]] == pytest.approx([share[int(c)] for _, c in logged["op_code"]])
    lines = log_lines(road.peelable)
    assert [line["macs_share_smallest"] for line in lines] == [share[line["op_codes"] - 1] for line in lines]
    # The table of epoch 0 does not reach half of the MACs.
    assert [name for name in lines[0] if name.startswith("top1_")] == ["top1_full", "top1_smallest"]
    for name, limit in (("half", 0.5), ("quarter", 0.25)):
        op_code = next(code for code, found in enumerate(share) if found <= limit)
        row = {key: lines[1][f"{key}_{name}"] for key in ("top1", "top5", "loss")}
        assert_measures(row, extract(model, table.widths(op_code)))
    assert [step for step, _ in logged["widths"]] == [step for step, _ in logged["top1"]]
    pictures = [picture for _, picture in logged["widths"]]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and pictures[0] != pictures[1]


def test_wpac_logs_its_evaluation_and_spectra(road: Road):
    logged = scalars(road.reparamed)
    found = json.loads((road.reparamed / "contracted.json").read_text())["evaluation"]
    expected = {100: found["after"]} | {k: found[f"at {k / 100:g} of the attention dims"] for k in (75, 50, 25)}
    for name in ("top1", "top5", "loss", "agreement", "kl"):
        assert dict(logged[name]) == pytest.approx({step: values[name] for step, values in expected.items()})
    assert logged["machine/images_per_second"] == logged["machine/peak_memory_MiB"] == [(0, None)]
    assert len(logged["spectra"]) == 1
    with Image.open(road.reparamed / "spectra.png") as picture:
        assert picture.size[0] > 1000


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.fixture(scope="module")
def frontier(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an evaluation at every kind of size writes."""
    folder = tmp_path_factory.mktemp("frontier")
    run("main.py", "--eval", *COMMON, "--checkpoint", road.super_network, "--baseline", road.contracted,
        "--op-code", 0, -1, 3, "--macs-ratio", 0.75, 0.5, 0.3, "--frontier", 3,
        "--output-dir", folder)  # fmt: skip
    return folder


def test_frontier_rows_are_counted_on_the_extracted_modules(road: Road, frontier: Path):
    model, table = super_network(road)
    baseline = model_of(road.weights(road.contracted))
    rows = read_rows(frontier)
    assert len({row["op_code"] for row in rows}) == len(rows) >= 6
    for row in rows:
        widths = table.widths(row["op_code"])
        small = extract(model, widths)
        assert row["params"] == sum(p.numel() for p in small.parameters()) == count_params(model, widths)
        assert row["macs_linear"] == count_macs(small) == count_macs(model, widths)
        assert row["macs_full"] == count_macs(small, convention="full") == count_macs(model, widths, "full")
        assert_measures(row, small)
        assert_faithful(row, small, model)
        assert row["baseline_top1"] == pytest.approx(measured(extract(baseline, widths))["top1"])
        assert row["images_per_second"] > 0
    facts = json.loads((road.reparamed / "contracted.json").read_text())
    whole = next(row for row in rows if row["op_code"] == 0)
    assert whole["baseline_top1"] == pytest.approx(facts["evaluation"]["after"]["top1"])
    assert whole["params"] == sum(p.numel() for p in model.parameters())


def test_frontier_sizes_are_the_largest_that_fit(road: Road, frontier: Path):
    model, table = super_network(road)
    codes = [row["op_code"] for row in read_rows(frontier)]
    assert codes[:3] == [0, len(table) - 1, 3]
    for code, ratio in zip(codes[3:6], (0.75, 0.5, 0.3), strict=True):
        limit = ratio * count_macs(model)
        assert count_macs(model, table.widths(code)) <= limit < count_macs(model, table.widths(code - 1))


@pytest.mark.parametrize("convention", ["linear", "full"])
def test_frontier_is_evenly_spaced(convention: str, road: Road, tmp_path: Path):
    model, table = super_network(road)
    run("main.py", "--eval", *COMMON, "--checkpoint", road.super_network, "--frontier", 5, "--macs-convention",
        convention, "--output-dir", tmp_path)  # fmt: skip
    rows = read_rows(tmp_path)
    assert [rows[0]["op_code"], rows[-1]["op_code"]] == [0, len(table) - 1]
    macs = [count_macs(model, row, convention) for row in table.rows]
    gap = max(before - after for before, after in itertools.pairwise(macs))  # no size lies closer than half
    for number, row in enumerate(rows):
        wanted = macs[0] - (macs[0] - macs[-1]) * number / 4
        assert abs(row[f"macs_{convention}"] - wanted) <= gap / 2
    assert all("baseline_top1" not in row for row in rows)


def test_sizes_are_chosen_in_the_convention_asked_for(road: Road, tmp_path: Path):
    model, table = super_network(road)
    run("main.py", "--eval", *COMMON, "--checkpoint", road.super_network, "--macs", "100K", "--macs-convention", "full",
        "--output-dir", tmp_path)  # fmt: skip
    (row,) = read_rows(tmp_path)
    before = table.widths(row["op_code"] - 1)
    assert row["macs_full"] <= 100e3 < count_macs(model, before, "full")


def test_no_size_asked_for_means_the_whole_and_the_smallest(road: Road, tmp_path: Path):
    run("main.py", "--eval", *COMMON, "--checkpoint", road.super_network, "--output-dir", tmp_path)
    assert [row["op_code"] for row in read_rows(tmp_path)] == [0, len(super_network(road)[1]) - 1]


def test_frontier_files_agree(road: Road, frontier: Path):
    rows = read_rows(frontier)
    with (frontier / "frontier.csv").open() as file:
        table = list(csv.DictReader(file))
    facts = json.loads((frontier / "frontier.json").read_text())
    table_of_widths = MaskTable.load(road.mask_table)
    assert [row.pop("widths") for row in rows] == [table_of_widths.widths(row["op_code"]) for row in rows]
    assert {row.pop("grade") for row in rows} == {line.pop("grade") for line in table} == {"cut"}
    assert [{key: float(value) for key, value in line.items()} for line in table] == rows
    assert facts["full_widths"] == table_of_widths.widths(0)
    assert facts["images"] == 360 and facts["averaged_weights"] is False
    described = supernet.load(road.peelable).describe()
    assert {key: facts[key] for key in described} == described
    assert facts["weights"].endswith("checkpoint_1.pth")
    with Image.open(frontier / "frontier.png") as picture:
        picture.load()
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours  # both curves are drawn


def test_frontier_is_printed(road: Road, tmp_path: Path, capsys: pytest.CaptureFixture):
    run("main.py", "--eval", *COMMON, "--checkpoint", road.super_network, "--op-code", 0, "--output-dir", tmp_path)
    shown = capsys.readouterr().out
    (row,) = read_rows(tmp_path)
    line = next(line for line in shown.splitlines() if line.split()[:1] == ["0"])
    assert f"{row['top1']:.2f}" in line and format_amount(count_macs(tiny_digits_model())) in line
    assert "raw" in shown and str(road.super_network) in shown


def test_averaged_weights_are_evaluated_when_asked_for(road: Road, tmp_path: Path, capsys: pytest.CaptureFixture):
    run("main.py", "--eval", *COMMON, "--checkpoint", road.super_network, "--eval-ema", "--op-code", 0,
        "--output-dir", tmp_path)  # fmt: skip
    (row,) = read_rows(tmp_path)
    averaged, raw = (super_network(road, key)[0] for key in ("model_ema", "model"))
    assert_measures(row, averaged)
    assert row["loss"] != pytest.approx(measured(raw)["loss"], rel=1e-5)
    assert json.loads((tmp_path / "frontier.json").read_text())["averaged_weights"] is True
    assert "EMA" in capsys.readouterr().out


def test_contraction_of_averaged_weights(road: Road, tmp_path: Path):
    checkpoint = road.pretrained / "checkpoint_3.pth"
    run("reparam.py", *COMMON, "--proxy-samples", 8, "--no-eval", "--eval-ema", "--checkpoint", checkpoint,
        "--output-dir", tmp_path)  # fmt: skip
    facts = json.loads((tmp_path / "contracted.json").read_text())
    assert facts["averaged_weights"] is True and "evaluation" not in facts
    images = torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        expected = model_of(load_checkpoint(checkpoint)["model_ema"])(images)
        found = model_of(load_checkpoint(tmp_path / "contracted.safetensors"))(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning and sub-network folders


def test_finetuning_trains_the_extracted_model(road: Road):
    model, table = super_network(road)
    config = json.loads((road.peeled / "config.json").read_text())
    widths = table.widths(config["op_code"])
    assert config["widths"] == widths
    assert count_macs(model, widths) <= count_macs(model) / 2 < count_macs(model, table.widths(config["op_code"] - 1))
    small, _ = load_subnetwork(road.peeled)
    assert config["params"] == sum(p.numel() for p in small.parameters()) == count_params(model, widths)
    assert (config["macs_linear"], config["macs_full"]) == (count_macs(small), count_macs(small, convention="full"))
    start = extract(model, widths).state_dict()
    assert all(value.shape == start[key].shape for key, value in small.state_dict().items())
    assert not torch.equal(small.head.weight, start["head.weight"])


def test_the_folder_holds_the_last_weights_of_finetuning(road: Road):
    small, _ = load_subnetwork(road.peeled)
    assert_same(dict(small.state_dict()), dict(load_checkpoint(road.peeled / "checkpoint_1.pth")["model"]))


def test_the_folder_evaluates_as_at_the_end_of_finetuning(road: Road, tmp_path: Path):
    run("main.py", "--eval", *DIGITS, "--sub-network", road.peeled, "--output-dir", tmp_path)
    (row,) = read_rows(tmp_path)
    config = json.loads((road.peeled / "config.json").read_text())
    small, _ = load_subnetwork(road.peeled)
    assert_measures(row, small)
    for name in ("top1", "top5", "loss"):
        assert row[name] == config["accuracy"][name] == log_lines(road.peeled)[-1][name]
    assert (row["params"], row["macs_linear"]) == (config["params"], config["macs_linear"])


def test_a_folder_with_bypassed_branches_is_evaluated(road: Road, tmp_path: Path):
    model, table = super_network(road)
    small = extract(model, table.widths(-1) | {"0.attn": 0, "1.mlp": 0})
    save_subnetwork(
        tmp_path / "small", small, name=NAME, model_kwargs=MODEL_KWARGS, preprocessing=preprocessing(model, {})
    )
    run("main.py", "--eval", *DIGITS, "--sub-network", tmp_path / "small", "--output-dir", tmp_path)
    (row,) = read_rows(tmp_path)
    assert_measures(row, small)
    assert row["params"] == sum(p.numel() for p in small.parameters())


def test_a_folder_needs_nothing_else(road: Road, tmp_path: Path):
    """The model is rebuilt from its folder, moved elsewhere, by a program that is not told what it is."""
    shutil.copytree(road.peeled, tmp_path / "elsewhere")
    for extra in ("checkpoint_0.pth", "checkpoint_1.pth", "log.txt"):
        (tmp_path / "elsewhere" / extra).unlink(missing_ok=True)
    found, _ = load_subnetwork(tmp_path / "elsewhere")
    expected, _ = load_subnetwork(road.peeled)
    images = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(found(images), expected(images))


# ---------------------------------------------------------------------------------------------------------------------
# The authors' layout


def test_the_authors_files_are_evaluated(road: Road, tmp_path: Path):
    """checkpoint_299.pth as DeiT-style training writes it, beside a mask_table.json that holds modules alone."""
    model, table = super_network(road)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    F.cross_entropy(model(torch.randn(2, 1, 16, 16)), torch.tensor([1, 2])).backward()
    optimizer.step()
    settings = argparse.Namespace(
        model="vit_tiny", lr=5e-4, betas=None, batch_size=128, aa="rand-m9-mstd0.5-inc1", distributed=True,
        repeated_aug=True, train_interpolation="bicubic", decay_rates=[0.1, 0.2], output_dir="output", gpu=0,
    )  # fmt: skip
    theirs = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [5e-4], "t_initial": 300},
        "epoch": 299,
        "model_ema": model.state_dict(),
        "scaler": {"scale": 65536.0, "growth_tracker": 7},
        "args": settings,
    }
    folder = tmp_path / "peelable" / "vit_tiny"
    folder.mkdir(parents=True)
    torch.save(theirs, folder / "checkpoint_299.pth")
    columns = {key: [row[key] for row in table.rows] for key in table.rows[0]}
    their_table = {key: {**dict(enumerate(column)), -1: column[-1]} for key, column in columns.items()}
    (folder / "mask_table.json").write_text(json.dumps(their_table))
    run("main.py", "--eval", *COMMON, "--checkpoint", folder / "checkpoint_299.pth", "--op-code", 0, 5, -1,
        "--output-dir", tmp_path / "found")  # fmt: skip
    for row, code in zip(read_rows(tmp_path / "found"), (0, 5, -1), strict=True):
        assert_measures(row, extract(model.eval(), table.widths(code)))


def test_our_table_is_the_authors_format(road: Road):
    """{module: {op code: width, ..., "-1": smallest}}: nothing that a reader of their files would trip over."""
    table = json.loads(road.mask_table.read_text())
    table.pop("meta", None)
    assert list(table) == ["0.attn", "0.mlp", "1.attn", "1.mlp"]
    for column in table.values():
        codes = [int(code) for code in column]
        assert codes == [*range(len(codes) - 1), -1]
        assert column["-1"] == column[str(len(codes) - 2)]


# ---------------------------------------------------------------------------------------------------------------------
# Going on where a run stopped


class Killed(Exception):
    """What ends a run in these tests, in place of a signal."""


# Everything that draws: Mixup, repeated augmentation, drop path, sub-networks; and everything that is averaged.
LONG = [*PIAD, "--epochs", 3, "--ema-decay", 0.9, "--drop-path", 0.2, "--reprob", 0.5]


@pytest.fixture(scope="module")
def unhurt(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of PIAD in one go."""
    folder = tmp_path_factory.mktemp("unhurt")
    run("main.py", *LONG, "--checkpoint", road.contracted, "--output-dir", folder)
    return folder


def run_until(monkeypatch: pytest.MonkeyPatch, updates: int, *arguments: object) -> None:
    """Runs main.py until the optimizer has made so many updates; the next one kills the run."""
    step, done = torch.optim.AdamW.step, []

    def counted(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        if len(done) == updates:
            raise Killed
        done.append(None)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", counted)
        with pytest.raises(Killed):
            run("main.py", *arguments)
    time.sleep(1.1)  # TensorBoard orders its files by the second


def assert_runs_are_equal(found: Path, expected: Path) -> None:
    """Bit for bit: weights, averaged weights, optimizer, table, log, scalars."""
    assert_same(load_checkpoint(found / "checkpoint_2.pth"), load_checkpoint(expected / "checkpoint_2.pth"))
    for name in ("mask_table.json", "log.txt"):
        assert (found / name).read_text() == (expected / name).read_text(), name
    assert scalars(found) == scalars(expected)


def test_an_unhurt_run_leaves_every_step_once(unhurt: Path):
    steps = {tag: [step for step, _ in values] for tag, values in scalars(unhurt).items()}
    assert steps["loss"] == steps["op_code"] == list(range(15))
    assert steps["train_loss"] == steps["lr"] == steps["op_codes"] == steps["macs_share_smallest"] == [4, 9, 14]
    assert steps["machine/images_per_second"] == steps["machine/peak_memory_MiB"] == [4, 9, 14]
    assert [line["epoch"] for line in log_lines(unhurt)] == [0, 1, 2]
    table = MaskTable.load(unhurt / "mask_table.json")
    assert all(0 <= code < len(table) for _, code in scalars(unhurt)["op_code"])


@pytest.mark.parametrize("updates", [11, 10])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(
    road: Road, unhurt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, updates: int
):
    """Stopped in the third epoch: in its second step, and in its first."""
    arguments = [*LONG, "--checkpoint", road.contracted, "--output-dir", tmp_path]
    run_until(monkeypatch, updates, *arguments)
    assert not (tmp_path / "checkpoint_2.pth").exists()
    run("main.py", *arguments, "--resume", "auto")
    assert "checkpoint_1.pth: epoch 2, step 0" in capsys.readouterr().out
    assert_runs_are_equal(tmp_path, unhurt)


def test_a_run_that_stopped_inside_an_epoch_goes_on_there(
    road: Road, unhurt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Stopped in the second epoch's fifth step; four were saved. The table is not grown a second time."""
    from piad.progressive import ProgressiveDropout

    arguments = [*LONG, "--checkpoint", road.contracted, "--output-dir", tmp_path, "--checkpoint-steps", 2]
    run_until(monkeypatch, 9, *arguments)
    grown, begin = [], ProgressiveDropout.begin_epoch
    monkeypatch.setattr(
        ProgressiveDropout, "begin_epoch", lambda self, epoch: (grown.append(epoch), begin(self, epoch))[1]
    )
    run("main.py", *arguments, "--resume", "auto")
    assert "checkpoint_1.pth: epoch 1, step 4" in capsys.readouterr().out
    assert grown == [2]
    assert_runs_are_equal(tmp_path, unhurt)


def test_a_named_checkpoint_is_resumed(road: Road, unhurt: Path, tmp_path: Path):
    run("main.py", *LONG, "--checkpoint", road.contracted, "--output-dir", tmp_path, "--resume",
        unhurt / "checkpoint_1.pth")  # fmt: skip
    assert_same(load_checkpoint(tmp_path / "checkpoint_2.pth"), load_checkpoint(unhurt / "checkpoint_2.pth"))


def test_a_damaged_checkpoint_is_passed_over(road: Road, unhurt: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "copy"
    shutil.copytree(unhurt, folder)
    newest = folder / "checkpoint_2.pth"
    newest.write_bytes(newest.read_bytes()[:-1000])
    time.sleep(1.1)
    run("main.py", *LONG, "--checkpoint", road.contracted, "--output-dir", folder, "--resume", "auto")
    shown = capsys.readouterr().out
    assert "skipping checkpoint_2.pth" in shown and "checkpoint_1.pth: epoch 2, step 0" in shown
    assert_runs_are_equal(folder, unhurt)


def test_a_finished_run_that_is_resumed_stays_as_it_is(road: Road, unhurt: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(unhurt, folder)
    time.sleep(1.1)
    run("main.py", *LONG, "--checkpoint", road.contracted, "--output-dir", folder, "--resume", "auto")
    assert_runs_are_equal(folder, unhurt)


def test_a_fresh_run_beside_older_checkpoints_keeps_its_own(road: Road, tmp_path: Path):
    """Without --resume, what an earlier and longer run left in the folder must not count as newer."""
    for epoch in (7, 8):
        (tmp_path / f"checkpoint_{epoch}.pth").write_bytes(b"of another run")
    arguments = [*PIAD, "--epochs", 2, "--eval-every", 2, "--checkpoint", road.contracted, "--output-dir", tmp_path]
    run("main.py", *arguments)
    assert load_checkpoint(tmp_path / "checkpoint_1.pth")["epoch"] == 2
    assert load_checkpoint(tmp_path / "checkpoint_0.pth")["epoch"] == 1
