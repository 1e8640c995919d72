"""Stopping a run from outside: signals to process groups, torchrun and scripts; one run per folder; Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from programs import ROOT

from files import LOCK, load_checkpoint, only_run_in
from utils import UserError

TINY = "--model vit_tiny_patch16_224 --model-kwargs img_size=8 patch_size=2 in_chans=1 embed_dim=16 depth=2 num_heads=2"
RUN = [*TINY.split(), "--stage", "pretrain", "--data-set", "digits", "--device", "cpu", "--aa", "none", "--epochs",
       "500", "--warmup-epochs", "0", "--batch-size", "16", "--ema-decay", "0", "--eval-every", "500"]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(command: Sequence[object], output: Path, **more: str) -> subprocess.Popen:
    """A training in a session of its own, once its first checkpoint is there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    end = time.monotonic() + 100
    while not list(output.glob("**/checkpoint_0.pth")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    time.sleep(0.3)
    return process


def trainings_in(folder: Path) -> list[str]:
    """The processes that train into a folder."""
    lines = subprocess.run(["ps", "-e", "-o", "pid=,args="], capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if str(folder) in line and "main.py" in line]


def assert_saved(process: subprocess.Popen, output: Path, code: int | None = 0) -> None:
    """It saved, said so, ended with the code and left no process."""
    out, err = process.communicate(timeout=90)
    assert "saved; the same command with --resume auto" in out, (out, err)
    assert code is None or process.returncode == code
    time.sleep(0.2)
    assert trainings_in(output) == []
    newest = max(output.glob("**/checkpoint_*.pth"), key=lambda path: int(path.stem.split("_")[1]))
    load_checkpoint(newest)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_the_process_group(name: str, workers: int, tmp_path: Path):
    """As scancel, timeout and a terminal send it: data loading processes get it, too, and ignore it."""
    process = start([sys.executable, "main.py", *RUN, "--workers", workers, "--output-dir", tmp_path], tmp_path)
    os.killpg(process.pid, signal.Signals[name])
    assert_saved(process, tmp_path)


def test_a_signal_to_torchrun(tmp_path: Path):
    """torchrun passes it on to its ranks, which save; its own exit code is not 0, since it was stopped."""
    command = [sys.executable, *TORCHRUN, "main.py", *RUN, "--workers", 1, "--output-dir", tmp_path]
    process = start(command, tmp_path)
    process.terminate()
    assert_saved(process, tmp_path, code=1)


@pytest.mark.parametrize("script", ["run_pretrain.sh", "run_reparam.sh"])
def test_a_signal_to_a_script(script: str, tmp_path: Path):
    """docker stop, or a supervisor: the script that trains, and one that runs it first and must not go on then."""
    more = {"PYTHON": sys.executable, "OUTPUT": str(tmp_path), "EPOCHS": "500", "DEVICE": "cpu", "BATCH_SIZE": "16",
            "EVAL_EVERY": "500", "EXTRA": "--workers 1"}  # fmt: skip
    process = start(["sh", script], tmp_path, **more)
    process.terminate()
    assert_saved(process, tmp_path)
    assert not (tmp_path / "reparamed").exists()


def test_ctrl_c_saves_the_first_time_and_stops_at_once_the_second(tmp_path: Path):
    process = start([sys.executable, "main.py", *RUN, "--workers", 1, "--output-dir", tmp_path], tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    assert_saved(process, tmp_path)
    code = "import os, signal, utils\n" \
           "def main():\n with utils.stop_signals():\n  for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n" \
           "utils.run_program(main)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "-c: stopped by Ctrl-C\n")


def test_a_second_run_in_a_folder_is_refused_as_long_as_the_first_lives(tmp_path: Path):
    code = (
        "import pathlib, sys, files\nwith files.only_run_in(pathlib.Path(sys.argv[1])):\n print(flush=True)\n input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        first.stdout.readline()
        said = f"is in use by another run .process {first.pid} on .*: wait for it, or stop it"
        with pytest.raises(UserError, match=said), only_run_in(tmp_path):
            pass
        first.kill()
    with only_run_in(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / LOCK).exists()


def test_a_second_training_touches_nothing(tmp_path: Path):
    process = start([sys.executable, "main.py", *RUN, "--workers", 0, "--output-dir", tmp_path], tmp_path)
    command = [sys.executable, "main.py", *RUN, "--workers", "0", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and f"in use by another run (process {process.pid}" in done.stderr
    process.terminate()
    assert_saved(process, tmp_path)
