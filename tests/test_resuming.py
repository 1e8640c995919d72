"""Going on: with every optimizer, elsewhere, with other processes; which epoch is the best; averaged weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from programs import COMMON, PIAD, TRAIN, Road, assert_same, run
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

import main
import utils
from files import load_checkpoint, save_checkpoint
from training import Progress, Training
from utils import UserError

# What these need, this training loop does not give: a CUDA device with Apex or bitsandbytes, second-order gradients.
NEED_MORE = {"adahessian"}
OPTIMIZERS = [
    name for name in (*list_optimizers(), "lookahead_adamw", "lookahead_sgd")
    if not name.startswith(("bnb", "fused")) and name not in NEED_MORE
]  # fmt: skip


def training_with(optimizer: str) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3))
    made = create_optimizer_v2(model, opt=optimizer, lr=1e-2, weight_decay=0.05)
    return Training(model, made, nn.CrossEntropyLoss(), torch.device("cpu"), 0)


def step(training: Training, seed: int) -> None:
    torch.manual_seed(seed)
    images, targets = torch.randn(4, 3, 2, 2), torch.randint(3, (4,))
    training.optimizer.zero_grad()
    training.loss_fn(training.model(images), targets).backward()
    training.optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_of_timm_that_trains_is_resumed_exactly(optimizer: str, tmp_path: Path):
    """Stopped in the middle of a cycle of Lookahead, whose slow weights belong to the state as well."""
    whole = training_with(optimizer)
    for seed in range(7):
        step(whole, seed)
    save_checkpoint(tmp_path / "state.pth", whole.state_dict())
    resumed = training_with(optimizer)
    resumed.load_state_dict(load_checkpoint(tmp_path / "state.pth"))
    for seed in range(7, 14):
        step(whole, seed)
        step(resumed, seed)
    assert_same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_an_optimizer_that_needs_more_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="--opt adahessian needs second-order gradients"):
        run("main.py", "--stage", "pretrain", *COMMON, *TRAIN, "--opt", "adahessian", "--output-dir", tmp_path)


def test_a_moved_run_resumes(road: Road, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Where files lie is no setting of a run: neither its own folder nor the weights that it started from."""
    flags = [*PIAD, "--ema-decay", 0, "--epochs", 1]
    run("main.py", *flags, "--checkpoint", road.contracted, "--output-dir", tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "weights").mkdir()
    for name in ("contracted.safetensors", "contracted.json"):
        (tmp_path / "weights" / name).write_bytes((road.reparamed / name).read_bytes())
    capsys.readouterr()
    run("main.py", *flags, "--checkpoint", tmp_path / "weights", "--resume", "auto", "--output-dir", tmp_path / "there")
    assert "checkpoint_0.pth: epoch 1, step 0" in capsys.readouterr().out


def test_other_weights_to_start_from_are_another_run(road: Road, tmp_path: Path):
    flags = [*PIAD, "--ema-decay", 0, "--epochs", 1, "--output-dir", tmp_path]
    run("main.py", *flags, "--checkpoint", road.contracted)
    with pytest.raises(UserError, match="is of a run with stamp"):
        run("main.py", *flags, "--checkpoint", road.pretrained, "--resume", "auto")


def test_another_number_of_processes_is_said_or_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(main, "world", lambda: (0, 2))
    main.check_processes(4, Progress(epoch=3), 17)
    assert capsys.readouterr().out.startswith(
        "resuming with 2 processes instead of 4: an epoch has 17 steps from now on"
    )
    with pytest.raises(UserError, match="is of step 5 of an epoch of 4 processes, this run has 2: resume"):
        main.check_processes(4, Progress(epoch=3, step=5), 17)
    main.check_processes(2, Progress(epoch=3, step=5), 17)


def test_the_best_epoch_is_one_of_the_complete_table(road: Road):
    """While the table grows, the smallest network shrinks, and accuracies of its sizes cannot be compared."""
    lines = [json.loads(line) for line in (road.peelable / "log.txt").read_text().splitlines()]
    assert lines[0]["op_codes"] < lines[1]["op_codes"]
    state = load_checkpoint(road.super_network)
    assert (state["best_epoch"], state["best_sizes"]) == (1, lines[1]["op_codes"])


def test_averaged_weights_are_evaluated_beside_the_raw_ones(road: Road):
    lines = [json.loads(line) for line in (road.peelable / "log.txt").read_text().splitlines()]
    for name in ("top1", "top1_full", "loss_smallest"):
        assert {name, f"ema_{name}"} <= lines[-1].keys()
    state = load_checkpoint(road.super_network)
    assert state["best_score"] == max(lines[1]["top1"], lines[1]["ema_top1"])


def test_fine_tuning_writes_the_better_weights_and_says_which(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """With a learning rate that ruins the last steps, the average is better, and with one of 0 nothing is."""
    words = ["--stage", "finetune", *COMMON, *TRAIN, "--macs-ratio", 0.5, "--epochs", 2, "--ema-decay", 0.9]
    words += ["--checkpoint", road.super_network]
    for lr, kind in (("0", "raw"), ("1", "averaged")):
        run("main.py", *words, "--lr", lr, "--output-dir", tmp_path / kind)
        out = capsys.readouterr().out
        assert "top-1 of the raw weights" in out
        config = json.loads((tmp_path / kind / "config.json").read_text())
        written = f"written ({'averaged' if config['averaged_weights'] else 'raw'} weights)"
        raw, averaged = (float(part.split(" %")[0]) for part in out.split("weights ")[1:3])
        assert written in out and config["averaged_weights"] == (averaged > raw)
        assert config["accuracy"]["top1"] == pytest.approx(max(raw, averaged), abs=0.01)


def test_a_short_run_does_not_average_its_start(road: Road, tmp_path: Path):
    """timm's warm-up of the decay: after a few steps a decay of 0.9999 has not kept the weights of the start."""
    run("main.py", "--stage", "pretrain", *COMMON, *TRAIN, "--epochs", 1, "--warmup-epochs", 0, "--ema-decay", 0.9999,
        "--checkpoint", road.pretrained, "--output-dir", tmp_path)  # fmt: skip
    state, start = load_checkpoint(tmp_path / "checkpoint_0.pth"), road.weights(road.pretrained / "checkpoint_3.pth")
    key = "blocks.0.attn.qkv.weight"
    raw, averaged = ((state[name][key] - start[key]).norm() for name in ("model", "model_ema"))
    assert averaged > 0.2 * raw


@pytest.mark.parametrize("more", [{}, {"MASTER_ADDR": "localhost", "MASTER_PORT": "29517"}])
def test_a_plain_run_inside_a_slurm_allocation_is_one_process(monkeypatch: pytest.MonkeyPatch, more: dict[str, str]):
    for key, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", **more}.items():
        monkeypatch.setenv(key, value)
    args = argparse.Namespace(device="cpu")
    assert utils.init_processes(args) == torch.device("cpu")
    assert (args.rank, args.world_size, args.distributed) == (0, 1, False)
