"""What a .pth file may hold: tensors and plain Python values, numbers of NumPy among them, and nothing that swells."""

from __future__ import annotations

import mmap
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import UserError

ENCODE = b"_codecs\nencode\n"  # how a pickle names the function that turns text into bytes


class _NumberType:
    """Takes the place of numpy.dtype while a file is read: the type of one number, such as "f8"."""

    def __init__(self, code: str, *_: bool):
        if code not in ("b1", *(f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8, 16))):
            raise pickle.UnpicklingError(f"GLOBAL numpy.{code:.80}")
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


def refusal(path: Path, reason: str) -> str:
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


def _torchscript(path: Path) -> str:
    """The message for a model that torch.jit.save() wrote."""
    code = f"import torch; torch.save(torch.jit.load('{path}', 'cpu').state_dict(), 'weights.pth')"
    return (
        f"checkpoint {path} is a TorchScript archive, a program with its weights, such as OpenAI's CLIP; refused, "
        f'nothing in it was run; if you trust the file, keep its weights alone: python -c "{code}"; or give '
        "--pretrained for timm's weights"
    )


def check_packing(path: Path) -> None:
    """Raises UserError for a .pth that would unpack to far more memory than its own size.

    And for one that is damaged, or that is a TorchScript archive.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # torch allows these two calls, but with them a few bytes can allocate any amount of memory.
        swells, damaged, encoded = content.find(b"\nbytearray\n") >= 0, None, content.find(ENCODE) >= 0
        if content[:4] == b"PK\x03\x04":  # otherwise it is in the format of torch before 1.6
            with zipfile.ZipFile(file) as records:
                if any(name.endswith("/constants.pkl") for name in records.namelist()):
                    raise UserError(_torchscript(path))
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


def check_tensors(state: dict[str, Any], path: Path) -> None:
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
