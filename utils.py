"""Processes, seeds, logging, checkpoints. Knows no other file of the project."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device


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


def say(*words: object) -> None:
    """print() on the main process only, shown at once."""
    if is_main_process():
        print(*words, flush=True)


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
    torch.manual_seed(seed)


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
# Checkpoints: tensors and plain Python values only


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a .pth that `torch.load(weights_only=True)` reads; whole or absent."""
    with atomic_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's zip writer reports a full disk so
            raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a .pth or .safetensors file as data: nothing in it is executed.

    argparse's Namespace is allowed, as DeiT-style checkpoints hold one. Raises UserError for a file that is missing,
    truncated, not a checkpoint, or that holds any other pickled object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} is damaged or holds pickled objects that are not plain data; "
            "refused, nothing in it was run"
        ) from error
    except Exception as error:  # torch and safetensors raise many types for a damaged file
        raise UserError(f"checkpoint {path} cannot be read, it is damaged or cut short: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a dictionary of weights")
    return state


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def weights_of(state: dict[str, Any], path: Path, use_ema: bool = False) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint: bare, or under `model` / `state_dict`, or `model_ema` if use_ema."""
    if use_ema and "model_ema" not in state:
        raise UserError(f"checkpoint {path} holds no averaged weights (model_ema); leave --eval-ema out")
    names = ["model_ema"] if use_ema else ["model", "state_dict"]
    weights = next((state[name] for name in names if isinstance(state.get(name), dict)), state)
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"checkpoint {path} holds no weights: expected a state dict, bare or under model / state_dict")
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# Logs


class RunLog:
    """log.txt (one JSON line an epoch) and TensorBoard, on the main process; nothing elsewhere.

    Lines and events of epochs from `start_epoch` on are dropped first: a resumed run writes them anew.
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
        """Appends the epoch's JSON line; its numbers go to TensorBoard too."""
        if self.writer is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        self.scalars({k: v for k, v in values.items() if isinstance(v, int | float) and k != "epoch"}, step)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
