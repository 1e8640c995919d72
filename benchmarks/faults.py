"""Kills and stops runs, or fills their disk, at random times, and checks that nothing is lost.

    python -m benchmarks.faults                  80 faults, about ten minutes on two cores
    python -m benchmarks.faults --faults 9       fewer faults
    python -m benchmarks.faults --seconds 60     no new fault after a minute

Each fault happens to its own run: PIAD on digits for three epochs, with all random augmentations. The run is then
resumed with the same command, some runs after a second fault. Its weights, averaged weights, optimizer state, mask
table, log, and TensorBoard scalars and pictures (except speed and memory) are compared bit for bit with those of a
reference run without faults. Runs are stopped by a SIGTERM to their process group, to torchrun, or to a script that
runs them, with two data loading processes each; they have to save. The exit code is 1 if a run did not survive,
differs, or lost a byte. The full disk is a mounted tmpfs; without the permission to mount one, it is a limit on the
file size.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common import ROOT, describe_machine, positive

sys.path.insert(0, str(ROOT / "tests"))
from faults import ONE_THREAD, Fault, StartedRun, differences, make_run, resume, run, torchrun

from files import load_checkpoint
from utils import UserError

# Functions in which the disk becomes full -> how often a run calls them.
WRITES = {"logs:RunLog.__init__": 1, "torch:save": 9, "piad.mask_table:MaskTable.save": 9, "logs:RunLog.epoch": 3}


@dataclass
class Row:
    """The result of one run: its faults, and what happened. bytes_lost: size of the checkpoints that cannot be read."""

    kind: str
    processes: int
    faults: list[str]
    survived: bool = False
    bytes_lost: int = 0
    differs: list[str] | None = None
    error: str = ""
    seconds: float = 0.0

    def in_words(self) -> str:
        """One line for the terminal."""
        ended = "differs" if self.differs else "equal" if self.survived else "did not survive"
        faults = ", ".join(self.faults) or "ended before the fault"
        return f"{self.kind}, {self.processes} processes: {faults}: {ended}, {self.seconds:.0f} s"


@dataclass
class Reference:
    """A run without faults that other runs are compared with."""

    processes: int
    arguments: list[str]
    folder: Path
    seconds: float


class FaultBenchmark:
    """Runs with faults in a folder. disk: mount point of a small file system, None if it could not be mounted."""

    def __init__(self, folder: Path, disk: Path | None, seed: int):
        self.folder, self.disk, self.random = folder, disk, random.Random(seed)
        arguments = make_run(folder)
        run(folder / "first", arguments)  # not timed, since it also starts the server that forks the other runs
        self.reference = {
            1: self._run_reference(1, arguments),
            2: self._run_reference(2, [*arguments, "--batch-size", "24"]),
        }

    def _run_reference(self, processes: int, arguments: list[str]) -> Reference:
        folder = self.folder / f"reference_{processes}"
        ended = run(folder, arguments, processes=processes)
        if any(ended.codes):
            raise RuntimeError(f"the reference run failed: {ended.error}")
        return Reference(processes, arguments, folder, ended.seconds)

    # Kinds of faults. Each starts a run in the folder, disturbs it, resumes it, and describes the faults in the row.

    def kill(self, row: Row, folder: Path) -> None:
        """Kills all processes at once, as when a machine fails; in a third of the runs once more after resuming."""
        arguments = self.reference[row.processes].arguments
        for number in range(1 + (self.random.random() < 1 / 3)):
            delay = self.random.uniform(0.1, 0.9 * self.reference[row.processes].seconds) / (1 + number)
            started = StartedRun(folder, [*arguments, "--resume", "auto"], processes=row.processes)
            time.sleep(delay)
            if started.alive():  # otherwise the run was faster than the reference run
                row.faults.append(f"killed after {delay:.2f} s")
            for rank in range(row.processes):
                started.kill(rank)
            started.wait()
            row.bytes_lost += lost_bytes(folder)
        self.resume_run(row, folder)

    def kill_rank(self, row: Row, folder: Path) -> None:
        """Kills one process of several: the others have to end too, before the run is resumed."""
        delay = self.random.uniform(0.1, 0.9 * self.reference[row.processes].seconds)
        rank = self.random.randrange(row.processes)
        started = StartedRun(folder, self.reference[row.processes].arguments, processes=row.processes)
        time.sleep(delay)
        if started.alive():
            row.faults.append(f"rank {rank} killed after {delay:.2f} s")
        started.kill(rank)
        started.wait()
        row.bytes_lost += lost_bytes(folder)
        self.resume_run(row, folder)

    def restart_rank(self, row: Row, folder: Path) -> None:
        """Kills one process of several under torchrun, which restarts them."""
        step, rank = self.random.randint(1, 15), self.random.randrange(row.processes)
        row.faults.append(f"rank {rank} killed in step {step}, restarted by torchrun")
        fault = Fault("engine:_update", step, rank=rank)
        done = torchrun(folder, self.reference[row.processes].arguments, fault, processes=row.processes)
        row.survived, row.error = done.returncode == 0, done.stderr if done.returncode else ""

    def full_disk(self, row: Row, folder: Path) -> None:
        """Fills the disk before one of the writes: the run has to end with one line of error and exit code 2."""
        at = self.random.choice(list(WRITES))
        call = self.random.randint(1, WRITES[at])
        if self.disk:
            folder = self.disk / folder.name
            folder.mkdir()
            fault = Fault(at, call, "fill the disk", str(folder))
        else:
            fault = Fault("torch:save", call, "limit file size", self.random.randrange(1_000_000))
        row.faults.append(f"{fault.what} at call {call} of {fault.at}")
        ended = run(folder, self.reference[1].arguments, fault)
        row.bytes_lost += lost_bytes(folder)
        (folder / "ballast").unlink(missing_ok=True)
        if ended.code == 2 and len(ended.error.splitlines()) == 1:
            self.resume_run(row, folder)
        else:
            row.error = f"exit code {ended.code}, {ended.error}"

    def stop_group(self, row: Row, folder: Path) -> None:
        """Sends SIGTERM to the process group of a run."""
        self._stop(row, folder, [sys.executable, "main.py"], code=0, group=True)

    def stop_torchrun(self, row: Row, folder: Path) -> None:
        """Sends SIGTERM to torchrun, which passes it on to its processes and then ends with exit code 1."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(row.processes), "main.py"]
        self._stop(row, folder, [sys.executable, *launcher], code=1)

    def stop_script(self, row: Row, folder: Path) -> None:
        """Sends SIGTERM to a script that runs another script, as run_reparam.sh runs run_pretrain.sh."""
        scripts = folder.with_suffix(".scripts")
        scripts.mkdir()
        shutil.copy(ROOT / "common.sh", scripts)
        arguments = self._arguments(row, folder)
        command = shlex.join([sys.executable, "main.py", *arguments])
        (scripts / "inner.sh").write_text(f"cd {shlex.quote(str(ROOT))}\nexec {command}\n")
        (scripts / "outer.sh").write_text('here=$(dirname "$0")\n. "$here/common.sh"\nrun_script inner.sh\n')
        self._stop(row, folder, ["sh", str(scripts / "outer.sh")], code=0, arguments=[])
        shutil.rmtree(scripts)

    def _arguments(self, row: Row, folder: Path) -> list[str]:
        reference = self.reference[row.processes]
        return [*reference.arguments, "--workers", "2", "--output-dir", str(folder)]

    def _stop(
        self,
        row: Row,
        folder: Path,
        command: list[str],
        code: int,
        group: bool = False,
        arguments: list[str] | None = None,
    ) -> None:
        """Starts a run, sends SIGTERM after a random time, and resumes it. code: its exit code when it was stopped."""
        arguments = self._arguments(row, folder) if arguments is None else arguments
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=os.environ | ONE_THREAD,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while process.poll() is None and not (folder / "tensorboard").exists():
            time.sleep(0.02)
        delay = self.random.uniform(0.2, 1.2 * self.reference[row.processes].seconds)
        time.sleep(delay)
        if process.poll() is None:
            row.faults.append(f"SIGTERM {delay:.2f} s after the start")
            os.killpg(process.pid, signal.SIGTERM) if group else process.terminate()
        out, error = process.communicate(timeout=120)
        row.bytes_lost += lost_bytes(folder)
        last = folder / "checkpoint_2.pth"
        finished = last.exists() and load_checkpoint(last)["epoch"] == 3  # the signal came after the last step
        if row.faults and not finished and (process.returncode != code or "saved; the same command" not in out):
            row.error = f"exit code {process.returncode}, not saved: {error}"
        else:
            self.resume_run(row, folder)

    def resume_run(self, row: Row, folder: Path) -> None:
        """Resumes the run without a fault."""
        ended = resume(folder, self.reference[row.processes].arguments, processes=row.processes)
        row.survived = not any(ended.codes)
        row.error = "" if row.survived else ended.error

    def run_fault(self, number: int) -> Row:
        """Runs the fault with this number; the kinds of faults alternate."""
        kinds: list[tuple[Callable[[Row, Path], None], int]] = [
            (self.kill, 1),
            (self.kill, 2),
            (self.full_disk, 1),
            (self.kill_rank, 2),
            (self.kill, 1),
            (self.restart_rank, 2),
            (self.stop_group, 1),
            (self.stop_torchrun, 2),
            (self.stop_script, 1),
        ]
        inject, processes = kinds[number % len(kinds)]
        row, folder, start = Row(inject.__name__, processes, []), self.folder / str(number), time.monotonic()
        try:
            inject(row, folder)
            folder = folder if folder.exists() else self.disk / folder.name
            if row.survived:
                row.differs = differences(folder, self.reference[processes].folder)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            row.survived, row.error = False, f"did not end: {error}"
        row.bytes_lost += lost_bytes(folder)
        shutil.rmtree(folder)
        row.seconds = time.monotonic() - start
        return row


def lost_bytes(folder: Path) -> int:
    """Total size of the checkpoints in the folder that cannot be read."""
    lost = 0
    for path in folder.glob("checkpoint_*.pth"):
        try:
            load_checkpoint(path)
        except UserError:
            lost += path.stat().st_size
    return lost


def summary(rows: list[Row]) -> dict[str, int]:
    return {
        "faults": sum(len(row.faults) for row in rows),
        "runs": len(rows),
        "survived": sum(row.survived for row in rows),
        "bytes_lost": sum(row.bytes_lost for row in rows),
        "runs_that_differ": sum(bool(row.differs) for row in rows),
    }


def show(kind: str, numbers: dict[str, int]) -> None:
    print(kind.ljust(28), *(str(value).rjust(len(key) + 2) for key, value in numbers.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--faults", type=positive, default=80, metavar="N", help="minimum number of faults (default: 80)"
    )
    parser.add_argument(
        "--seconds", type=positive, metavar="S", help="start no new fault after S seconds (default: no limit)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the times and places of faults (default: 0)")
    args = parser.parse_args()
    start, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        try:
            bench = FaultBenchmark(Path(folder), disk if mounted else None, args.seed)
            while sum(len(row.faults) for row in rows) < args.faults:
                if args.seconds and time.monotonic() - start > args.seconds:
                    break
                rows.append(bench.run_fault(len(rows)))
                print(f"{len(rows)}: {rows[-1].in_words()}", flush=True)
        finally:
            if mounted:
                subprocess.run(["umount", str(disk)], check=True)
    total = summary(rows)
    print()
    print(" " * 28, *(key.rjust(len(key) + 2) for key in total))
    for kind in sorted({(row.kind, row.processes) for row in rows}):
        show(f"{kind[0]}, {kind[1]} processes", summary([row for row in rows if (row.kind, row.processes) == kind]))
    show("all", total)
    print()
    machine = describe_machine(torch.device("cpu"), threads=1)
    bad = [asdict(row) for row in rows if not row.survived or row.differs or row.bytes_lost]
    settings = {"faults": args.faults, "seed": args.seed, "small_disk": "tmpfs" if mounted else "quota", **ONE_THREAD}
    print(json.dumps({"machine": machine, "settings": settings, **total, "bad": bad}))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
