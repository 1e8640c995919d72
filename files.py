"""What is written and read: files that are whole or absent, checkpoints that are plain data, the log of a run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from utils import UserError, first_line, is_main_process, say

MAX_JSON_BYTES = 8 * 2**20  # the table of a ViT-g with all its op codes takes about 1 MiB


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
    """Reads a JSON file. Raises UserError if it is missing, malformed or far too large."""
    try:
        size = Path(path).stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} that any such file needs")
        return json.loads(Path(path).read_text(), object_pairs_hook=_without_doubles)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def check_output_dir(folder: Path) -> None:
    """Raises UserError, before any work is done, where the folder could not be made or written to. Makes nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--output-dir {folder}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output-dir {folder}: no permission to write to {existing}")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a .pth that `torch.load(weights_only=True)` reads; whole or absent."""
    with atomic_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's zip writer reports a full disk so
            raise UserError(f"cannot write {path}: the disk may be full ({first_line(error)})") from error


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


def weights_of(state: dict[str, Any], path: Path, use_ema: bool = False) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint: bare, or under `model` / `state_dict`, or `model_ema` if use_ema."""
    if use_ema and "model_ema" not in state:
        raise UserError(f"checkpoint {path} holds no averaged weights (model_ema); leave --eval-ema out")
    names = ["model_ema"] if use_ema else ["model", "state_dict"]
    weights = next((state[name] for name in names if isinstance(state.get(name), dict)), state)
    if not weights or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        raise UserError(f"checkpoint {path} holds no weights: expected a state dict, bare or under model / state_dict")
    return {key.removeprefix("module."): value for key, value in weights.items()}


class CheckpointFolder:
    """checkpoint_<epoch>.pth of a run: the last two and the best are kept, and every `keep_every` epochs.

    settings: what makes the run what it is (plain values). Each checkpoint holds them, and a run with others does not
    go on from it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], keep_every: int = 0):
        self.folder, self.settings, self.keep_every = folder, settings, keep_every

    def save(self, epoch: int, state: dict[str, Any], best_epoch: int | None) -> None:
        """Writes checkpoint_<epoch>.pth on the main process, then deletes those not to be kept."""
        if not is_main_process():
            return
        save_checkpoint(self.folder / f"checkpoint_{epoch}.pth", {**state, "settings": self.settings})
        for left_over in self.folder.glob(".*.tmp"):  # of a run that was killed while it wrote
            left_over.unlink(missing_ok=True)
        # Later epochs in the folder are of another run: they do not count.
        for old in [e for e in self.epochs() if e <= epoch][:-2]:
            if old != best_epoch and not (self.keep_every and (old + 1) % self.keep_every == 0):
                (self.folder / f"checkpoint_{old}.pth").unlink()

    def epochs(self) -> list[int]:
        """The epochs that have a checkpoint, ascending."""
        names = (re.fullmatch(r"checkpoint_(\d+)\.pth", path.name) for path in self.folder.glob("checkpoint_*.pth"))
        return sorted(int(name[1]) for name in names if name)

    def to_resume(self, resume: str | None) -> dict[str, Any] | None:
        """The state to go on from: None = a fresh start, "auto" = the newest whole checkpoint if any, else a file.

        Raises UserError for a checkpoint of a run with other settings.
        """
        if resume is None:
            return None
        paths = [Path(resume)]
        if resume == "auto":
            paths = [self.folder / f"checkpoint_{epoch}.pth" for epoch in reversed(self.epochs())]
        for path in paths:
            try:
                state = _run_state(path)
            except UserError as error:
                if resume != "auto":
                    raise
                say(f"passing over {path.name}: {error}")
                continue
            self._check_settings(path, state["settings"])
            say(f"resuming from {path}: epoch {state['epoch']}, step {state['step']}")
            return state
        say(f"no checkpoint in {self.folder} to resume: a fresh start")
        return None

    def _check_settings(self, path: Path, theirs: dict[str, Any]) -> None:
        for key, value in self.settings.items():
            if theirs.get(key) != value:
                raise UserError(
                    f"{path} is of a run with {key} {theirs.get(key)}, this one has {value}: "
                    "give the same flags, or another --output-dir, or leave --resume out"
                )


def _run_state(path: Path) -> dict[str, Any]:
    """A checkpoint that a run can go on from."""
    state = load_checkpoint(path)
    missing = [key for key in ("model", "optimizer", "epoch", "step", "settings") if key not in state]
    if missing:
        raise UserError(f"checkpoint {path} holds no training run to resume: it has no {missing[0]}")
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Logs


def _quiet_about_files(problem: threading.ExceptHookArgs) -> None:
    if not isinstance(problem.exc_value, OSError):
        threading.__excepthook__(problem)


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
        # One line an epoch from epoch 0 on, so what comes after is of epochs done again, or was cut short.
        lines = self.path.read_text().splitlines(keepends=True) if start_epoch and self.path.exists() else []
        write_text(self.path, "".join(lines[:start_epoch]))
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed for --help or --eval

        # Its thread prints a traceback where it cannot write; the error comes up again in ours, as one line.
        threading.excepthook = _quiet_about_files
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=start_step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)

    def epoch(self, values: dict[str, Any], step: int) -> None:
        """Appends the epoch's values to log.txt as a JSON line and to TensorBoard; prints those of evaluations."""
        if "top1" in values:
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
