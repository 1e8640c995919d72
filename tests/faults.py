"""Fault injection: runs main.py in real processes, lets a fault happen at an exact place, and compares output folders.

torchrun starts this file as a script: faults.py <faults as JSON> <arguments of main.py>.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

# A server process that has imported the packages that are slow to import, and forks one process per run and rank.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    [
        "torch.distributed",
        "torch.utils.tensorboard",
        "matplotlib.pyplot",
        "timm",
        "sklearn.datasets",
        "sklearn.model_selection",
        "hypothesis",
    ]
)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SECONDS = 60  # limit for every run


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@dataclass(frozen=True)
class Fault:
    """Something that happens when a function is called. Under torchrun it does not happen again after a restart.

    at: The function, as "module:name.name".
    call: Number of the call, counted from 1 in each process.
    what: What happens, a key of BEFORE or AFTER.
    value: Argument of `what`.
    rank: Rank on which it happens, None for all ranks.
    """

    at: str
    call: int = 1
    what: str = "kill"
    value: Any = None
    rank: int | None = None


def kill_self(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def signal_self(name: str, *_: Any) -> None:
    os.kill(os.getpid(), signal.Signals[name])


def raise_error(name: str, *_: Any) -> None:
    from utils import UserError

    raise {"UserError": UserError, "ValueError": ValueError}[name]("this went wrong")


def fill_disk(folder: str, *_: Any) -> None:
    """Fills the file system of the folder to the last byte."""
    block = 2**16
    with contextlib.suppress(OSError), (Path(folder) / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(block)) == block:
            pass
        file.write(b"0")


def limit_file_size(size: int, *_: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def take_permission(folder: str, *_: Any) -> None:
    """Forbids new files in the folder. Root gives up its privileges, since permissions do not apply to it."""
    Path(folder).chmod(0o555)
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)


def kill_workers(*_: Any) -> None:
    children = multiprocessing.active_children()
    assert children, "there are no data loading processes to kill"
    for child in children:
        os.kill(child.pid, signal.SIGKILL)


def perturb_weights(size: float, run: Any, *_: Any) -> None:
    """Changes one number of the weights of an engine.Run."""
    import torch

    with torch.no_grad():
        next(run.training.model.parameters()).view(-1)[0] += size


def cut_table(_value: Any, run: Any, *_: Any) -> None:
    """Removes the last op code from the mask table of an engine.Run."""
    run.regime.table.rows.pop()


def truncate_and_kill(_value: Any, _result: None, _state: Any, path: Path) -> None:
    """After torch.save(): as if the process had been killed while writing."""
    os.truncate(path, path.stat().st_size // 2)
    kill_self()


# Called before the function, with the value and the arguments of the function.
BEFORE: dict[str, Callable[..., None]] = {
    "kill": kill_self,
    "signal": signal_self,
    "raise": raise_error,
    "fill the disk": fill_disk,
    "limit file size": limit_file_size,
    "take permission": take_permission,
    "kill workers": kill_workers,
    "perturb": perturb_weights,
    "cut table": cut_table,
}
# Called after the function, with the value, the result and the arguments of the function; returns the new result.
AFTER: dict[str, Callable[..., Any]] = {
    "truncate": truncate_and_kill,
    "multiply": lambda value, result, *_: result * value,
}


def install(fault: Fault) -> None:
    """Patches the function of the fault in this process."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if fault.rank is not None and fault.rank != int(os.environ.get("RANK", 0)):
        return
    module, _, names = fault.at.partition(":")
    owner = importlib.import_module(module)
    *path, name = names.split(".")
    for part in path:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.call and fault.what in BEFORE:
            BEFORE[fault.what](fault.value, *args)
        result = function(*args, **kwargs)
        return AFTER[fault.what](fault.value, result, *args) if calls == fault.call and fault.what in AFTER else result

    setattr(owner, name, faulty)


def run_main(faults: list[Fault], arguments: list[str]) -> None:
    """Runs main.py as a script, with the faults installed."""
    for fault in faults:
        install(fault)
    sys.argv = ["main.py", *arguments]
    runpy.run_path(str(ROOT / "main.py"), run_name="__main__")


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass
class EndedRun:
    """How a run ended, per rank: exit code (or minus the number of the signal that killed it), stdout and stderr."""

    codes: list[int]
    outs: list[str]
    errors: list[str]
    seconds: float

    @property
    def code(self) -> int:
        (code,) = self.codes
        return code

    @property
    def out(self) -> str:
        return self.outs[0]

    @property
    def error(self) -> str:
        return "".join(self.errors)

    def error_line(self, rank: int = 0) -> str:
        """The error message of a rank. Asserts exit code 2, and that no rank wrote anything else to stderr."""
        assert self.codes[rank] == 2, self
        assert [len(text.splitlines()) for text in self.errors] == [int(r == rank) for r in range(len(self.codes))], (
            self.error
        )
        assert self.errors[rank].startswith("main.py: error: "), self.error
        return self.errors[rank]


class StartedRun:
    """A running main.py in `processes` processes, with the environment variables that torchrun sets."""

    def __init__(self, folder: Path, arguments: list[str], faults: tuple[Fault, ...] = (), processes: int = 1):
        self.start, self.folder, self.output = time.monotonic(), folder, tempfile.TemporaryDirectory()
        arguments = [*map(str, arguments), "--output-dir", str(folder)]
        self.processes, port = [], str(_free_port())
        for rank in range(processes):
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            values = (str(rank), str(rank), str(processes), "127.0.0.1", port)
            environment = dict(zip(names, values, strict=True)) if processes > 1 else {}
            output = [f"{self.output.name}/{rank}.{end}" for end in ("out", "err")]
            process = FORK.Process(target=_child, args=(environment, output, list(faults), arguments))
            with mock.patch.dict(os.environ, ONE_THREAD):  # inherited by the server, which the first run starts
                process.start()
            self.processes.append(process)

    def kill(self, rank: int = 0, number: int = signal.SIGKILL) -> None:
        """Sends a signal to a rank, if it is still running."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid, number)

    def alive(self) -> bool:
        """Whether any rank is still running."""
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = SECONDS) -> EndedRun:
        """Waits until all processes have ended. If one fails, the others are terminated, as torchrun does.

        Kills the run and raises TimeoutError if it takes longer than `seconds`.
        """
        failed = False
        while self.alive() and time.monotonic() < self.start + seconds:
            if not failed and any(process.exitcode for process in self.processes):
                failed = True
                for process in self.processes:
                    process.terminate()
            connection.wait([process.sentinel for process in self.processes if process.is_alive()], 0.1)
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in late:
            self.kill(rank)
            self.processes[rank].join()
        ranks = range(len(self.processes))
        output = [[Path(self.output.name, f"{rank}.{end}").read_text() for rank in ranks] for end in ("out", "err")]
        self.output.cleanup()
        if late:
            raise TimeoutError(f"ranks {late} of {self.folder} did not end within {seconds} s: {output}")
        return EndedRun([process.exitcode for process in self.processes], *output, time.monotonic() - self.start)


def _child(environment: dict[str, str], output: list[str], faults: list[Fault], arguments: list[str]) -> None:
    os.environ.update(environment)
    for number, path in enumerate(output, 1):  # stdout and stderr
        with Path(path).open("wb") as file:
            os.dup2(file.fileno(), number)
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the default lock is shared by processes, and a killed process leaves it behind
    try:
        run_main(faults, arguments)
    finally:
        os.seteuid(os.getuid())  # after "take permission", since multiprocessing still has to clean up


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(folder: Path, arguments: list[str], *faults: Fault, processes: int = 1) -> EndedRun:
    """Runs main.py until it ends, by itself or by a fault."""
    return StartedRun(folder, arguments, faults, processes).wait()


def resume(folder: Path, arguments: list[str], *faults: Fault, processes: int = 1) -> EndedRun:
    """Runs main.py with --resume auto in the folder of an earlier run."""
    # TensorBoard orders its files by the second of their creation, which is the fourth part of their names.
    begun = [int(path.name.split(".")[3]) for path in (folder / "tensorboard").glob("events.out.tfevents.*")]
    time.sleep(max(0.0, max(begun, default=0) + 1 - time.time()))
    return run(folder, [*arguments, "--resume", "auto"], *faults, processes=processes)


def torchrun(folder: Path, arguments: list[str], *faults: Fault, processes: int = 2) -> subprocess.CompletedProcess:
    """Runs main.py under torchrun with --max-restarts 3 and --resume auto until it ends."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "3", "--nproc_per_node", processes]
    command = [sys.executable, *launcher, __file__, json.dumps([asdict(fault) for fault in faults]), *arguments]
    return subprocess.run(
        [*map(str, command), "--output-dir", str(folder), "--resume", "auto"],
        # Otherwise a restarted process finds stale addresses: https://github.com/pytorch/pytorch/issues/135712
        env=os.environ | ONE_THREAD | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=3 * SECONDS,
        check=False,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run that faults happen to


def make_run(folder: Path) -> list[str]:
    """Arguments of main.py for a PIAD run of three epochs of five steps, with all random augmentations switched on.

    Its data set (some of the digits as an image folder) and initial weights are written into `folder`. The dropout list
    grows in epochs 0 and 1. Checkpoints are saved after the second and fourth step and at the end of each epoch.
    """
    import torch
    from programs import MODEL, tiny_digits_model
    from safetensors.torch import save_file

    from datasets import Digits

    for split, number in {"train": 256, "val": 40}.items():
        images = Digits(split)
        for index in range(number):
            image, label = images[index]
            path = folder / "digits" / split / str(label) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    torch.manual_seed(0)
    save_file(tiny_digits_model().state_dict(), folder / "contracted.safetensors")
    data = ["--data-set", "folder", "--data-path", folder / "digits", "--workers", 0, "--batch-size", 50]
    augmentation = ["--aa", "rand-m5-inc1", "--reprob", 0.5, "--mixup", 0.8, "--cutmix", 1, "--drop-path", 0.2]
    piad = ["--stage", "piad", "--proxy-samples", 40, "--progressive-epochs", 2, "--checkpoint-steps", 2]
    training = ["--epochs", 3, "--lr", 1e-2, "--ema-decay", 0.9, "--device", "cpu"]
    arguments = [*MODEL, *data, *augmentation, *piad, *training, "--checkpoint", folder / "contracted.safetensors"]
    return [str(argument) for argument in arguments]


# ---------------------------------------------------------------------------------------------------------------------
# Comparing output folders


def scalars(folder: Path) -> dict[str, list[tuple[int, float | bytes | None]]]:
    """Every TensorBoard scalar and picture of a run: name -> [(step, value), ...], as TensorBoard reads them.

    Values under machine/ (speed and memory) are replaced by None, since they differ from run to run.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tb_logging

    tb_logging.get_logger().setLevel("ERROR")  # hides the warning that a resumed run repeats steps
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    found = {tag: [(s, None if tag.startswith("machine/") else v) for s, v in values] for tag, values in found.items()}
    pictures = {tag: events.Images(tag) for tag in events.Tags()["images"]}
    return found | {tag: [(p.step, p.encoded_image_string) for p in values] for tag, values in pictures.items()}


def differences(found: Path, expected: Path) -> list[str]:
    """The differences of two output folders, one line each. Tensors and texts are compared bit for bit."""
    return [line for check in (_names, _checkpoints, _texts, _scalars) for line in check(found, expected)]


def _names(found: Path, expected: Path) -> Iterator[str]:
    names = [{path.name for path in folder.iterdir()} for folder in (found, expected)]
    yield from (f"{name} is in one folder only" for name in sorted(names[0] ^ names[1]))


def _checkpoints(found: Path, expected: Path) -> Iterator[str]:
    from programs import assert_same

    from files import load_checkpoint

    for path in sorted(expected.glob("checkpoint_*.pth")):
        try:
            assert_same(load_checkpoint(found / path.name), load_checkpoint(path))
        except Exception as error:
            yield f"{path.name}: {type(error).__name__} {error}"


def _texts(found: Path, expected: Path) -> Iterator[str]:
    for name in ("mask_table.json", "log.txt"):
        texts = [(folder / name).read_text() if (folder / name).exists() else None for folder in (found, expected)]
        if texts[0] != texts[1]:
            yield f"{name}: {texts[0]!r} is not {texts[1]!r}"


def _scalars(found: Path, expected: Path) -> Iterator[str]:
    from files import shown

    values = [scalars(folder) for folder in (found, expected)]
    for tag in sorted(values[0].keys() | values[1].keys()):
        if values[0].get(tag) != values[1].get(tag):
            yield f"TensorBoard, {tag}: {shown(values[0].get(tag))} is not {shown(values[1].get(tag))}"


if __name__ == "__main__":
    run_main([Fault(**fault) for fault in json.loads(sys.argv[1])], sys.argv[2:])
