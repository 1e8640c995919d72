"""Files made to do harm: they ask for more memory than there is, or for files outside their folder."""

from __future__ import annotations

import codecs
import functools
import io
import json
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FORK
from programs import CLASSES, MODEL_KWARGS, NAME, load_subnetwork, tiny_digits_model
from safetensors.torch import save_file
from test_fuzz import FULL, as_bytes, sub_network

import supernet
from benchmarks.common import peak_bytes
from files import MAX_JSON_BYTES
from piad.mask_table import MaskTable
from supernet.facts import MAX_DEPTH
from utils import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Files that ask for too much


def bare_config(**kwargs: Any) -> dict[str, Any]:
    model_kwargs = MODEL_KWARGS | {"num_classes": CLASSES} | kwargs
    return {"model": NAME, "model_kwargs": model_kwargs, "widths": FULL, "preprocessing": {}}


def config_of_blocks(depth: int) -> dict[str, Any]:
    """Right but for its weights, which are of fewer blocks."""
    widths = {f"{block}.{kind}": FULL[f"0.{kind}"] // 2 for block in range(depth) for kind in ("attn", "mlp")}
    return bare_config(depth=depth) | {"widths": widths}


def long_table(codes: int, modules: int = 1) -> dict[str, dict[str, int]]:
    column = {str(code): 9 for code in range(codes)}
    return {f"{block}.mlp": column for block in range(modules)}


def safetensors_claiming(length: int, header: bytes) -> bytes:
    return struct.pack("<Q", length) + header


def header_of(shape: list[int], end: int) -> bytes:
    return json.dumps({"weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()


def compressed_pth(zeros: int) -> bytes:
    """A small file that unpacks to many zeros: a .pth whose records are compressed."""
    packed, plain = io.BytesIO(), io.BytesIO(as_bytes({"weight": torch.zeros(zeros)}))
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target,
    ):
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    return packed.getvalue()


def calling(*calls: tuple[Callable[..., Any], Any]) -> bytes:
    """A .pth that calls the functions, each with what the one before it gave and an argument of its own."""

    class Call:
        def __init__(self, function: Callable[..., Any], *arguments: Any):
            self.done = function, arguments

        def __reduce__(self) -> tuple[Callable[..., Any], tuple]:
            return self.done

    (first, argument), *others = calls
    made = Call(first, *argument)
    for function, more in others:
        made = Call(function, made, *more)
    return as_bytes({"weight": made})


def claimed_head(classes: int) -> bytes:
    """A checkpoint with a head for so many classes, all of them the same few numbers."""
    model = tiny_digits_model(num_classes=1)
    return as_bytes({**model.state_dict(), "head.weight": model.head.weight.detach().expand(classes, -1)})


TOO_MUCH: dict[str, tuple[str, Callable[[], Any]]] = {
    "a table of a million op codes": ("mask_table.json", lambda: long_table(10**6)),
    "a table of as many op codes as a file can hold": ("mask_table.json", lambda: long_table(MAX_JSON_BYTES // 14)),
    "a table with one of its many op codes twice": (
        "mask_table.json",
        lambda: json.dumps(long_table(MAX_JSON_BYTES // 14)).replace("}}", ', "8": 9}}').encode(),
    ),
    "a table with the last of its many op codes twice": (
        "mask_table.json",
        lambda: json.dumps(long_table(200_000)).replace("}}", ', "199999": 9}}').encode(),
    ),
    "a table of as many modules": ("mask_table.json", lambda: long_table(1, MAX_JSON_BYTES // 28) | {"x": 1}),
    "a table with an op code of a million digits": ("mask_table.json", lambda: {"0.mlp": {"9" * 10**6: 1}}),
    "a table with a width of a million digits": ("mask_table.json", lambda: b'{"0.mlp": {"0": ' + b"9" * 10**6 + b"}}"),
    "a nest of a million lists": ("mask_table.json", lambda: b"[" * 10**6),
    "a gigabyte of JSON": ("mask_table.json", lambda: 2**30),
    "a width of 10^12": ("config.json", lambda: bare_config() | {"widths": FULL | {"0.mlp": 10**12}}),
    "10^9 blocks": ("config.json", lambda: bare_config(depth=10**9)),
    "as many blocks as are looked at": ("config.json", lambda: config_of_blocks(MAX_DEPTH)),
    "one block more": ("config.json", lambda: config_of_blocks(MAX_DEPTH + 1)),
    "many widths": ("config.json", lambda: bare_config() | {"widths": {f"{b}.mlp": 1 for b in range(200_000)}}),
    "a gigabyte of config": ("config.json", lambda: 2**30),
    **{
        f"{key} of {value}": ("config.json", functools.partial(bare_config, **{key: value}))
        for key, value in {
            "embed_dim": 10**12,
            "num_classes": 10**12,
            "num_heads": 10**9,
            "mlp_ratio": 1e12,
            "reg_tokens": 10**9,
            "img_size": 10**6,
            "in_chans": 10**9,
            "class_token": 10**9,
        }.items()
    },
    **{
        f"a safetensors header {name}": ("model.safetensors", functools.partial(safetensors_claiming, length, header))
        for name, (length, header) in {
            "of 2^40 bytes, it says": (2**40, header_of([1], 4)),
            "of all the bytes there are, it says": (2**64 - 1, header_of([1], 4)),
            "of 99 MB, it says": (99_000_000, header_of([1], 4)),
            "of 10^12 numbers": (len(header_of([10**12], 4 * 10**12)), header_of([10**12], 4 * 10**12)),
            "of a shape that overflows": (len(header_of([2**32, 2**32], 0)), header_of([2**32, 2**32], 0)),
        }.items()
    },
    "a .pth that unpacks to much": ("checkpoint.pth", lambda: compressed_pth(2**26)),
    "a .pth that asks for zeros": ("checkpoint.pth", lambda: calling((bytearray, (2**30,)))),
    "a .pth that doubles what it holds": (
        "checkpoint.pth",
        lambda: calling((codecs.encode, ("x" * 2**10, "latin1")), *[(codecs.encode, ("hex",))] * 20),
    ),
    "a .pth of few numbers that says they are many": ("checkpoint.pth", lambda: claimed_head(2**22)),
}


def write_too_much(path: Path, content: Any) -> Path:
    """bytes as they are, a number as a file of so many zeros, anything else as JSON."""
    if isinstance(content, int):
        with path.open("wb") as file:
            file.truncate(content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def read_too_much(path: Path, results: connection.Connection) -> None:
    """Reads a file as the programs do; the answer: the error, bytes taken, and CPU time.

    The unit of the time is what it takes to parse the largest JSON file that is read.
    """
    torch.set_num_threads(1)
    text = "[" + "0," * (MAX_JSON_BYTES // 2 - 2) + "0]"
    start = time.process_time()
    json.loads(text)
    unit = time.process_time() - start
    found: dict[str, Any] = {"error": None}

    def read() -> None:
        try:
            if path.name == "mask_table.json":
                MaskTable.load(path)
            elif path.name == "config.json":
                load_subnetwork(path.parent)
            else:
                supernet.load(path, name=NAME, model_kwargs=MODEL_KWARGS, plain_weights=True)
        except UserError as error:
            found["error"] = str(error)
        except Exception as error:
            found["error"] = error

    start = time.process_time()
    found["bytes"] = peak_bytes(read, torch.device("cpu"))
    results.send(found | {"time": (time.process_time() - start) / unit})


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_file_that_asks_for_too_much_is_refused_at_once(name: str, tmp_path: Path):
    """Little processor time, and less than 200 MB more than the program has anyway."""
    file, content = TOO_MUCH[name]
    path = write_too_much(tmp_path / file, content())
    if file == "config.json":
        save_file(tiny_digits_model().state_dict(), tmp_path / "model.safetensors")
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=read_too_much, args=(path, send))
    process.start()
    connection.wait([receive, process.sentinel], 60)
    found = receive.recv() if receive.poll() else {"error": None}
    process.kill()
    assert isinstance(found["error"], str) and len(found["error"]) < 1000, found
    assert found["time"] < 30  # 13 are needed to build a model of as many blocks as are allowed
    assert found["bytes"] < 200e6


# ---------------------------------------------------------------------------------------------------------------------
# Folders that reach out


REACHING: dict[str, dict[str, Any]] = {
    "checkpoint_path": {"model_kwargs": {"checkpoint_path": "OUTSIDE"}},
    "pretrained": {"model_kwargs": {"pretrained": True}},
    "pretrained_cfg by name": {"model_kwargs": {"pretrained": True, "pretrained_cfg": {"file": "OUTSIDE"}}},
    "pretrained_cfg": {"model_kwargs": {"pretrained_cfg": {"file": "OUTSIDE", "url": "file://OUTSIDE"}}},
    "pretrained_cfg_overlay": {"model_kwargs": {"pretrained": True, "pretrained_cfg_overlay": {"file": "OUTSIDE"}}},
    "cache_dir": {"model_kwargs": {"pretrained": True, "cache_dir": "OUTSIDE"}},
    "a module to import": {"model_kwargs": {"block_fn": "os.system"}},
    "the hub": {"model": "hf-hub:timm/vit_tiny_patch16_224"},
    "the hub, as it was called": {"model": "hf_hub:timm/vit_tiny_patch16_224"},
    "a folder": {"model": "local-dir:OUTSIDE"},
    "a folder above": {"model": "../outside"},
    "a path": {"model": "OUTSIDE"},
    "a tagged model": {"model": f"{NAME}.augreg_in21k", "model_kwargs": {"pretrained": True}},
}
SOCKETS_AND_PROCESSES = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "urllib.", "ftplib.")


def read_folders(folders: list[Path], results: connection.Connection) -> None:
    """Reads sub-networks; the answer for each: the error, and what else was opened or called on the way."""
    reached: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        is_code = event == "open" and str(arguments[0]).endswith((".py", ".pyc", ".so"))
        if (event == "open" and not is_code) or event.startswith(SOCKETS_AND_PROCESSES):
            reached.append(f"{event} {arguments[0]}")

    def read(folder: Path) -> tuple[str | None, list[str]]:
        reached.clear()
        error = None
        try:
            load_subnetwork(folder)
        except UserError as refused:
            error = str(refused)
        return error, [what for what in reached if what.partition(" ")[2] not in map(str, folder.iterdir())]

    read(folders[0])  # what is imported late is not the folder's doing
    sys.addaudithook(watch)
    results.send([read(folder) for folder in folders])


def test_a_folder_cannot_make_anything_outside_be_read(tmp_path: Path):
    config = sub_network(tmp_path / "good")
    (tmp_path / "outside").mkdir()
    shutil.copytree(tmp_path / "good", tmp_path / "outside", dirs_exist_ok=True)
    outside = str(tmp_path / "outside" / "model.safetensors")
    for number, change in enumerate(REACHING.values()):
        shutil.copytree(tmp_path / "good", tmp_path / str(number))
        reaching = config | change | {"model_kwargs": config["model_kwargs"] | change.get("model_kwargs", {})}
        (tmp_path / str(number) / "config.json").write_text(json.dumps(reaching).replace("OUTSIDE", outside))
    receive, send = FORK.Pipe(duplex=False)
    folders = [tmp_path / name for name in ("good", *map(str, range(len(REACHING))))]
    process = FORK.Process(target=read_folders, args=(folders, send))
    process.start()
    connection.wait([receive, process.sentinel], 60)
    good, *found = receive.recv()
    process.kill()
    assert good == (None, [])
    for name, (error, reached) in zip(REACHING, found, strict=True):
        assert error is not None and reached == [], name
