"""Files that are nearly right: each loads as what it says, or is refused with our own error, and quickly.

HYPOTHESIS_PROFILE=long tries ten times as many; each profile's number is over all the tests here.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import MODEL_KWARGS, NAME, assert_same, load_subnetwork, save_subnetwork, tiny_digits_model
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3

import datasets
from engine import train_one_epoch
from files import CheckpointFolder, load_checkpoint
from models.backbone import full_widths
from models.elastic import make_elastic
from models.extraction import extract
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout
from training import Progress, Training
from utils import UserError

TESTS = 6  # that share a profile's examples
settings.register_profile("short", deadline=None, database=None, max_examples=200 // TESTS, derandomize=True)
settings.register_profile("long", deadline=None, database=None, max_examples=2000 // TESTS + 1, print_blob=True)
fuzz = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

CPU = torch.device("cpu")
FULL = {"0.attn": 16, "0.mlp": 192, "1.attn": 16, "1.mlp": 192}
WIDTHS = {"0.attn": 8, "0.mlp": 48, "1.attn": 0, "1.mlp": 192}


# ---------------------------------------------------------------------------------------------------------------------
# Making a good file a little wrong

ODD = [
    None,
    True,
    "8",
    "",
    -1,
    0,
    7,
    1.5,
    1e300,
    float("nan"),
    10**12,
    2**70,
    [],
    [1],
    {},
    {"0": 1},
    "0.attn",
    "\ud800",
]


class Mutation:
    """What became of a good file's content; shown as what was done to it."""

    def __init__(self, content: Any, done: list[str]):
        self.content, self.done = content, done

    def __repr__(self) -> str:
        return f"<{'; '.join(self.done)}>"


class Doubled(dict):
    """A dictionary that JSON is to show with one of its keys twice: `double` is the second (key, value)."""

    double: tuple[str, Any]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of everything inside a nest of dictionaries and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def mutated(draw: st.DrawFn, whole: Any, odd: list[Any] = ODD, more: tuple[str, ...] = ()) -> Mutation:
    """A copy of a nest of dictionaries and lists with one to three things dropped, doubled, retyped or swapped.

    odd: what a thing may become; more: keys that a dictionary may get.
    """
    whole, done = copy.deepcopy(whole), []
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(whole))
        if not paths:
            break
        # First how deep, or the many small things at the bottom would be nearly all that is tried.
        depth = draw(st.sampled_from(sorted({len(path) for path in paths})))
        *above, key = draw(st.sampled_from([path for path in paths if len(path) == depth]))
        parent = at(whole, tuple(above))
        other = at(whole, draw(st.sampled_from(paths)))
        new = copy.deepcopy(draw(st.sampled_from([*odd, other])))
        how = draw(st.sampled_from(["drop", "double", "retype", "nudge", "add"]))
        done.append(f"{how} {[*above, key]} {str(new)[:40]}")
        if how == "drop":
            del parent[key]
        elif how == "double" and isinstance(parent, list):
            parent.insert(key, parent[key])
        elif how == "double":
            parent = _replace(whole, above, Doubled(parent))
            parent.double = key, new
        elif how == "add" and isinstance(parent, dict) and more:
            parent[draw(st.sampled_from(more))] = new
        elif how == "nudge" and type(parent[key]) in (int, float):
            parent[key] += draw(st.sampled_from([-1, 1, 0.5]))
        else:
            parent[key] = new
    return Mutation(whole, done)


def _replace(whole: Any, path: list, value: Any) -> Any:
    if path:
        at(whole, tuple(path[:-1]))[path[-1]] = value
    return value


def as_json(value: Any) -> str:
    if isinstance(value, dict):
        pairs = [*value.items(), *([value.double] if isinstance(value, Doubled) else [])]
        return "{" + ", ".join(f"{json.dumps(key)}: {as_json(inner)}" for key, inner in pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_json, value)) + "]"
    return json.dumps(value)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> Mutation:
    """Bytes cut short, with some flipped, a piece missing, or a piece twice."""
    how = draw(st.sampled_from(["truncate", "flip", "drop", "double"]))
    start = draw(st.integers(0, len(content) - 1))
    # Where a file says what it holds: at its beginning, and a .pth at its end.
    start = draw(st.sampled_from([start, start % 512, len(content) - 1 - start % 2048]))
    end = min(len(content), start + draw(st.integers(1, 300)))
    if how == "flip":
        piece = bytearray(content[start:end])
        for position in draw(st.lists(st.integers(0, len(piece) - 1), min_size=1, max_size=3)):
            piece[position] ^= draw(st.integers(1, 255))
        new = content[:start] + piece + content[end:]
    elif how == "truncate":
        new = content[:start]
    else:
        new = content[:start] + (content[start:end] * 2 if how == "double" else b"") + content[end:]
    return Mutation(new, [f"{how} bytes {start} to {end} of {len(content)}"])


def mutated_json(content: Any, more: tuple[str, ...] = ()) -> st.SearchStrategy[bytes]:
    """The bytes of a JSON file that is a little wrong, in what it says or as a file."""
    mutations = st.one_of(mutated(content, more=more), damaged(as_json(content).encode()))
    return mutations.map(lambda m: m.content if isinstance(m.content, bytes) else as_json(m.content).encode())


def strictly(text: bytes) -> Any:
    """What a JSON file says; a ValueError for one that says nothing, or one thing twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    return json.loads(text.decode(), object_pairs_hook=once)


def loaded(load: Callable[[], Any]) -> Any:
    """What load() gives, None where it refuses; any other error of it is the test's failure."""
    try:
        return load()
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, error
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------------------------------------------------------------
# Mask tables

TABLE = MaskTable([FULL, FULL | {"0.mlp": 96}, WIDTHS | {"0.attn": 16}, WIDTHS], {"model": NAME, "macs": [4, 3, 2, 1]})


def table_says(table: MaskTable, said: dict[str, Any]) -> None:
    """The table holds each width of the file, and no other op code or module."""
    columns = {key: column for key, column in said.items() if key != "meta"}
    assert table.meta == said.get("meta", {})
    for key, column in columns.items():
        assert [table.widths(int(code))[key] for code in column] == list(column.values())
        assert all(type(width) is int for width in column.values())
    codes = {int(code) for column in columns.values() for code in column}
    last = {key: column["-1"] for key, column in columns.items() if "-1" in column}
    assert len(table) - len(codes - {-1}) in ((0, 1) if last and last == table.rows[-1] else (0,))
    assert all(row.keys() == columns.keys() for row in table.rows)
    again = MaskTable.from_json(table.to_json())
    assert again == table


@fuzz
@given(data=st.data())
def test_a_mask_table_is_read_as_it_is_written_or_refused(data: st.DataObject, folder: Path):
    content = data.draw(mutated_json(TABLE.to_json()))
    path = folder / "mask_table.json"
    path.write_bytes(content)
    table = loaded(lambda: MaskTable.load(path))
    if table is not None:
        table_says(table, strictly(content))
        loaded(lambda: table.check(FULL, NAME))


def test_a_good_table_is_read(folder: Path):
    """So that to refuse everything is no way out."""
    path = folder / "mask_table.json"
    path.write_text(as_json(TABLE.to_json()))
    table_says(MaskTable.load(path), TABLE.to_json())


# ---------------------------------------------------------------------------------------------------------------------
# Sub-networks


# What shapes a vision transformer, and what timm would take as well.
TIMM_ARGUMENTS = (*inspect.signature(VisionTransformer.__init__).parameters, "pretrained", "cache_dir")


@functools.cache
def sub_network(folder: Path) -> dict[str, Any]:
    """Writes a sub-network; its config."""
    model = extract(tiny_digits_model().eval(), WIDTHS)
    preprocessing = datasets.preprocessing(model, {})
    save_subnetwork(
        folder, model, name=NAME, model_kwargs=MODEL_KWARGS, preprocessing=preprocessing, op_code=3, data_set="digits"
    )
    return json.loads((folder / "config.json").read_text())


def sub_network_says(folder: Path, said: dict[str, Any], val: Any) -> None:
    """The model has the sizes of the config and the weights of the file, all of them; and it runs on its images."""
    model, config = load_subnetwork(folder)
    assert_same(json.dumps(config), json.dumps(said))
    assert full_widths(model) == said["widths"]
    assert_same(dict(model.state_dict()), load_checkpoint(folder / "model.safetensors"))
    kwargs = said["model_kwargs"]
    found = {"depth": len(model.blocks), "embed_dim": model.embed_dim, "in_chans": model.in_chans}
    found |= {"num_classes": model.num_classes, "patch_size": model.patch_embed.patch_size[0]}
    found["num_heads"] = model.blocks[0].attn.num_heads
    given = {key for key, value in kwargs.items() if value is not None}  # to timm, None is as if nothing were given
    assert all(kwargs[key] in (value, [value] * 2) for key, value in found.items() if key in given)
    images, _ = next(iter(datasets.eval_loader(val, config["preprocessing"], batch_size=2, workers=0)))
    assert model(images).shape == (2, model.num_classes)


@fuzz
@given(data=st.data())
def test_a_sub_network_is_read_as_it_is_written_or_refused(data: st.DataObject, folder: Path):
    config, val = sub_network(folder / "good"), open_val()
    content = data.draw(mutated_json(config, TIMM_ARGUMENTS))
    shutil.copytree(folder / "good", folder / "bad", dirs_exist_ok=True)
    (folder / "bad" / "config.json").write_bytes(content)
    if loaded(lambda: load_subnetwork(folder / "bad")) is not None:
        sub_network_says(folder / "bad", strictly(content), val)


@functools.cache
def open_val() -> Any:
    return datasets.open_images("digits", None, "val")


def test_a_good_sub_network_is_read(folder: Path):
    sub_network_says(folder / "good", sub_network(folder / "good"), open_val())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, byte by byte


@functools.cache
def small_state() -> dict[str, Any]:
    """A state as a run's checkpoint holds it, of a model of a few numbers."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(5)).sum().backward()
    optimizer.step()
    return {"model": dict(layer.state_dict()), "optimizer": optimizer.state_dict(), "epoch": 2, "name": "x" * 40}


def as_bytes(state: Any) -> bytes:
    """The .pth, whose content torch.save() otherwise lets depend on the file's name."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@fuzz
@given(data=st.data())
def test_a_damaged_checkpoint_is_read_as_it_was_or_refused(data: st.DataObject, folder: Path):
    """A .pth has a checksum of all it holds: damage that goes unnoticed would be a wrong weight."""
    state, path = small_state(), folder / "checkpoint.pth"
    path.write_bytes(data.draw(damaged(as_bytes(state))).content)
    found = loaded(lambda: load_checkpoint(path))
    if found is not None:
        assert_same(found, state)


def safetensors_says(content: bytes) -> dict[str, np.ndarray]:
    """What a .safetensors file says, read by hand from its format: length of the header, JSON, numbers."""
    (length,) = struct.unpack("<Q", content[:8])
    header, numbers = strictly(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    kinds = {"F32": "<f4", "I32": "<i4", "U32": "<u4", "F16": "<f2", "I16": "<i2", "U16": "<u2", "I8": "i1", "U8": "u1"}
    kinds |= {"F64": "<f8", "I64": "<i8", "U64": "<u8", "BOOL": "u1"}
    return {
        name: np.frombuffer(numbers[slice(*entry["data_offsets"])], kinds[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


@fuzz
@given(data=st.data())
def test_a_damaged_safetensors_file_is_read_as_it_says_or_refused(data: st.DataObject, folder: Path):
    """It has no checksum: damage to a number is another number, which is then what the file says."""
    path = folder / "weights.safetensors"
    save_file(small_state()["model"], path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header, numbers = json.loads(path.read_bytes()[8 : 8 + length]), path.read_bytes()[8 + length :]
    if data.draw(st.booleans()):
        content = data.draw(damaged(path.read_bytes())).content
    else:
        header = as_json(data.draw(mutated(header)).content).encode()
        content = struct.pack("<Q", len(header)) + header + numbers
    path.write_bytes(content)
    found = loaded(lambda: load_checkpoint(path))
    if found is not None:
        says = safetensors_says(content)
        assert found.keys() == says.keys()
        for name, value in found.items():
            assert value.numpy().shape == says[name].shape and value.numpy().tobytes() == says[name].tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, thing by thing

SETTINGS = {"stage": "piad", "lr": 1e-3, "scale": [0.8, 1.0], "model_kwargs": MODEL_KWARGS, "clip_grad": None}
IMAGES = torch.linspace(-1, 1, 4 * 16 * 16).reshape(4, 1, 16, 16), torch.arange(4)
PIAD = {"ratio": 0.8, "epochs": 2, "seed": 0}


def new_training() -> Training:
    """A run's, all of whose parts have a state, before its first step."""
    torch.manual_seed(0)
    model = make_elastic(tiny_digits_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler, ema = torch.amp.GradScaler("cpu"), ModelEmaV3(model)
    return Training(model, optimizer, torch.nn.CrossEntropyLoss(), CPU, 0, scaler=scaler, ema=ema)


def train_a_step(training: Training, piad: ProgressiveDropout, progress: Progress) -> None:
    epoch, step = progress.epoch, progress.step
    train_one_epoch(training, [IMAGES], epoch, steps=step + 1, start_step=step, losses=progress.losses, regime=piad)
    progress.step += 1


@functools.cache
def run_state() -> dict[str, Any]:
    """What the checkpoint of a run holds that has done two steps."""
    training, progress = new_training(), Progress(best_epoch=0, best_score=12.5)
    piad = ProgressiveDropout(training.model, [IMAGES], **PIAD, table=None)
    piad.begin_epoch(0)
    for _ in range(2):
        train_a_step(training, piad, progress)
    return {**training.state_dict(), **progress.state_dict(), **piad.state_dict(), "settings": SETTINGS}


def resumed(path: Path) -> tuple[Training, ProgressiveDropout, Progress]:
    """What main.py goes on with, by the same calls in the same order."""
    state = CheckpointFolder(path.parent, SETTINGS).to_resume(str(path))
    training = new_training()
    table = MaskTable.from_json(state.get("mask_table"))
    piad = ProgressiveDropout(training.model, [IMAGES], **PIAD, table=table)
    training.load_state_dict(state)
    return training, piad, Progress.from_state(state)


def alike(found: Any, expected: Any) -> bool:
    """Of the same keys, lengths, types and shapes; a whole number is a number, too."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(alike(value, expected[key]) for key, value in found.items())
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(alike, found, expected))
    if isinstance(expected, torch.Tensor):
        return (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return type(found) is type(expected) or (type(found), type(expected)) == (int, float)


def equal(found: Any, said: Any) -> bool:
    """The same keys and numbers; types are alike()'s affair."""
    if isinstance(found, dict):
        return found.keys() == said.keys() and all(equal(value, said[key]) for key, value in found.items())
    if isinstance(found, list | tuple):
        return len(found) == len(said) and all(map(equal, found, said))
    if isinstance(found, torch.Tensor):
        return torch.equal(found, said)
    return found == said or (found != found and said != said)


def state_says(resumption: tuple[Training, ProgressiveDropout, Progress], said: dict[str, Any]) -> None:
    """All that the run goes on with is what the checkpoint says, and is made as a run's state is; and it goes on."""
    training, piad, progress = resumption
    found, whole = {**training.state_dict(), **progress.state_dict()}, run_state()
    table_says(piad.table, said["mask_table"])
    if len(said["losses"]) != 1 or said["step"] == 0:  # of other ranks, or of an epoch that is done
        assert found.pop("losses") == [[0, 0]]
    if found["best_epoch"] is None:
        found.pop("best_epoch")
        assert said["best_epoch"] is None
    # A parameter may have been in no sub-network so far.
    entries = whole["optimizer"]["state"]
    entries = {index: entries[index] for index in found["optimizer"]["state"]}
    made = {key: whole[key] for key in found} | {"optimizer": whole["optimizer"] | {"state": entries}}
    assert alike(found, made)
    assert all(equal(value, said[key]) for key, value in found.items())
    assert said["settings"].keys() >= {key for key, value in SETTINGS.items() if value is not None}
    assert all(said["settings"].get(key) == value for key, value in SETTINGS.items())
    loaded(lambda: (piad.begin_epoch(1), train_a_step(*resumption)))


def undoubled(value: Any) -> Any:
    """Plain dictionaries, without what only JSON can say twice."""
    if isinstance(value, dict):
        return {key: undoubled(inner) for key, inner in value.items()}
    return [undoubled(inner) for inner in value] if isinstance(value, list) else value


ODD_TENSORS = [torch.zeros(3), torch.ones(48), torch.zeros((), dtype=torch.long), torch.ones(48, dtype=torch.half)]
TORCHS = ("model", "model_ema", "optimizer", "scaler")  # whose content torch loads and checks


def mutated_state(data: st.DataObject, keys: set[str]) -> dict[str, Any]:
    """The state of a run of which these parts are a little wrong."""
    state = run_state()
    part = {key: state[key] for key in state if key in keys}
    wrong = data.draw(mutated(part, [*ODD, *ODD_TENSORS], more=("model", "epoch", 0)))
    return {key: state[key] for key in state if key not in keys} | undoubled(wrong.content)


@fuzz
@given(data=st.data())
def test_torchs_parts_of_a_checkpoint_are_loaded_or_refused(data: st.DataObject, folder: Path):
    """Whatever torch raises for weights, optimizer and scaler of another run is one line."""
    torch.save(mutated_state(data, {*TORCHS}), folder / "checkpoint_0.pth")
    loaded(lambda: resumed(folder / "checkpoint_0.pth"))


@fuzz
@given(data=st.data())
def test_a_checkpoint_that_is_a_little_wrong_is_resumed_as_it_says_or_refused(data: st.DataObject, folder: Path):
    state = mutated_state(data, run_state().keys() - {*TORCHS})
    path = folder / "checkpoint_0.pth"
    torch.save(state, path)
    resumption = loaded(lambda: resumed(path))
    if resumption is not None:
        state_says(resumption, state)


def test_a_good_checkpoint_is_resumed(folder: Path):
    torch.save(run_state(), folder / "checkpoint_0.pth")
    state_says(resumed(folder / "checkpoint_0.pth"), run_state())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epoch": -1}, "epoch is -1"),
        ({"epoch": 2**70}, "epoch is 1180591620717411303424"),
        ({"step": True}, "step is True"),
        ({"best_epoch": 0.5}, "best_epoch is 0.5"),
        ({"best_score": None}, "float.. argument must be .* not 'NoneType'"),
        ({"losses": [[1.0, 0.0]]}, "losses of 0.0 images at step 2"),
        ({"losses": {}}, "of another run"),
        ({"skipped_steps": -1}, "skipped_steps is -1"),
        ({"settings": SETTINGS | {"lr": torch.ones(48)}}, "is of a run with lr tensor"),
        ({"settings": SETTINGS | {"scale": [torch.ones(2), 1.0]}}, "is of a run with scale"),
        ({"mask_table": {key: {"0": width - 1} for key, width in FULL.items()}}, "0.attn has width 15 at op code 0"),
    ],
)
def test_a_checkpoint_with_what_no_run_has_is_refused(change: dict[str, Any], said: str, folder: Path):
    torch.save(run_state() | change, folder / "checkpoint_0.pth")
    with pytest.raises(UserError, match=said):
        resumed(folder / "checkpoint_0.pth")


@pytest.mark.parametrize("key", ["mask_table", "losses", "best_epoch", "scaler", "model_ema", "settings"])
def test_a_checkpoint_without_a_part_is_refused(key: str, folder: Path):
    torch.save({name: value for name, value in run_state().items() if name != key}, folder / "checkpoint_0.pth")
    with pytest.raises(UserError, match=key.replace("_", ".")):
        resumed(folder / "checkpoint_0.pth")
