"""Hurting a run: main.py in real processes, what goes wrong at an exact place, and what must be the same afterwards.

As a script it is what torchrun starts: faults.py <the faults, as JSON> <main.py's arguments>.
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

# A fresh process that has imported what is slow to import, and forks one process a run.
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
SECONDS = 60  # what no run, hurt or not, may take


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


@dataclass(frozen=True)
class Fault:
    """At the `call`-th call of a function ("module:name.name"), counted from 1 in each process, `what` happens.

    what: a key of BEFORE or AFTER; value: its argument; rank: where, None = on every rank.  Under torchrun it happens
    in the first life only, not again after a restart.
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
    """Leaves no byte free where the folder lies."""
    block = 2**16
    with contextlib.suppress(OSError), (Path(folder) / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(block)) == block:
            pass
        file.write(b"0")


def limit_file_size(size: int, *_: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def take_permission(folder: str, *_: Any) -> None:
    """No new file in the folder, for root neither."""
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
    """Moves one number of the weights of an engine.Run."""
    import torch

    with torch.no_grad():
        next(run.training.model.parameters()).view(-1)[0] += size


def cut_table(_value: Any, run: Any, *_: Any) -> None:
    """Takes the last op code from the table of an engine.Run."""
    run.regime.table.rows.pop()


def tear_and_kill(_value: Any, _result: None, _state: Any, path: Path) -> None:
    """After torch.save(): as if the process had been killed in the middle of it."""
    os.truncate(path, path.stat().st_size // 2)
    kill_self()


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
# These get what the function gave, and may give something else in its place.
AFTER: dict[str, Callable[..., Any]] = {"tear": tear_and_kill, "multiply": lambda value, result, *_: result * value}


def arm(fault: Fault) -> None:
    """Puts the fault in its place, in this process."""
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
    """main.py as its file does when it is called, with the faults in their places."""
    for fault in faults:
        arm(fault)
    sys.argv = ["main.py", *arguments]
    runpy.run_path(str(ROOT / "main.py"), run_name="__main__")


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass
class Ended:
    """How a run ended: exit code (minus the signal that killed it), and what it said, for each rank."""

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

    def one_line(self, rank: int = 0) -> str:
        """What a user reads who made a mistake: this one line on stderr, and nothing else from any rank."""
        assert self.codes[rank] == 2, self
        assert [len(text.splitlines()) for text in self.errors] == [int(r == rank) for r in range(len(self.codes))], (
            self.error
        )
        assert self.errors[rank].startswith("main.py: error: "), self.error
        return self.errors[rank]


class Started:
    """A run of main.py in `processes` processes, in the environment that torchrun makes, and ours to kill."""

    def __init__(self, folder: Path, arguments: list[str], faults: tuple[Fault, ...] = (), processes: int = 1):
        self.start, self.folder, self.said = time.monotonic(), folder, tempfile.TemporaryDirectory()
        arguments = [*map(str, arguments), "--output-dir", str(folder)]
        self.processes, port = [], str(_free_port())
        for rank in range(processes):
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            values = (str(rank), str(rank), str(processes), "127.0.0.1", port)
            environment = dict(zip(names, values, strict=True)) if processes > 1 else {}
            said = [f"{self.said.name}/{rank}.{end}" for end in ("out", "err")]
            process = FORK.Process(target=_child, args=(environment, said, list(faults), arguments))
            with mock.patch.dict(os.environ, ONE_THREAD):  # it counts where the server is not running yet
                process.start()
            self.processes.append(process)

    def kill(self, rank: int = 0, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid, number)

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = SECONDS) -> Ended:
        """Waits for the end of all processes; as torchrun does, it asks the others to stop where one has failed.

        A run that takes longer is killed, and a TimeoutError.
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
        said = [[Path(self.said.name, f"{rank}.{end}").read_text() for rank in ranks] for end in ("out", "err")]
        self.said.cleanup()
        if late:
            raise TimeoutError(f"ranks {late} of {self.folder} did not end within {seconds} s: {said}")
        return Ended([process.exitcode for process in self.processes], *said, time.monotonic() - self.start)


def _child(environment: dict[str, str], said: list[str], faults: list[Fault], arguments: list[str]) -> None:
    os.environ.update(environment)
    for number, path in enumerate(said, 1):
        with Path(path).open("wb") as file:
            os.dup2(file.fileno(), number)
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is for several processes, and stays behind when this one is killed
    try:
        run_main(faults, arguments)
    finally:
        os.seteuid(os.getuid())  # where permission was taken: multiprocessing cleans up behind us


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(folder: Path, arguments: list[str], *faults: Fault, processes: int = 1) -> Ended:
    """Runs main.py to its end, whichever it is."""
    return Started(folder, arguments, faults, processes).wait()


def resume(folder: Path, arguments: list[str], *faults: Fault, processes: int = 1) -> Ended:
    """Goes on where a run stopped."""
    # TensorBoard orders its files by the second in which they were begun, which is the fourth part of their names.
    begun = [int(path.name.split(".")[3]) for path in (folder / "tensorboard").glob("events.out.tfevents.*")]
    time.sleep(max(0.0, max(begun, default=0) + 1 - time.time()))
    return run(folder, [*arguments, "--resume", "auto"], *faults, processes=processes)


def torchrun(folder: Path, arguments: list[str], *faults: Fault, processes: int = 2) -> subprocess.CompletedProcess:
    """Runs main.py under torchrun with --max-restarts 3 and --resume auto, to its end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "3", "--nproc_per_node", processes]
    command = [sys.executable, *launcher, __file__, json.dumps([asdict(fault) for fault in faults]), *arguments]
    return subprocess.run(
        [*map(str, command), "--output-dir", str(folder), "--resume", "auto"],
        # Or a restarted process finds the addresses of those that are gone: https://github.com/pytorch/pytorch/issues/135712
        env=os.environ | ONE_THREAD | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=3 * SECONDS,
        check=False,
    )


# ---------------------------------------------------------------------------------------------------------------------
# A run to hurt


def make_run(folder: Path) -> list[str]:
    """Arguments of a PIAD run of three epochs of five steps, in which everything that can be drawn is drawn.

    Its data, some of the digits as an image folder, and its weights to start from are written into `folder`. The
    dropout list grows in epochs 0 and 1; it saves after the second and the fourth step and at the end of an epoch.
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
    drawn = ["--aa", "rand-m5-inc1", "--reprob", 0.5, "--mixup", 0.8, "--cutmix", 1, "--drop-path", 0.2]
    piad = ["--stage", "piad", "--proxy-samples", 40, "--progressive-epochs", 2, "--checkpoint-steps", 2]
    training = ["--epochs", 3, "--lr", 1e-2, "--ema-decay", 0.9, "--device", "cpu"]
    arguments = [*MODEL, *data, *drawn, *piad, *training, "--checkpoint", folder / "contracted.safetensors"]
    return [str(argument) for argument in arguments]


# ---------------------------------------------------------------------------------------------------------------------
# What must be the same


def scalars(folder: Path) -> dict[str, list[tuple[int, float | bytes | None]]]:
    """Every TensorBoard scalar and picture of a run: name -> (step, value), as its readers see them.

    None in place of the values under machine/, speed and memory: they are others each time, so that two runs can only
    be alike in their steps.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tb_logging

    tb_logging.get_logger().setLevel("ERROR")  # that a resumed run begins before the end of the killed one is our wish
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    found = {tag: [(s, None if tag.startswith("machine/") else v) for s, v in values] for tag, values in found.items()}
    pictures = {tag: events.Images(tag) for tag in events.Tags()["images"]}
    return found | {tag: [(p.step, p.encoded_image_string) for p in values] for tag, values in pictures.items()}


def differences(found: Path, expected: Path) -> list[str]:
    """Where two output folders differ in what they hold, bit for bit; nothing where they do not."""
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
