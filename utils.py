"""Users' errors, processes, seeds, files, logs. Knows no other file of the project."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: shown as one line, exit code 2."""


def run_program(main: Callable[[], None]) -> None:
    """Runs an entry point; a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        # A data loader worker wraps the message in its own traceback; the last line is what we said.
        print(f"{Path(sys.argv[0]).name}: error: {str(error).splitlines()[-1]}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def init_processes(args: argparse.Namespace) -> torch.device:
    """Sets args.rank, args.world_size and args.distributed; returns this process's device.

    `--device auto` is CUDA where there is one. Under torchrun each rank takes the CUDA device of its local rank.
    """
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(args.device).type
    except RuntimeError as error:
        raise UserError(f"--device {args.device}: not a device; try cpu, cuda or cuda:1") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: this PyTorch sees no CUDA device; use --device cpu")
    return init_distributed_device(args)


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) when not distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main_process() -> bool:
    return world()[0] == 0


def reduce_sum(*tensors: torch.Tensor) -> None:
    """Sums each tensor over the ranks, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The mean of each value over the ranks."""
    means = torch.tensor(list(values.values()), dtype=torch.float64)
    reduce_sum(means)
    return dict(zip(values, (means / world()[1]).tolist(), strict=True))


def say(*words: object) -> None:
    """print() on the main process only, shown at once."""
    if is_main_process():
        print(*words, flush=True)


def progress_bar(items: Iterable, label: str, **kwargs: Any) -> tqdm:
    """tqdm on the main process: live on a terminal, a line now and then in a log file."""
    seldom = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 60, "delay": 30}
    return tqdm(items, label, disable=not is_main_process(), leave=False, **seldom, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Seeds: every draw is keyed by where it is made, so that a resumed run needs no saved generator state


def mixed_seed(*key: int) -> int:
    """A 63-bit seed that depends on every number of the key and on their order."""
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(*key: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global generators from the key."""
    seed = mixed_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: where CUDA is not in use it formats a stack trace a call, too slow for each image.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; at the end it is synced and renamed, so `path` is whole or absent."""
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes a rename in the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file: whole or absent."""
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises UserError if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def check_output_dir(folder: Path) -> Path:
    """Makes the output folder; an unwritable one is an error before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot write there: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Logs


class RunLog:
    """log.txt (one JSON line an epoch) and TensorBoard, on the main process; nothing elsewhere.

    Lines of epochs from `start_epoch` on, and events from `start_step` on, are dropped first: a resumed run writes
    them anew.
    """

    def __init__(self, folder: Path, start_epoch: int, start_step: int):
        self.path = folder / "log.txt"
        self.writer = None
        if not is_main_process():
            return
        kept = []
        if start_epoch and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if json.loads(line)["epoch"] < start_epoch]
        write_text(self.path, "".join(line + "\n" for line in kept))
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed for --help or --eval

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=start_step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)

    def epoch(self, values: dict[str, Any], step: int) -> None:
        """Prints the epoch's values, appends them to log.txt as a JSON line, and gives the numbers to TensorBoard."""
        say(" ".join(f"{key} {value:.5g}" for key, value in values.items()))
        if self.writer is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        self.scalars({key: value for key, value in values.items() if key != "epoch"}, step)

    def flush(self) -> None:
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
