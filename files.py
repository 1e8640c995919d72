"""Reading and writing files: each is complete or not there at all, and checkpoints are plain data."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import mmap
import os
import pickle
import pickletools
import platform
import re
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pprint import pformat
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict

from utils import UserError, first_line, is_main_process, say

LOCK = ".lock"  # in an output folder: held by the run that writes there
MAX_JSON_BYTES = 4 * 2**20  # the table of a ViT-g with all its op codes takes about 1.5 MiB
ENCODE = b"_codecs\nencode\n"  # how a pickle names the function that turns text into bytes
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
            path.unlink(missing_ok=True)


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
        _check_packing(path)
        with torch.serialization.safe_globals([argparse.Namespace, *NUMPY]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, str(error))) from error
    except UserError:
        raise
    except Exception as error:  # torch and safetensors raise many types for a damaged file
        raise UserError(f"checkpoint {path} cannot be read, it is damaged or cut short: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a dictionary of weights")
    _check_tensors(state, path)
    return state


class _NumberType:
    """Takes the place of numpy.dtype while a file is read: the type of one number, such as "f8"."""

    def __init__(self, code: str, *_: bool):
        if code not in ("b1", *(f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8, 16))):
            raise pickle.UnpicklingError(f"GLOBAL numpy.{shown(code)}")
        self.code, self.byte_order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """state: as numpy.dtype's, (version, byte order, ...)."""
        self.byte_order = {"<": "<", ">": ">", "|": "|", "=": "="}[state[1]]


def _number(kind: _NumberType, content: bytes) -> bool | int | float:
    """Takes the place of NumPy's function that rebuilds a scalar."""
    return np.frombuffer(content, kind.byte_order + kind.code, count=1)[0].item()


# How pickles of NumPy 1 and 2 name what rebuilds a number.
NUMPY = [
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def _refusal(path: Path, reason: str) -> str:
    """The message for a pickle that torch refuses for this reason."""
    name = re.search(r"GLOBAL ([\w.]+)", reason)
    if name is None:
        return (
            f"checkpoint {path} is damaged or holds pickled objects that are not plain data; "
            "refused, nothing in it was run"
        )
    code = f"import torch; torch.save(torch.load('{path}', weights_only=False)['model'], 'weights.pth')"
    return (
        f"checkpoint {path} holds {name[1]}, which is not plain data; refused, nothing in it was run; if you trust the "
        f'file, keep its weights alone: python -c "{code}"'
    )


def _check_packing(path: Path) -> None:
    """Raises UserError for a .pth that is damaged, or that would unpack to far more memory than its own size."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # torch allows these two calls, but with them a few bytes can allocate any amount of memory.
        swells, damaged, encoded = content.find(b"\nbytearray\n") >= 0, None, content.find(ENCODE) >= 0
        if content[:4] == b"PK\x03\x04":  # otherwise it is in the format of torch before 1.6
            with zipfile.ZipFile(file) as records:
                swells |= any(record.compress_type != zipfile.ZIP_STORED for record in records.infolist())
                damaged = None if swells else records.testzip()  # torch does not check the checksums
                if encoded and not swells and not damaged:
                    pickles = [records.read(name) for name in records.namelist() if name.endswith("data.pkl")]
                    swells = len(re.findall(ENCODE, content)) != sum(map(_plain_encodings, pickles))
        else:
            swells |= encoded
    if swells:
        raise UserError(f"checkpoint {path} could unpack to far more than its size; refused")
    if damaged:
        raise UserError(f"checkpoint {path} is damaged: {damaged} has another checksum than when it was written")


def _plain_encodings(content: bytes) -> int:
    """How many times a pickle names the function that encodes text, or -1 where a use of it could swell.

    Bytes, and so numbers of NumPy, are pickled as encode(text, "latin1"). That cannot swell where each text stands in
    the file on its own; a text that is used again has to be short. Nothing is executed.
    """
    named, memo, last = 0, {}, None  # last: the text or function that was pushed last, and whether it is used again
    wanted: list[str] = []  # what has to follow: the text, the name of the encoding, the call
    for opcode, value, _ in pickletools.genops(content):
        kind = opcode.name
        if kind in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[value] = last and (last[0], True)
            continue
        last = None
        if kind in ("BINGET", "LONG_BINGET", "GET"):
            last = memo.get(value)
        elif kind in ("BINUNICODE", "GLOBAL"):
            last = value, False
        expected = wanted.pop(0) if wanted else None
        if expected == "text":
            right = last is not None and (len(last[0]) <= 16 or not last[1])
        elif expected == "encoding":
            right = last is not None and last[0] == "latin1"
        else:
            right = expected in (None, kind)
        if not right:
            return -1
        if expected is None and last is not None and last[0] == "_codecs encode":
            named += kind == "GLOBAL"
            wanted = ["text", "encoding", "TUPLE2", "REDUCE"]
    return named


def _check_tensors(state: dict[str, Any], path: Path) -> None:
    """Raises UserError for a tensor, anywhere in the state, with more elements than the file stores for it."""
    left: list[tuple[str, Any]] = [("", state)]
    seen: set[int] = set()
    while left:
        name, value = left.pop()
        if isinstance(value, torch.Tensor):
            plain = value.layout == torch.strided and value.device.type == "cpu"
            if not plain or value.nbytes > value.untyped_storage().nbytes():
                raise UserError(f"checkpoint {path}: {name!r} is not a plain tensor with all its elements")
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{name}.{key}" if name else str(key), inner) for key, inner in items]


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
