"""Files that are whole or absent, checkpoints that are plain data, the log of a run."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import files
import logs
from files import (
    CheckpointFolder,
    atomic_file,
    check_output_dir,
    load_checkpoint,
    read_json,
    save_checkpoint,
    weights_of,
    write_text,
)
from logs import RunLog
from utils import UserError

WEIGHTS = {"head.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.zeros(2)}


class Unplain:
    """A pickle of it runs a command when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


# ---------------------------------------------------------------------------------------------------------------------
# Whole or absent


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [RuntimeError("stopped"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    for before in ([], [path]):
        expected = UserError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected), atomic_file(path) as temporary:
            assert temporary.parent == tmp_path
            temporary.write_text("half")
            raise error
        assert list(tmp_path.iterdir()) == before
        path.write_text("old")
    assert path.read_text() == "old"


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"cannot write .*file.txt: Input/output error"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_where_no_file_can_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x.txt", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"cannot write {path}: "):
            write_text(path, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_reading_json(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"cannot read .*x.json: No such file"):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_text('{"a": ')
    with pytest.raises(UserError, match=r"x.json is not valid JSON"):
        read_json(path)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 3)
    with pytest.raises(UserError, match=r"x.json has 6 bytes, more than the 3"):
        read_json(path)


def test_an_output_folder_is_checked_and_not_made(tmp_path):
    check_output_dir(tmp_path)
    check_output_dir(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(UserError, match=r"--output-dir .*file is a file"):
            check_output_dir(folder)


def test_a_folder_without_permission_is_no_output_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"--output-dir {tmp_path}/new: no permission to write to {tmp_path}"):
        check_output_dir(tmp_path / "new")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = tmp_path / "checkpoint_3.pth"
    save_checkpoint(path, {"model": WEIGHTS, "epoch": 3, "settings": {"lr": 0.1, "names": ["a"], "ema": None}})
    state = load_checkpoint(path)
    assert same(state.pop("model"), WEIGHTS)
    assert state == {"epoch": 3, "settings": {"lr": 0.1, "names": ["a"], "ema": None}}


def test_safetensors_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path)
    assert same(load_checkpoint(path), WEIGHTS)


def test_the_authors_layout_is_read_as_data(tmp_path):
    """A Namespace and an optimizer's state beside the weights, as DeiT writes them."""
    path = tmp_path / "checkpoint_299.pth"
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(lr=5e-4, model="deit_tiny_patch16_224", betas=None, nested=argparse.Namespace(x=1))
    torch.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 299, "args": args}, path)
    state = load_checkpoint(path)
    assert same(weights_of(state, path), layer.state_dict())
    assert state["args"] == args
    assert state["epoch"] == 299
    # What is allowed is allowed while reading it, and no longer.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("where", ["alone", "beside weights", "inside a namespace"])
@pytest.mark.parametrize("how", ["torch.save", "old torch.save", "pickle"])
def test_a_pickle_that_would_run_a_command_is_refused_and_not_run(tmp_path, where, how):
    path, marker = tmp_path / "checkpoint.pth", tmp_path / "marker"
    bomb = Unplain(marker)
    state = {
        "alone": bomb,
        "beside weights": {"model": {}, "extra": bomb},
        "inside a namespace": {"model": {}, "args": argparse.Namespace(hook=bomb)},
    }[where]
    if how == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "torch.save")
    with pytest.raises(UserError, match=r"checkpoint .*checkpoint.pth .*refused, nothing in it was run"):
        load_checkpoint(path)
    assert not marker.exists()
    # It is a real one: read carelessly, it runs.
    pickle.loads(path.read_bytes()) if how == "pickle" else torch.load(path, weights_only=False)
    assert marker.exists()


NUMBERS = {
    "best_acc1": np.float64(81.85),
    "again": np.float64(81.85),
    "loss": np.float32(0.5),
    "half": np.float16(2),
    "step": np.int64(-7),
    "small": np.uint8(200),
    "big_endian": np.array([3.5], ">f8")[0],
    "done": np.bool_(True),
    "text": b"bytes of any length" * 100,
}


@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
def test_numbers_of_numpy_are_read_as_numbers(tmp_path, module):
    """Of NumPy 1, which calls its module numpy.core, and of NumPy 2."""
    path, other = tmp_path / "2.pth", tmp_path / "1.pth"
    torch.save({"model": WEIGHTS, **NUMBERS, "list": [np.float64(i) for i in range(300)]}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core", module.encode()))
    state = load_checkpoint(other)
    assert same(weights_of(state, other), WEIGHTS)
    for key, value in NUMBERS.items():
        assert state[key] == value and type(state[key]) in (float, int, bool, bytes), key
    assert state["list"] == list(range(300))


def test_a_text_that_is_encoded_again_and_again_is_refused(tmp_path):
    class Encoded:
        def __init__(self, text: str, encoding: str):
            self.arguments = text, encoding

        def __reduce__(self):
            return codecs.encode, self.arguments

    text = "x" * 17
    for state in ([Encoded(text, "latin1"), Encoded(text, "latin1")], [Encoded("x", "utf-32")], [codecs.encode]):
        torch.save({"state": state}, tmp_path / "large.pth")
        with pytest.raises(UserError, match=r"large\.pth could unpack to far more than its size"):
            load_checkpoint(tmp_path / "large.pth")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Path("runs/1"), r"pathlib\S*\.PosixPath"),
        (np.zeros(3), r"numpy\._core\.multiarray\._reconstruct"),
        (np.str_("x"), r"numpy\.U1"),
        (Unplain(Path("marker")), r"posix\.system"),
    ],
)
def test_an_object_that_is_refused_is_named_with_the_way_out(tmp_path, value, name):
    path = tmp_path / "odd.pth"
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(x=value)}, path)
    with pytest.raises(UserError, match=rf"odd\.pth holds {name}, .*refused, .*: python -c \"import torch; ") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_the_way_out_keeps_the_weights(tmp_path, monkeypatch):
    path = tmp_path / "odd.pth"
    torch.save({"model": WEIGHTS, "path": tmp_path}, path)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    monkeypatch.chdir(tmp_path)
    exec(str(caught.value).split('python -c "')[1].removesuffix('"'))
    assert same(load_checkpoint(tmp_path / "weights.pth"), WEIGHTS)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_a_torchscript_archive_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer = torch.nn.Linear(3, 2)
    torch.jit.save(torch.jit.trace(layer, torch.zeros(1, 3)), "clip.pt")
    with pytest.raises(
        UserError, match=r"clip\.pt is a TorchScript archive, .*refused, nothing in it was run"
    ) as caught:
        load_checkpoint(Path("clip.pt"))
    exec(str(caught.value).split('"')[1])
    assert torch.equal(load_checkpoint(Path("weights.pth"))["weight"], layer.weight)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 20, -20], ids=lambda keep: f"{keep} bytes")
def test_a_truncated_checkpoint_is_named(tmp_path, suffix, keep):
    path = tmp_path / f"weights{suffix}"
    save_file(WEIGHTS, path) if suffix == ".safetensors" else torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"checkpoint {path} .*damaged") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_missing_checkpoint_is_named(tmp_path):
    for path, says in ((tmp_path / "no.pth", "does not exist"), (tmp_path, "is a folder: give the file")):
        with pytest.raises(UserError, match=f"checkpoint {path} {says}"):
            load_checkpoint(path)


def test_a_checkpoint_that_is_no_dictionary(tmp_path):
    path = tmp_path / "list.pth"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(UserError, match="holds a list, not a dictionary of weights"):
        load_checkpoint(path)


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_0.pth"
    save_checkpoint(path, {"model": WEIGHTS})
    before = path.read_bytes()

    def full(state, temporary):
        temporary.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed\nmore")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*checkpoint_0.pth: .*enforce fail") as caught:
        save_checkpoint(path, {"model": {}})
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_weights_lie_bare_or_under_a_name():
    path, other = Path("x.pth"), {"head.weight": torch.ones(1)}
    for state in (
        WEIGHTS,
        {"model": WEIGHTS, "epoch": 3},
        {"state_dict": WEIGHTS, "optimizer": {}},
        {"model": WEIGHTS, "model_ema": other},
        {"model": WEIGHTS, "state_dict": other},
        {"model": {f"module.{key}": value for key, value in WEIGHTS.items()}},
        {f"module.{key}": value for key, value in WEIGHTS.items()},
        {f"module._orig_mod.{key}": value for key, value in WEIGHTS.items()},
        {f"_orig_mod.module.{key}": value for key, value in WEIGHTS.items()},
    ):
        assert same(weights_of(state, path), WEIGHTS)
    for name in ("model_ema", "state_dict_ema"):
        assert same(weights_of({"model": other, name: WEIGHTS}, path, use_ema=True), WEIGHTS)
        averaged = {f"module.{key}": value for key, value in WEIGHTS.items()}
        assert same(weights_of({"state_dict": other, name: averaged}, path, use_ema=True), WEIGHTS)
    # A tensor under the key "model" is a parameter of that name, not a state dict inside another.
    assert same(weights_of({"model": torch.ones(2)}, path), {"model": torch.ones(2)})


@pytest.mark.parametrize(
    "state",
    [{}, {"model": {}}, {"epoch": 3}, {"model": {"head": 3}}, {"optimizer": {"state": {}}}, {0: torch.ones(1)}],
    ids=str,
)
def test_a_checkpoint_without_weights_is_named(state):
    with pytest.raises(UserError, match=r"checkpoint x\.pth holds no weights"):
        weights_of(state, Path("x.pth"))


def test_averaged_weights_that_are_not_there():
    for state in ({"model": WEIGHTS}, WEIGHTS, {"model": WEIGHTS, "model_ema": None}):
        with pytest.raises(UserError, match=r"x\.pth holds no averaged weights"):
            weights_of(state, Path("x.pth"), use_ema=True)


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoints of a run


def run_state(epoch: int) -> dict:
    return {"model": WEIGHTS, "optimizer": {}, "epoch": epoch, "step": 10 * epoch}


def test_the_last_two_the_best_and_every_so_many_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path, {"lr": 1}, keep_every=4)
    (tmp_path / "checkpoint_x.pth").write_text("not ours")
    for epoch in range(11):
        folder.save(epoch, run_state(epoch), best_epoch=min(epoch, 1))
    assert folder.epochs() == [1, 3, 7, 9, 10]
    assert (tmp_path / "checkpoint_x.pth").exists()
    without = CheckpointFolder(tmp_path / "other", {})
    for epoch in range(5):
        without.save(epoch, run_state(epoch), best_epoch=None)
    assert without.epochs() == [3, 4]


def test_resuming_takes_the_newest_whole_checkpoint(tmp_path, capsys):
    folder = CheckpointFolder(tmp_path, {"lr": 1})
    assert folder.to_resume(None) is None
    assert folder.to_resume("auto") is None
    assert "a fresh start" in capsys.readouterr().out
    for epoch in (8, 9, 10):
        folder.save(epoch, run_state(epoch), best_epoch=8)
    path = tmp_path / "checkpoint_10.pth"
    assert folder.to_resume("auto")["epoch"] == 10
    path.write_bytes(path.read_bytes()[:100])
    assert folder.to_resume("auto")["epoch"] == 9
    assert "skipping checkpoint_10.pth: checkpoint" in capsys.readouterr().out
    assert folder.to_resume(str(tmp_path / "checkpoint_8.pth"))["epoch"] == 8
    with pytest.raises(UserError, match=r"checkpoint_10\.pth"):
        folder.to_resume(str(path))


def test_a_run_with_other_settings_does_not_go_on(tmp_path):
    CheckpointFolder(tmp_path, {"lr": 1, "stage": "piad"}).save(0, run_state(0), None)
    for resume in ("auto", str(tmp_path / "checkpoint_0.pth")):
        with pytest.raises(UserError, match=r"checkpoint_0.pth is of a run with lr 1, this one has 2"):
            CheckpointFolder(tmp_path, {"stage": "piad", "lr": 2}).to_resume(resume)


def test_a_checkpoint_with_one_bit_of_a_weight_changed_is_not_whole(tmp_path, capsys):
    """torch reads it without a word."""
    folder = CheckpointFolder(tmp_path, {})
    for epoch in range(2):
        folder.save(epoch, run_state(epoch) | {"model": {"weight": torch.full((64,), 3.0)}}, None)
    path = tmp_path / "checkpoint_1.pth"
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((64,), 3.0).numpy().tobytes()) + 40] ^= 1
    path.write_bytes(content)
    assert not torch.load(path, weights_only=True)["model"]["weight"].eq(3).all()
    with pytest.raises(UserError, match=r"checkpoint_1\.pth is damaged: .* has another checksum"):
        load_checkpoint(path)
    assert folder.to_resume("auto")["epoch"] == 0
    assert "skipping checkpoint_1.pth" in capsys.readouterr().out


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2, 3, device="meta"), torch.eye(3).to_sparse(), torch.zeros(1).expand(6)],
    ids=["without numbers", "sparse", "of fewer numbers"],
)
def test_a_tensor_must_have_all_its_numbers(tensor, tmp_path):
    torch.save({"state": [{"weight": tensor}]}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"'state.0.weight' is not a plain tensor with all its elements"):
        load_checkpoint(tmp_path / "odd.pth")


def test_weights_alone_are_no_run_to_resume(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": WEIGHTS}, path)
    with pytest.raises(UserError, match="no training run to resume: it has no optimizer"):
        CheckpointFolder(tmp_path, {}).to_resume(str(path))


# ---------------------------------------------------------------------------------------------------------------------
# The log


def epochs_of(folder: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


def write_epochs(folder: Path, start: int, end: int) -> None:
    log = RunLog(folder, start, start * 10)
    for epoch in range(start, end):
        log.scalars({"train/loss": 0.5}, epoch * 10)
        log.epoch({"epoch": epoch, "loss": epoch / 10 + start}, epoch * 10 + 9, shown=False)
    log.flush()
    log.close()


def test_a_line_an_epoch(tmp_path, capsys):
    write_epochs(tmp_path, 0, 3)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"epoch": e, "loss": e / 10} for e in range(3)]
    assert capsys.readouterr().out == ""
    RunLog(tmp_path, 3, 30).epoch({"epoch": 3, "loss": 0.3, "top1": 98.25}, 39)
    assert capsys.readouterr().out == "epoch 3 loss 0.3 top1 98.25\n"
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_resumed_run_drops_the_epochs_it_does_again(tmp_path):
    write_epochs(tmp_path, 0, 5)
    write_epochs(tmp_path, 3, 6)
    assert epochs_of(tmp_path) == [0, 1, 2, 3, 4, 5]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert losses == pytest.approx([0.0, 0.1, 0.2, 3.3, 3.4, 3.5])
    write_epochs(tmp_path, 0, 1)
    assert epochs_of(tmp_path) == [0]


def test_a_line_that_was_cut_short_does_not_stop_a_resumed_run(tmp_path):
    write_epochs(tmp_path, 0, 3)
    path = tmp_path / "log.txt"
    path.write_text(path.read_text()[:-5])
    write_epochs(tmp_path, 2, 4)
    assert epochs_of(tmp_path) == [0, 1, 2, 3]


def test_other_ranks_write_no_log(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "is_main_process", lambda: False)
    write_epochs(tmp_path, 0, 2)
    assert list(tmp_path.iterdir()) == []
