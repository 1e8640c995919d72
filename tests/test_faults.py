"""Runs that are stopped or fail at any point lose nothing and resume to the same result: real processes and signals."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import FORK, EndedRun, Fault, StartedRun, differences, make_run, resume, run, scalars, torchrun
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from tiny import random_backbone, random_data

from engine import Run, evaluate
from files import CheckpointFolder, load_checkpoint
from logs import RunLog
from models.elastic import make_elastic
from piad.progressive import ProgressiveDropout
from training import Progress, Training

REFRESH = "piad.importance:dimension_importance"
LOSS = "timm.loss:SoftTargetCrossEntropy.forward"
AFTER_STEP = "engine:Run._after_step"
PROC_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Reference:
    """Runs without a fault: arguments and output folders, in one process (arguments, folder) and in two (pair)."""

    arguments: list[str]
    folder: Path
    pair_arguments: list[str]
    pair: Path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    arguments = make_run(folder)
    pair_arguments = [*arguments, "--batch-size", "24"]
    pair = StartedRun(folder / "pair", pair_arguments, processes=2)
    assert run(folder / "alone", arguments).codes == [0]
    assert pair.wait().codes == [0, 0]
    return Reference(arguments, folder / "alone", pair_arguments, folder / "pair")


def assert_resumes(folder: Path, reference: Reference, place: str | None, *faults: Fault, processes: int = 1) -> None:
    """Resumes a run and asserts that it starts at `place`, such as "epoch 1, step 2", and ends like the reference run.

    place: None for a fresh start.
    """
    arguments, expected = (
        (reference.arguments, reference.folder) if processes == 1 else (reference.pair_arguments, reference.pair)
    )
    ended = resume(folder, arguments, *faults, processes=processes)
    assert (set(ended.codes), ended.error) == ({0}, "")
    last = next(line for line in ended.out.splitlines() if not line.startswith("skipping"))
    assert last.endswith(f": {place}" if place else "to resume: a fresh start")
    found = differences(folder, expected)
    assert found == [], "\n".join(found)


def test_the_reference_run_logs_every_step_once(reference: Reference):
    """And draws new random numbers at each step."""
    for folder in (reference.folder, reference.pair):
        steps = {tag: [step for step, _ in values] for tag, values in scalars(folder).items()}
        assert steps["loss"] == steps["op_code"] == list(range(15))
        assert steps["train_loss"] == steps["top1_full"] == [4, 9, 14]
        assert [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()] == [0, 1, 2]
        assert len({value for _, value in scalars(folder)["loss"]}) == 15
    sizes = [
        len(load_checkpoint(reference.folder / f"checkpoint_{epoch}.pth")["mask_table"]["0.mlp"]) for epoch in (1, 2)
    ]
    assert sizes[0] == sizes[1] > 10
    assert differences(reference.folder, reference.pair) != []


# ---------------------------------------------------------------------------------------------------------------------
# Killed


@dataclass(frozen=True)
class Kill:
    """Where a run is killed or stopped, and the place where it has to resume (None: there is no checkpoint yet)."""

    name: str
    fault: Fault
    place: str | None


KILLS = [
    Kill("in the first importance refresh", Fault(REFRESH), None),
    Kill("inside a step", Fault(LOSS, 9), "epoch 1, step 2"),
    Kill("between backward and step", Fault("torch.optim:AdamW.step", 10), "epoch 1, step 4"),
    Kill("between step and averaged weights", Fault("timm.utils:ModelEmaV3.update", 4), "epoch 0, step 2"),
    Kill("while a checkpoint is written", Fault("torch:save", 5, "truncate"), "epoch 1, step 2"),
    Kill("between checkpoint and its place", Fault("files:sync_folder", 4), "epoch 0, step 4"),
    Kill("between checkpoint and table", Fault("piad.mask_table:MaskTable.save", 4), "epoch 1, step 2"),
    Kill("between checkpoint and deletion", Fault("files:CheckpointFolder.epochs", 7), "epoch 2, step 2"),
    Kill("during the importance refresh", Fault(REFRESH, 2), "epoch 1, step 0"),
    Kill("at an epoch's end, evaluating", Fault("engine:evaluate", 6), "epoch 1, step 4"),
    Kill("at an epoch's end, logged and not saved", Fault("logs:RunLog.flush", 6), "epoch 1, step 4"),
]


@pytest.mark.parametrize("kill", KILLS, ids=[kill.name for kill in KILLS])
def test_a_killed_run_resumes_to_the_same_result(kill: Kill, reference: Reference, tmp_path: Path):
    folder = tmp_path / "run"
    assert run(folder, reference.arguments, kill.fault).code == -signal.SIGKILL
    # A run that resumes within epoch 1 or later must not compute importance again: this fault would kill it.
    unreached = [Fault(REFRESH)] if kill.place and kill.place > "epoch 1, step 0" else []
    assert_resumes(folder, reference, kill.place, *unreached)


@pytest.mark.parametrize(("damaged", "place"), [(1, "epoch 2, step 0"), (3, None)])
def test_truncated_checkpoints_are_skipped(damaged: int, place: str | None, reference: Reference, tmp_path: Path):
    """As after a power cut: the newest checkpoints, the log and the TensorBoard events are all truncated."""
    folder = tmp_path / "run"
    shutil.copytree(reference.folder, folder)
    newest_first = sorted(folder.glob("checkpoint_*.pth"), reverse=True)  # with the best one, which may be older
    for path in newest_first[:damaged]:
        os.truncate(path, path.stat().st_size - 1000)
    (events,) = (folder / "tensorboard").iterdir()
    for path in (folder / "log.txt", events):
        os.truncate(path, path.stat().st_size - 10)
    assert_resumes(folder, reference, place)


# ---------------------------------------------------------------------------------------------------------------------
# Stopped by a signal


STOPS = [
    Kill("SIGTERM inside a step", Fault(LOSS, 9, "signal", "SIGTERM"), "epoch 1, step 4"),
    Kill("SIGUSR1 inside a step", Fault(LOSS, 8, "signal", "SIGUSR1"), "epoch 1, step 3"),
    Kill("SIGTERM in the first importance refresh", Fault(REFRESH, 1, "signal", "SIGTERM"), "epoch 0, step 0"),
    Kill("SIGTERM during the importance refresh", Fault(REFRESH, 2, "signal", "SIGTERM"), "epoch 1, step 0"),
    Kill("SIGUSR1 while a checkpoint is written", Fault("torch:save", 5, "signal", "SIGUSR1"), "epoch 1, step 4"),
    Kill("SIGTERM at an epoch's end, evaluating", Fault("engine:evaluate", 5, "signal", "SIGTERM"), "epoch 1, step 5"),
]


@pytest.mark.parametrize("stop", STOPS, ids=[stop.name for stop in STOPS])
def test_a_run_stopped_by_a_signal_saves_and_says_how_to_resume(stop: Kill, reference: Reference, tmp_path: Path):
    folder = tmp_path / "run"
    ended = run(folder, reference.arguments, stop.fault)
    assert (ended.code, ended.error) == (0, "")
    assert ended.seconds < 30
    assert ended.out.splitlines()[-1] == (
        f"main.py: stopped by {stop.fault.value} at {stop.place}, saved; the same command with --resume auto goes on"
    )
    assert_resumes(folder, reference, stop.place)


def test_a_run_is_stopped_by_a_signal_from_another_process(reference: Reference, tmp_path: Path):
    started = StartedRun(tmp_path / "run", reference.arguments)
    while not (tmp_path / "run" / "checkpoint_0.pth").exists():
        assert started.alive()
        time.sleep(0.01)
    started.kill(number=signal.SIGTERM)
    ended = started.wait(30)
    assert (ended.code, ended.error) == (0, "")
    place = re.search(r"stopped by SIGTERM at (.*), saved", ended.out)[1]
    assert_resumes(tmp_path / "run", reference, place)


def test_a_signal_to_one_rank_stops_all_ranks(reference: Reference, tmp_path: Path):
    fault = Fault(LOSS, 9, "signal", "SIGUSR1", rank=1)
    ended = run(tmp_path / "run", reference.pair_arguments, fault, processes=2)
    assert (ended.codes, ended.error) == ([0, 0], "")
    assert "stopped by a signal to another rank at epoch 1, step 5, saved" in ended.out
    assert_resumes(tmp_path / "run", reference, "epoch 1, step 5", processes=2)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def test_torchrun_restarts_a_killed_rank_to_the_same_result(reference: Reference, tmp_path: Path):
    done = torchrun(tmp_path / "run", reference.pair_arguments, Fault("torch.optim:AdamW.step", 8, rank=1))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    first, second, *_ = (line for line in done.stdout.splitlines() if "resum" in line)
    assert first.endswith("to resume: a fresh start") and second.endswith(": epoch 1, step 2")
    assert differences(tmp_path / "run", reference.pair) == []


@pytest.mark.parametrize(("what", "named"), [("perturb", "the weights"), ("cut table", "the mask tables")])
def test_a_rank_that_differs_is_named(what: str, named: str, reference: Reference, tmp_path: Path):
    """At the end of the epoch in which it first differs."""
    fault = Fault(AFTER_STEP, 7, what, 1e-6, rank=1)
    ended = run(tmp_path / "run", reference.pair_arguments, fault, processes=2)
    assert f"{named} of rank 1 differ from those of rank 0: the run stops" in ended.error_line()
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 1
    assert load_checkpoint(tmp_path / "run" / "checkpoint_0.pth")["epoch"] == 1


def test_an_error_on_all_ranks_is_reported_once(reference: Reference, tmp_path: Path):
    ended = run(tmp_path / "run", reference.pair_arguments, Fault(LOSS, 8, "multiply", float("nan")), processes=2)
    assert "loss is nan at epoch 1, step 2" in ended.error_line()


def assert_rank_0_ends_too(ended: EndedRun) -> None:
    """Rank 0 either reports why it stops, or is terminated before it can."""
    line = "main.py: error: rank 0 stops because another rank has ended, whose message says why\n"
    # SIGTERM may also come between the message and the end of its line.
    assert (ended.codes[0], ended.errors[0].rstrip()) in [
        (2, line.rstrip()),
        (-signal.SIGTERM, line.rstrip()),
        (-signal.SIGTERM, ""),
    ]


def test_a_user_error_on_one_rank_ends_all_ranks(reference: Reference, tmp_path: Path):
    ended = run(tmp_path / "run", reference.pair_arguments, Fault(LOSS, 8, "raise", "UserError", rank=1), processes=2)
    assert ended.codes[1] == 2
    assert ended.errors[1] == "main.py: error: this went wrong\n"
    assert_rank_0_ends_too(ended)
    assert ended.seconds < 60
    assert_resumes(tmp_path / "run", reference, "epoch 1, step 2", processes=2)


def test_an_unexpected_error_on_one_rank_ends_all_ranks(reference: Reference, tmp_path: Path):
    """Only its traceback is shown: those of the other ranks, which fail because of it, would hide it."""
    ended = run(tmp_path / "run", reference.pair_arguments, Fault(LOSS, 8, "raise", "ValueError", rank=1), processes=2)
    assert ended.codes[1] == 1
    assert ended.errors[1].count("Traceback") == ended.errors[1].count("ValueError: this went wrong") == 1
    assert_rank_0_ends_too(ended)
    assert ended.seconds < 60


# ---------------------------------------------------------------------------------------------------------------------
# Values that are not finite


def test_a_nan_loss_stops_the_run(reference: Reference, tmp_path: Path):
    ended = run(tmp_path / "run", reference.arguments, Fault(LOSS, 8, "multiply", float("nan")))
    op_code = int(dict(scalars(reference.folder)["op_code"])[7])
    lr = dict(scalars(reference.folder)["lr"])[9]
    assert f"loss is nan at epoch 1, step 2, op code {op_code}, learning rate {lr:.3g}: " in ended.error_line()
    assert_resumes(tmp_path / "run", reference, "epoch 1, step 2")


def test_steps_skipped_in_float16_are_counted_across_resuming(reference: Reference, tmp_path: Path):
    """The losses of the third and the sixth step are so large that gradients overflow."""
    arguments = [*reference.arguments, "--amp", "float16"]
    overflows = [Fault(LOSS, call, "multiply", 1e34) for call in (3, 6)]
    assert run(tmp_path / "whole", arguments, *overflows).code == 0
    lines = (tmp_path / "whole" / "log.txt").read_text().splitlines()
    assert [json.loads(line)["skipped_steps"] for line in lines] == [1, 2, 2]
    assert run(tmp_path / "run", arguments, *overflows, Fault(LOSS, 9)).code == -signal.SIGKILL
    assert resume(tmp_path / "run", arguments).code == 0
    assert differences(tmp_path / "run", tmp_path / "whole") == []


# ---------------------------------------------------------------------------------------------------------------------
# Output that cannot be written


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB, which has room for the whole run and is filled quickly."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no permission to mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def assert_names_the_file_not_written(ended: EndedRun, folder: Path, name: str, epochs: list[int]) -> None:
    """One line of error and exit code 2; earlier checkpoints can be loaded, and no temporary file is left.

    name: The file that the error names, or several alternatives separated by "|".
    epochs: Epochs whose checkpoints exist.
    """
    line = ended.error_line()
    assert any(f"cannot write {one.format(folder)}: " in line for one in name.split("|")), line
    assert sorted(path.name for path in folder.glob("*.pth")) == [f"checkpoint_{epoch}.pth" for epoch in epochs]
    for path in folder.glob("*.pth"):
        load_checkpoint(path)
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("at", "call", "name", "epochs", "place"),
    [
        ("logs:RunLog.__init__", 1, "to the output folder", [], None),
        ("torch:save", 4, "{}/checkpoint_1.pth", [0], "epoch 1, step 0"),
        ("piad.mask_table:MaskTable.save", 4, "{}/mask_table.json", [0, 1], "epoch 1, step 2"),
        # TensorBoard writes in its own thread, which may fail first.
        ("logs:RunLog.epoch", 2, "{}/checkpoint_1.pth|to the output folder", [0, 1], "epoch 1, step 4"),
        (LOSS, 9, "{}/checkpoint_1.pth", [0, 1], "epoch 1, step 2"),
    ],
    ids=["at the start", "saving", "between checkpoint and table", "logging", "in a step"],
)
def test_a_full_disk(at, call, name, epochs, place, small_disk: Path, reference: Reference):
    folder = small_disk / "run"
    folder.mkdir()
    ended = run(folder, reference.arguments, Fault(at, call, "fill the disk", str(folder)))
    assert_names_the_file_not_written(ended, folder, name, epochs)
    (folder / "ballast").unlink()
    assert_resumes(folder, reference, place)


def test_a_quota(reference: Reference, tmp_path: Path):
    folder = tmp_path / "run"
    ended = run(folder, reference.arguments, Fault("torch:save", 4, "limit file size", 200_000))
    assert_names_the_file_not_written(ended, folder, "{}/checkpoint_1.pth", [0])
    assert_resumes(folder, reference, "epoch 1, step 0")


@pytest.mark.parametrize(
    ("at", "call", "name", "epochs", "place"),
    [
        ("files:CheckpointFolder.to_resume", 1, "{}/.lock", [], None),
        ("files:CheckpointFolder.save", 4, "{}/checkpoint_1.pth", [0], "epoch 1, step 0"),
        ("logs:RunLog.epoch", 2, "{}/log.txt", [0, 1], "epoch 1, step 4"),
    ],
    ids=["at the start", "saving", "logging"],
)
def test_no_permission(at, call, name, epochs, place, reference: Reference, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    ended = run(folder, reference.arguments, Fault(at, call, "take permission", str(folder)))
    folder.chmod(0o755)
    assert_names_the_file_not_written(ended, folder, name, epochs)
    assert_resumes(folder, reference, place)


# ---------------------------------------------------------------------------------------------------------------------
# Long runs


def test_a_data_loading_process_that_is_killed_ends_the_run(reference: Reference, tmp_path: Path):
    folder = tmp_path / "run"
    fault = Fault("timm.data:Mixup.__call__", 3, "kill workers")
    ended = run(folder, [*reference.arguments, "--workers", "1"], fault)
    assert "a data loading process died" in ended.error_line()
    assert ended.seconds < 60
    assert_resumes(folder, reference, "epoch 0, step 2")


class SameBatch:
    """A loader that gives the same batch 25 times per epoch, so that memory cannot grow because of the data."""

    steps = 25

    def batches(self, epoch: int, start_step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [random_data(8, dtype=torch.float32)] * (self.steps - start_step)


class Watched(Run):
    """A run that records bytes of memory, open files and Python objects after each step, in self.held."""

    def _after_step(self, step: int, scalars: dict[str, float]) -> None:
        super()._after_step(step, scalars)
        gc.collect()
        if self.training.device.type == "cuda":
            memory = torch.cuda.memory_allocated() / 1024
        else:
            memory = re.search(r"RssAnon:\s+(\d+) kB", PROC_STATUS.read_text())[1]
        self.held[self.progress.epoch, step] = (
            float(memory) * 1024,
            len(list(Path("/proc/self/fd").iterdir())),
            len(gc.get_objects()),
        )


def train_for_long(folder: Path, epochs: int, device: torch.device, results: Connection) -> None:
    """Trains a tiny model with PIAD, with evaluation, logs and checkpoints, and sends what it held at each step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = make_elastic(random_backbone(dtype=torch.float32)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    training = Training(model, optimizer, torch.nn.CrossEntropyLoss(), device, 0, ema=ModelEmaV3(model))
    loader, log, files = SameBatch(), RunLog(folder, 0, 0), CheckpointFolder(folder, {})
    piad = ProgressiveDropout(model, loader.batches(0, 24), ratio=0.8, epochs=2, seed=0, table=None)
    scheduler = CosineLRScheduler(optimizer, epochs)
    evaluation = partial(evaluate, model, loader.batches(0, 24), device)
    run = Watched(training, loader, files, log, scheduler, Progress(), evaluation, piad, checkpoint_steps=10)
    run.held = np.zeros((epochs, loader.steps, 3))
    gc.freeze()  # so that gc.collect() and gc.get_objects() skip the objects that exist already
    run.fit(epochs)
    results.send(run.held)


@pytest.mark.skipif(not PROC_STATUS.exists(), reason="needs /proc of Linux")
@pytest.mark.parametrize(
    ("device", "largest_slope"),
    [
        # The allocator still grows a little. A tensor leaked per step would be one page at least, and one object.
        ("cpu", 4096),
        # On CUDA it would be 512 bytes at least.
        pytest.param("cuda", 512, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")),
    ],
)
def test_memory_does_not_grow_over_500_steps(device: str, largest_slope: int, tmp_path: Path):
    """The first 100 steps are ignored: the table grows in them, and other things are allocated once."""
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=train_for_long, args=(tmp_path, 20, torch.device(device), send))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    memory, files, objects = np.moveaxis(receive.recv()[4:], -1, 0)
    assert memory.size == 400
    slope, _ = np.polyfit(range(memory.size), memory.ravel(), 1)
    assert slope < largest_slope, f"{slope:.0f} bytes per step"
    assert np.ptp(objects) < 20
    # TensorBoard's thread opens its file for each write.
    assert (files.min(axis=1) == files.min()).all() and files.max() <= files.min() + 1
