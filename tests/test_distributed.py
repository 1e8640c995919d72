"""Two real processes under torchrun (gloo): what they train together is what one process trains alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import (
    COMMON,
    PIAD,
    PROXY,
    TRAIN,
    Road,
    assert_same,
    call,
    run,
    tiny_digits_model,
)
from timm.models.vision_transformer import VisionTransformer
from tiny import masked_logits

from datasets import Digits, eval_loader, open_images, preprocessing, proxy_set
from engine import evaluate
from files import load_checkpoint
from models.elastic import make_elastic
from models.extraction import extract
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout

# No random number depends on the rank: no Mixup, no drop path. SGD: Adam turns a rounding error into a whole step.
PRETRAIN = ["--stage", "pretrain", *COMMON, *TRAIN, "--epochs", "2", "--warmup-epochs", "0", "--drop-path", "0",
            "--mixup", "0", "--cutmix", "0", "--ema-decay", "0.9", "--opt", "sgd", "--workers", "0"]  # fmt: skip
# The list is whole after the first epoch, and reaches so far that branches are bypassed.
TOGETHER = [*PIAD, "--epochs", "2", "--progressive-epochs", "1", "--dropout-ratio", "0.93", "--batch-size", "128",
            "--ema-decay", "0.9", "--eval-every", "1", "--op-code-per-rank"]  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """What two processes left: the output folders, and what each rank saw (see rank_program)."""

    pretrained: Path
    reparamed: Path
    peelable: Path
    evaluated: Path
    unlabelled: Path
    photos: Path
    taught: Path
    printed: str
    pretraining: list[dict[str, Any]]
    piad: list[dict[str, Any]]
    teaching: list[dict[str, Any]]


@pytest.fixture(scope="module")
def pair(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    outputs = [
        folder / name for name in ("pretrained", "reparamed", "peelable", "evaluated", "unlabelled", "photos", "taught")
    ]
    outputs[5].mkdir()
    for index in range(30):  # three are held back: two for one rank, one for the other
        Digits("train")[index][0].save(outputs[5] / f"{index}.png")
    commands = [
        ["main.py", *PRETRAIN, "--batch-size", "64", "--output-dir", str(outputs[0])],
        ["reparam.py", *COMMON, *PROXY, "--batch-size", "10", "--checkpoint",
         str(road.pretrained / "checkpoint_3.pth"), "--output-dir", str(outputs[1])],
        ["main.py", *TOGETHER, "--checkpoint", str(road.contracted), "--output-dir", str(outputs[2])],
        ["main.py", "--eval", *COMMON, "--checkpoint", str(road.super_network), "--op-code", "0", "-1", "--output-dir",
         str(outputs[3])],
        ["main.py", "--eval", *unlabelled(outputs[5]), "--checkpoint", str(road.super_network), "--op-code", "0", "-1",
         "--output-dir", str(outputs[4])],
        ["main.py", *taught(road), "--batch-size", "64", "--output-dir", str(outputs[6])],
    ]  # fmt: skip
    (folder / "commands.json").write_text(json.dumps(commands))
    done = call("tests/rank_program.py", folder / "commands.json", folder, processes=2)
    assert done.returncode == 0, done.stderr
    seen = [[torch.load(folder / f"{number}.{rank}.pt") for rank in range(2)] for number in (0, 2, 5)]
    return Pair(*outputs, done.stdout, *seen)


def taught(road: Road) -> list[str]:
    """RECIPE=best, in parts: labels, a teacher and its tokens, compensated sizes that all ranks share."""
    best = road.pretrained.parent / "best"
    if not best.exists():
        run("reparam.py", *COMMON, *PROXY, "--method", "best", "--mask-table", "--no-eval", "--checkpoint",
            road.pretrained / "checkpoint_3.pth", "--output-dir", best)  # fmt: skip
    return [*PIAD, "--checkpoint", str(best), "--distillation-tokens", "1", "--freeze-embedding",
            "--progressive-epochs", "0", "--op-code-sampling", "inverse-macs",
            "--teacher-model", "self", "--distillation-type", "soft", "--grad-accum-steps", "2", "--epochs", "1",
            "--sizes-per-step", "2", "--mixup", "0", "--cutmix", "0", "--ema-decay", "0", "--opt", "sgd"]  # fmt: skip


def unlabelled(photos: Path) -> list[str]:
    return [*COMMON, "--data-set", "images", "--data-path", str(photos)]


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Plain training


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with the global batch of the two."""
    folder = tmp_path_factory.mktemp("alone")
    run("main.py", *PRETRAIN, "--batch-size", "128", "--output-dir", folder)
    return folder


@pytest.mark.parametrize("key", ["model", "model_ema"])
def test_two_processes_train_what_one_does(pair: Pair, alone: Path, key: str):
    together, expected = (load_checkpoint(folder / "checkpoint_1.pth")[key] for folder in (pair.pretrained, alone))
    start = load_checkpoint(alone / "checkpoint_0.pth")[key]
    for name, value in expected.items():
        moved = (value - start[name]).abs().max()
        # A weight near 1 has steps of 1.2e-7 in float32: a few of them are rounding.
        assert (together[name] - value).abs().max() <= 1e-4 * moved + 5e-7, name


def test_two_processes_log_what_one_does(pair: Pair, alone: Path):
    for found, expected in zip(log_lines(pair.pretrained), log_lines(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_two_processes_see_different_halves_of_the_batch(pair: Pair):
    for one, other in zip(*(rank["steps"] for rank in pair.pretraining), strict=True):
        assert one["images"].shape == other["images"].shape == (64, 1, 16, 16)
        assert not torch.equal(one["images"], other["images"])
        assert_same(other["gradients"], one["gradients"])


# ---------------------------------------------------------------------------------------------------------------------
# WPAC


def test_two_processes_contract_as_one_does(pair: Pair, road: Road):
    """32 proxy images a rank, in batches that do not divide them."""
    folders = pair.reparamed, road.reparamed
    found, expected = (json.loads((folder / "contracted.json").read_text()) for folder in folders)
    for key, parts in expected["shares"].items():
        for name, shares in parts.items():
            assert found["shares"][key][name] == pytest.approx(shares, rel=1e-5)
    assert found["evaluation"]["after"]["top1"] == expected["evaluation"]["after"]["top1"]
    weights = [load_checkpoint(folder / "contracted.safetensors") for folder in folders]
    for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "blocks.1.mlp.fc1.bias"):
        assert torch.equal(weights[0][name], weights[1][name]), name  # the same order of hidden units


# ---------------------------------------------------------------------------------------------------------------------
# PIAD


def test_ranks_hold_the_same_weights_and_table(pair: Pair):
    one, other = pair.piad
    for key in ("model", "model_ema", "mask_table"):
        assert_same(other[key], one[key], key)
    state = load_checkpoint(pair.peelable / "checkpoint_1.pth")
    for key in ("model", "model_ema", "mask_table"):
        assert_same(state[key], one[key], key)
    assert json.loads((pair.peelable / "mask_table.json").read_text()) == one["mask_table"]


def test_the_table_is_that_of_one_process(pair: Pair, road: Road):
    """The list is grown at the start of the first epoch, from the contracted weights: the same on one process."""
    model = tiny_digits_model()
    model.load_state_dict(load_checkpoint(road.contracted))
    proxy = proxy_set(open_images("digits", None, "train"), 64, 0)
    batches = eval_loader(proxy, preprocessing(model, {}), batch_size=64, workers=0)
    piad = ProgressiveDropout(make_elastic(model), batches, ratio=0.93, epochs=1, seed=0, table=None)
    piad.begin_epoch(0)
    assert MaskTable.from_json(pair.piad[0]["mask_table"]).rows == piad.table.rows


def widths_of(pair: Pair, step: dict[str, Any]) -> dict[str, int]:
    return MaskTable.from_json(pair.piad[0]["mask_table"]).widths(step["op_code"])


def test_ranks_train_different_sub_networks_and_some_bypass_branches(pair: Pair):
    places = [(step["epoch"], step["step"], step["rank"]) for step in pair.piad[1]["steps"]]
    assert places == [(epoch, step, 1) for epoch in (0, 1) for step in range(5)]
    assert {step["rank"] for step in pair.piad[0]["steps"]} == {0}
    bypassed = [
        [{key for key, width in widths_of(pair, step).items() if width == 0} for step in rank["steps"]]
        for rank in pair.piad
    ]
    assert any(one != other for one, other in zip(*bypassed, strict=True))  # DDP waits for what one of them lacks
    codes = [[step["op_code"] for step in rank["steps"]] for rank in pair.piad]
    assert sum(one != other for one, other in zip(*codes, strict=True)) >= 8


def test_the_gradient_is_the_mean_over_ranks(pair: Pair):
    """At every step, against plain forwards with the dropped weights zeroed, one a rank."""
    model = tiny_digits_model().double()
    for steps in zip(*(rank["steps"] for rank in pair.piad), strict=True):
        assert_same(steps[1]["before"], steps[0]["before"])
        assert_same(steps[1]["gradients"], steps[0]["gradients"])
        model.load_state_dict(steps[0]["before"])
        model.zero_grad()
        for step in steps:
            logits = masked_logits(model, widths_of(pair, step), step["images"].double())
            loss = -(step["targets"].double() * logits.log_softmax(-1)).sum(-1).mean()
            (loss / len(steps)).backward()
        for name, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found = steps[0]["gradients"][name].double()
            scale = max(float(expected.abs().max()), 1e-4)
            assert (found - expected).abs().max() <= 1e-4 * scale, name


def test_two_processes_learn_from_a_teacher_what_one_does(pair: Pair, road: Road, tmp_path: Path):
    one, other = ([step["op_code"] for step in rank["steps"]] for rank in pair.teaching)
    run("main.py", *taught(road), "--batch-size", "128", "--output-dir", tmp_path)
    assert one == other and len(set(one)) > 2
    assert_same(pair.teaching[1]["model"], pair.teaching[0]["model"])
    for name, value in load_checkpoint(tmp_path / "checkpoint_0.pth")["model"].items():
        torch.testing.assert_close(pair.teaching[0]["model"][name], value, rtol=1e-4, atol=1e-6)


def assert_measures(row: dict[str, Any], model: VisionTransformer, suffix: str = "") -> None:
    """One process, one batch."""
    batches = eval_loader(open_images("digits", None, "val"), preprocessing(model, {}), batch_size=360, workers=0)
    found = evaluate(model, batches, torch.device("cpu"))
    for key in ("top1", "top5", "loss"):
        assert row[key + suffix] == pytest.approx(found[key], rel=1e-5), key


def test_two_processes_log_the_accuracy_over_all_images(pair: Pair):
    model = tiny_digits_model()
    model.load_state_dict(pair.piad[0]["model"])
    table = MaskTable.from_json(pair.piad[0]["mask_table"])
    for suffix, op_code in (("_full", 0), ("_smallest", -1)):
        assert_measures(log_lines(pair.peelable)[-1], extract(model, table.widths(op_code)), suffix)


def test_two_processes_evaluate_as_one_does(pair: Pair, road: Road):
    model, table = tiny_digits_model(), MaskTable.load(road.mask_table)
    model.load_state_dict(road.weights())
    rows = json.loads((pair.evaluated / "frontier.json").read_text())["sizes"]
    assert [row["op_code"] for row in rows] == [0, len(table) - 1]
    for row in rows:
        assert_measures(row, extract(model, table.widths(row["op_code"])))


def test_two_processes_find_the_fidelity_that_one_does(pair: Pair, road: Road, tmp_path: Path):
    run("main.py", "--eval", *unlabelled(pair.photos), "--checkpoint", road.super_network, "--op-code", 0, -1,
        "--output-dir", tmp_path)  # fmt: skip
    found, expected = (json.loads((folder / "frontier.json").read_text()) for folder in (pair.unlabelled, tmp_path))
    assert found["images"] == expected["images"] == 3
    for row, alone in zip(found["sizes"], expected["sizes"], strict=True):
        for key in ("agreement", "kl"):
            assert row[key] == pytest.approx(alone[key], rel=1e-5, abs=1e-9)
    assert found["sizes"][1]["kl"] > 1e-3


def test_only_the_main_process_speaks(pair: Pair):
    lines = pair.printed.splitlines()
    assert sum("360 images of digits" in line for line in lines) == 1
    assert sum(line.startswith("epoch 0 ") for line in lines) == 3  # three training programs
    assert sum(line.startswith("before: top-1 ") for line in lines) == 1
