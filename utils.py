"""Errors for users, processes, ranks, seeds. Imports no other file of this project."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import platform
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can correct: shown as one line, exit code 2."""


class Preempted(Exception):
    """The run was asked to stop (SIGTERM, SIGUSR1 or Ctrl-C)."""


# Errors of the file system that the user can correct, wherever they are raised.
_FILE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_stop_asked: list[str] = []


def run_program(main: Callable[[], None]) -> None:
    """Runs an entry point. A user's mistake is one line on stderr and exit code 2; a stop signal is exit code 0."""
    program = Path(sys.argv[0]).name
    try:
        main()
    except Preempted as stop:
        say(f"{program}: {stop}")
    except KeyboardInterrupt:
        print(f"{program}: stopped by Ctrl-C", file=sys.stderr, flush=True)
        os._exit(130)  # at once: data loading processes end with their parent
    except (UserError, OSError, RuntimeError) as error:
        line = _line_of(error)
        if line is None:
            raise
        if _rank_0_reports():
            os._exit(2)
        print(f"{program}: error: {line}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(2)  # leaving the process group in order would wait for ranks that are in a collective call
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def _line_of(error: Exception) -> str | None:
    """The message for the user; None for an error of the program itself."""
    # A data loader worker wraps the message in its own traceback, whose last line it is.
    last = str(error).strip().splitlines()[-1:] or [""]
    if isinstance(error, UserError):
        return last[0].removeprefix("utils.UserError: ")
    if isinstance(error, OSError) and error.errno in _FILE_ERRORS:
        return f"cannot write {error.filename or 'to the output folder'}: {error.strerror}"
    # A connection is reset if the process dies while it hands over a batch.
    if "DataLoader worker" in str(error) or isinstance(error, ConnectionError):
        return f"a data loading process died, perhaps for lack of memory; try fewer --workers ({first_line(error)})"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile does not run this model here: {first_line(error)}"
    if isinstance(error, dist.DistError) or (dist.is_initialized() and "gloo" in str(error)):
        return f"rank {world()[0]} stops because another rank has ended, whose message says why"
    return None


def _rank_0_reports() -> bool:
    """Whether this rank leaves the message to rank 0, which fails as well and thereby ends the run within seconds."""
    if is_main_process():
        return False
    end = time.monotonic() + 5
    while time.monotonic() < end and not _stop_asked:
        time.sleep(0.05)
    return bool(_stop_asked)


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """A context in which SIGTERM, SIGUSR1 (sent by Slurm) and Ctrl-C only ask the run to stop, see stop_if_asked().

    A second Ctrl-C stops at once.
    """

    def ask(number: int, _frame: object) -> None:
        if number == signal.SIGINT and "SIGINT" in _stop_asked:
            raise KeyboardInterrupt
        _stop_asked.append(signal.Signals(number).name)

    before = [signal.signal(number, ask) for number in STOP_SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)


def ignore_stop_signals(_worker: int = 0) -> None:
    """For data loading processes: a signal to the whole process group is for the run, which ends them itself."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_if_asked(collective: bool = False) -> None:
    """Raises Preempted after a stop signal.

    collective: all ranks call this at the same point. Otherwise runs of several processes do not stop here, since their
    ranks have to stop together.
    """
    asked = bool(_stop_asked)
    if dist.is_initialized():
        asked = collective and any(row[0] for row in gather_over_ranks([float(asked)]))
    if asked:
        raise Preempted(f"stopped by {_stop_asked[0] if _stop_asked else 'a signal to another rank'}")


class Interruptible:
    """Batches between which a run of one process can be stopped by a signal."""

    def __init__(self, batches: Iterable):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        for batch in self.batches:
            stop_if_asked()
            yield batch


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def init_processes(args: argparse.Namespace) -> torch.device:
    """Sets args.rank, args.local_rank, args.world_size and args.distributed; returns this process's device.

    `--device auto` is CUDA where there is one. A run is distributed when torchrun says so (RANK and WORLD_SIZE), never
    because of the variables of a scheduler. Each rank takes the CUDA device of its local rank.
    """
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(args.device).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device}: not a device this project runs on; try cpu, cuda or cuda:1")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: this PyTorch sees no CUDA device; use --device cpu")
    args.rank, args.local_rank, args.world_size = 0, 0, 1
    args.distributed = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if args.distributed:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        args.rank, args.world_size, args.local_rank = *world(), int(os.environ.get("LOCAL_RANK", "0"))
        if kind == "cuda":
            args.device = f"cuda:{args.local_rank}"
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's default rounds the patch embedding; see tf32()
    device = torch.device(args.device)
    if device.index is not None and kind == "cuda":
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """A context in which CUDA multiplies matrices of float32 in float32, within tf32() as well."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """A context in which CUDA multiplies matrices of float32 in TF32: for training, where rounding does not matter."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


def synchronize(device: torch.device) -> None:
    """Waits for the device, where it works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_model() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the number of threads in use, to go with a measured time."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) when not distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main_process() -> bool:
    return world()[0] == 0


def peak_memory(device: torch.device) -> int:
    """The largest memory that this process has used, in bytes: allocated on a CUDA device, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reduce_sum(*tensors: torch.Tensor) -> None:
    """Sums each tensor over the ranks, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def gather_over_ranks(values: list[float]) -> list[list[float]]:
    """The values of all ranks, one row per rank (a collective call)."""
    rank, ranks = world()
    on_cuda = dist.is_initialized() and dist.get_backend() == "nccl"
    rows = torch.zeros(ranks, len(values), dtype=torch.float64, device="cuda" if on_cuda else "cpu")
    rows[rank] = torch.tensor(values, dtype=torch.float64)
    reduce_sum(rows)
    return rows.tolist()


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The mean of each value over the ranks."""
    columns = zip(*gather_over_ranks(list(values.values())), strict=True)
    return {name: sum(column) / world()[1] for name, column in zip(values, columns, strict=True)}


def on_main_process(compute: Callable[[], Any]) -> Any:
    """What `compute` returns on rank 0, given to all ranks (a collective call); so is a UserError that it raises."""
    if not dist.is_initialized():
        return compute()
    outcome: list[Any] = [None, None]  # the result, the error
    if is_main_process():
        try:
            outcome[0] = compute()
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def check_ranks_agree(what: str, checksum: int) -> None:
    """Raises UserError that names a rank whose checksum (below 2**53) differs from rank 0's."""
    rows = gather_over_ranks([float(checksum)])
    odd = [rank for rank, row in enumerate(rows) if row != rows[0]]
    if odd:
        raise UserError(
            f"{what} of rank {odd[0]} differ from those of rank 0: the run stops, the last checkpoint is kept"
        )


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """A number below 2**53 that depends on every bit of the tensors."""
    total = 0
    for tensor in tensors:
        words = tensor.detach().contiguous().view(-1)
        words = words.view(torch.int32 if words.element_size() % 4 == 0 else torch.uint8)
        # Weighted by position, so that two values that change places change the sum.
        places = torch.arange(1, len(words) + 1, device=words.device)
        total = (total * 31 + int((words.to(torch.int64) * places).sum())) % (2**53 - 111)
    return total


def say(*words: object) -> None:
    """print() on the main process only, flushed."""
    if is_main_process():
        print(*words, flush=True)


def progress_bar(items: Iterable, label: str, **kwargs: Any) -> tqdm:
    """tqdm on the main process: live on a terminal, a line every 30 seconds in a log file."""
    seldom = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 60, "delay": 30}
    return tqdm(items, label, disable=not is_main_process(), leave=False, **seldom, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Seeds: random numbers are seeded by where they are drawn, so that a resumed run needs no generator state


def mixed_seed(*key: int) -> int:
    """A 63-bit seed that depends on all numbers of the key and on their order."""
    return int(np.random.SeedSequence([len(key), *key]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(*key: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global generators from the key."""
    seed = mixed_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would format a stack trace on each call while CUDA is not in use: too slow per image.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
