"""Reading and writing files: each is complete or not there at all, and checkpoints are plain data."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pickle
import platform
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pprint import pformat
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict

from pickles import NUMPY, check_packing, check_tensors, refusal
from utils import UserError, first_line, is_main_process, say

LOCK = ".lock"  # in an output folder: held by the run that writes there
MAX_JSON_BYTES = 4 * 2**20  # the table of a ViT-g with all its op codes takes about 1.5 MiB
# Where checkpoints hold weights, and averaged weights.
NAMES, AVERAGED = ("model", "state_dict"), ("model_ema", "state_dict_ema")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, synced and renamed to `path` at the end: `path` is complete or as it was before."""
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
    """Makes renames in the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file; see atomic_file()."""
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises UserError if it is missing, malformed or far too large."""
    try:
        size = Path(path).stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} that any such file needs")
        return json.loads(Path(path).read_text(), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        double, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(repr(double))} appears twice in one object")
    return found


def shown(value: Any) -> str:
    """A value as part of a one-line message: on one line, at most 80 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_output_dir(folder: Path, flag: str = "--output-dir") -> None:
    """Raises UserError, before any work is done, where the folder cannot be created or written to. Creates nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{flag} {folder}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: no permission to write to {existing}")


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Holds the output folder for this run, on the main process; the lock ends with the process, however it ends.

    Raises UserError, naming the other run, where one holds the folder already.
    """
    if not is_main_process():
        yield
        return
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        while True:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by this process, not by its data loading processes
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
            file = path.open("a+")  # the run before has removed the file that was opened first
    except BlockingIOError as error:
        file.seek(0)
        raise UserError(
            f"{folder} is in use by another run ({file.read().strip()}): wait for it, or stop it"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # what is left of a lock does not hold the folder
                path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a .pth that `torch.load(weights_only=True)` reads; see atomic_file()."""
    with atomic_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what torch's zip writer raises for a full disk
            raise UserError(f"cannot write {path}: the disk may be full ({first_line(error)})") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a .pth or .safetensors file as data: nothing in it is executed.

    argparse's Namespace is allowed, as DeiT-style checkpoints hold one, and numbers of NumPy become Python's. Raises
    UserError for a file that is missing, truncated, not a checkpoint, or that holds any other pickled object.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"checkpoint {path} is a folder: give the file of the weights in it")
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        check_packing(path)
        with torch.serialization.safe_globals([argparse.Namespace, *NUMPY]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(refusal(path, str(error))) from error
    except UserError:
        raise
    except Exception as error:  # torch and safetensors raise many types for a damaged file
        raise UserError(f"checkpoint {path} cannot be read, it is damaged or cut short: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a dictionary of weights")
    check_tensors(state, path)
    return state


def weights_of(state: dict[str, Any], path: Path, use_ema: bool = False) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint: bare or under one of NAMES, or under one of AVERAGED if use_ema.

    What DistributedDataParallel and torch.compile put before the names of weights is taken off.
    """
    if use_ema and not any(isinstance(state.get(name), dict) for name in AVERAGED):
        raise UserError(f"checkpoint {path} holds no averaged weights ({' or '.join(AVERAGED)}); leave --eval-ema out")
    names = AVERAGED if use_ema else NAMES
    weights = next((state[name] for name in names if isinstance(state.get(name), dict)), state)
    if not weights or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        raise UserError(f"checkpoint {path} holds no weights: expected a state dict, bare or under model / state_dict")
    return clean_state_dict(weights)


class CheckpointFolder:
    """checkpoint_<epoch>.pth of a run: the last two, the best and one in every `keep_every` epochs are kept.

    settings: what decides the result of the run (plain values). Each checkpoint holds them, and a run with other
    settings does not resume from it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], keep_every: int = 0):
        self.folder, self.settings, self.keep_every = folder, settings, keep_every

    def save(self, epoch: int, state: dict[str, Any], best_epoch: int | None) -> None:
        """Writes checkpoint_<epoch>.pth on the main process, then deletes those not to be kept."""
        if not is_main_process():
            return
        save_checkpoint(self.folder / f"checkpoint_{epoch}.pth", {**state, "settings": self.settings})
        for left_over in self.folder.glob(".*.tmp"):  # of a run that was killed while writing
            left_over.unlink(missing_ok=True)
        # Later epochs in the folder are of another run.
        for old in [e for e in self.epochs() if e <= epoch][:-2]:
            if old != best_epoch and not (self.keep_every and (old + 1) % self.keep_every == 0):
                (self.folder / f"checkpoint_{old}.pth").unlink()

    def epochs(self) -> list[int]:
        """The epochs that have a checkpoint, ascending."""
        names = (re.fullmatch(r"checkpoint_(\d+)\.pth", path.name) for path in self.folder.glob("checkpoint_*.pth"))
        return sorted(int(name[1]) for name in names if name)

    def to_resume(self, resume: str | None) -> dict[str, Any] | None:
        """The state to resume from. None: a fresh start; "auto": the newest undamaged checkpoint, if any; else a file.

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
                say(f"skipping {path.name}: {error}")
                continue
            self._check_settings(path, state["settings"])
            say(f"resuming from {path}: epoch {state['epoch']}, step {state['step']}")
            return state
        say(f"no checkpoint in {self.folder} to resume: a fresh start")
        return None

    def _check_settings(self, path: Path, theirs: dict[str, Any]) -> None:
        for key, value in self.settings.items():
            # Compared as text, which tells 1 from True and works for tensors, too.
            if pformat(theirs.get(key)) != pformat(value):
                raise UserError(
                    f"{path} is of a run with {key} {shown(theirs.get(key))}, this one has {value}: "
                    "give the same flags, or another --output-dir, or leave --resume out"
                )


def _run_state(path: Path) -> dict[str, Any]:
    """A checkpoint that a run can resume from."""
    state = load_checkpoint(path)
    for key, kind in {"model": dict, "optimizer": dict, "epoch": int, "step": int, "settings": dict}.items():
        if key not in state:
            raise UserError(f"checkpoint {path} holds no training run to resume: it has no {key}")
        if not isinstance(state[key], kind):
            raise UserError(f"checkpoint {path}: {key} is of type {type(state[key]).__name__}, not {kind.__name__}")
    return state
