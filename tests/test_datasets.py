"""Data: the splits, augmentation that depends on the place of the image, shares of ranks, folders, errors."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from programs import MODEL, run, tiny_digits_model
from timm.data import IterableImageDataset
from timm.data.auto_augment import rand_augment_choices, rand_augment_ops
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torch.utils.data._utils import signal_handling

import datasets
from datasets import (
    Digits,
    Images,
    TrainLoader,
    eval_loader,
    open_images,
    open_splits,
    preprocessing,
    proxy_set,
)
from utils import UserError, seed_everything

CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bilinear",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
# Everything random that the recipe has, so that an image's draws are many.
AUGMENTATION = {
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.3,
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "hflip": 0.5,
    "re_prob": 0.5,
    "re_mode": "pixel",
}


def test_the_default_augmentation_runs_at_any_strength():
    """RandAugment now and then keeps 0 bits of a colour, which Pillow 13 refuses."""
    for strength in (0, 10):
        for operation in rand_augment_ops(strength, 1.0, transforms=rand_augment_choices("", increasing=True)):
            assert operation(Image.new("RGB", (4, 4), "red")).size == (4, 4)


class Plain(Dataset):
    """Images that can be told apart after the evaluation transform: image i is grey level i, target i."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (20, 20), index), index


def digits(count: int = 48) -> Images:
    return open_images("digits", None, "train").subset(range(count))


def train_loader(images: Images, **more: Any) -> TrainLoader:
    arguments = {"batch_size": 8, "workers": 0, "seed": 5, **more}
    return TrainLoader(images, CONFIG, AUGMENTATION, **arguments)


def epoch_of(loader: TrainLoader, epoch: int = 0, start_step: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(loader.batches(epoch, start_step))


def same(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(found, expected, strict=False)
    return len(found) == len(expected) and all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def act_as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    monkeypatch.setattr(datasets, "world", lambda: (rank, ranks))


# ---------------------------------------------------------------------------------------------------------------------
# The embedded digits and the proxy set


def test_digits_are_split_once_and_for_all():
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val)) == (1437, 360)
    np.random.seed(7)
    random.seed(7)
    for split, first in (("train", train), ("val", val)):
        again = Digits(split)
        np.testing.assert_array_equal(again.images, first.images)
        np.testing.assert_array_equal(again.labels, first.labels)


def test_digits_split_loses_no_image_and_shares_none():
    from sklearn.datasets import load_digits

    parts = [Counter(image.tobytes() for image in Digits(split).images) for split in ("train", "val")]
    assert parts[0] + parts[1] == Counter(image.tobytes() for image in load_digits().images)


def test_digits_split_is_stratified():
    from sklearn.datasets import load_digits

    whole = np.bincount(load_digits().target)
    val = np.bincount(Digits("val").labels)
    assert np.abs(val - whole * 360 / 1797).max() <= 1


def test_digits_images_use_the_whole_grey_range():
    train = Digits("train")
    image, label = train[3]
    np.testing.assert_array_equal(np.asarray(image), np.floor(train.images[3] * 255 / 16))
    assert label == train.labels[3] and isinstance(label, int)
    assert np.asarray(Digits("train")[0][0]).dtype == np.uint8


def test_proxy_set_is_fixed_by_the_seed():
    images = Images(Plain(200), 200)
    first, again, other = (proxy_set(images, 50, seed).indices for seed in (3, 3, 4))
    assert first == again != other
    assert len(set(first)) == 50 and set(first) <= set(range(200))
    seed_everything(9)
    assert proxy_set(images, 50, 3).indices == first


def test_proxy_set_of_a_subset_stays_in_it():
    images = Images(Plain(200), 200).subset(range(100, 160))
    assert set(proxy_set(images, 60, 0).indices) == set(range(100, 160))


def test_proxy_set_has_a_transform_of_its_own():
    images = digits()
    proxy = proxy_set(images, 8, 0)
    loader = train_loader(images)
    proxy_batches = eval_loader(proxy, CONFIG, batch_size=8, workers=0)
    first = next(iter(proxy_batches))[0]
    assert len(epoch_of(loader)) == 6
    assert images.transform is not proxy.transform
    torch.testing.assert_close(next(iter(proxy_batches))[0], first, rtol=0, atol=0)
    # And the other way round: the evaluation transform has not replaced the training one.
    assert not same(epoch_of(loader, 0), epoch_of(loader, 1))


def test_a_proxy_set_larger_than_the_data_is_the_data(capsys):
    proxy = proxy_set(Images(Plain(200), 200).subset(range(100, 148)), 49, 0)
    assert list(proxy.indices) == list(range(100, 148))
    said = capsys.readouterr().out
    assert said == "--proxy-samples 49 is more than the 48 training images: all of them are used\n"


def test_stages_without_a_proxy_set_ask_for_no_images(tmp_path: Path, capsys):
    short = ["--data-set", "folder", "--data-path", make_folder(tmp_path / "data"), "--batch-size", 2, "--epochs", 1]
    short += ["--workers", 0, "--device", "cpu", "--warmup-epochs", 0, "--repeated-aug", 0]
    run("main.py", "--stage", "pretrain", *MODEL, *short, "--output-dir", tmp_path / "pretrained")
    assert "--proxy-samples" not in capsys.readouterr().out
    run("reparam.py", *short[:6], "--workers", 0, "--device", "cpu", "--no-eval", "--method", "best", "--mask-table",
        "--checkpoint", tmp_path / "pretrained/checkpoint_0.pth", "--output-dir", tmp_path / "contracted")  # fmt: skip
    assert "--proxy-samples 1024 is more than the 4 training images" in capsys.readouterr().out
    assert json.loads((tmp_path / "contracted/contracted.json").read_text())["proxy_samples"] == 4
    run("main.py", "--stage", "finetune", *short, "--checkpoint", tmp_path / "contracted", "--op-code", 1,
        "--output-dir", tmp_path / "tuned")  # fmt: skip
    assert "--proxy-samples" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Training batches


@pytest.mark.parametrize("repeats", [0, 3])
def test_batches_do_not_hang_on_the_number_of_workers(repeats: int):
    expected = epoch_of(train_loader(digits(), repeats=repeats))
    assert same(epoch_of(train_loader(digits(), repeats=repeats, workers=2)), expected)
    assert len(expected) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_be_entered_in_its_middle(workers: int):
    whole = train_loader(digits(), workers=workers)
    expected = epoch_of(whole, 1)
    entered = train_loader(digits(), workers=workers)
    assert same(epoch_of(entered, 1, start_step=4), expected[4:])
    assert same(epoch_of(entered, 1), expected)  # and the next epoch starts at its start again
    assert entered.steps == whole.steps == 6


def test_batches_do_not_hang_on_what_was_drawn_before():
    loader = train_loader(digits())
    expected = epoch_of(loader, 2)
    seed_everything(1234)
    epoch_of(loader, 0)
    assert same(epoch_of(loader, 2), expected)


@pytest.mark.parametrize("repeats", [0, 3])
def test_epochs_and_seeds_draw_apart(repeats: int):
    loader = train_loader(digits(), repeats=repeats)
    assert not same(epoch_of(loader, 0), epoch_of(loader, 1))
    assert not same(epoch_of(loader, 0), epoch_of(train_loader(digits(), repeats=repeats, seed=6), 0))


def test_the_order_of_the_images_hangs_on_epoch_and_seed():
    orders = {}
    for seed in (5, 8):
        loader = train_loader(digits(), seed=seed)
        for epoch in (0, 1):
            loader.batches(epoch)
            orders[seed, epoch] = [index for _, index in loader.sampler]
    assert all(sorted(order) == list(range(48)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4


@pytest.mark.parametrize("repeats", [0, 3])
@pytest.mark.parametrize("ranks", [2, 3])
def test_one_process_sees_what_several_see_together(monkeypatch: pytest.MonkeyPatch, ranks: int, repeats: int):
    shares = []
    for rank in range(ranks):
        act_as_rank(monkeypatch, rank, ranks)
        shares.append(epoch_of(train_loader(digits(), repeats=repeats, batch_size=4)))
    act_as_rank(monkeypatch, 0, 1)
    alone = epoch_of(train_loader(digits(), repeats=repeats, batch_size=4 * ranks))
    together = []
    for step in zip(*shares, strict=True):  # rank 0's first, rank 1's first, ..., rank 0's second
        images, targets = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*step, strict=True))
        together.append((images, targets))
    assert same(together, alone)
    assert len(alone) == 48 // (4 * ranks)


def test_repeated_augmentation_gives_different_augmentations_of_one_image():
    loader = train_loader(digits(), repeats=3, batch_size=12)
    images, targets = epoch_of(loader)[0]
    order = [index for _, index in loader.sampler][:12]
    for start in range(0, 12, 3):
        assert len(set(order[start : start + 3])) == 1
        assert len(set(targets[start : start + 3].tolist())) == 1
        first, second, third = images[start : start + 3]
        assert not (torch.equal(first, second) or torch.equal(first, third) or torch.equal(second, third))
    assert len(set(order)) == 4


def test_repeated_augmentation_spreads_an_image_over_the_ranks(monkeypatch: pytest.MonkeyPatch):
    orders = []
    for rank in range(3):
        act_as_rank(monkeypatch, rank, 3)
        orders.append([index for _, index in train_loader(digits(), repeats=3).sampler])
    assert orders[0] == orders[1] == orders[2]
    assert len(set(orders[0])) == len(orders[0]) == 16


def test_a_batch_larger_than_the_data_is_an_error():
    with pytest.raises(UserError, match=r"--batch-size 49 is more than the 48 training images"):
        train_loader(digits(), batch_size=49)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation batches


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_shows_each_image_once(monkeypatch: pytest.MonkeyPatch, ranks: int):
    seen: list[int] = []
    for rank in range(ranks):
        act_as_rank(monkeypatch, rank, ranks)
        for images, targets in eval_loader(Images(Plain(50), 50), CONFIG, batch_size=8, workers=0):
            levels = (images * 255).round()
            assert torch.equal(levels, targets.view(-1, 1, 1, 1).expand_as(images).float())  # the right image
            seen += targets.tolist()
    assert sorted(seen) == list(range(50))


def test_evaluation_keeps_the_order():
    batches = list(eval_loader(Images(Plain(20), 20), CONFIG, batch_size=8, workers=0))
    assert torch.cat([targets for _, targets in batches]).tolist() == list(range(20))


def test_preprocessing_takes_the_models_size_and_channels():
    config = preprocessing(tiny_digits_model(), {"mean": None, "std": None, "crop_pct": 0.7})
    assert config["input_size"] == (1, 16, 16) and config["crop_pct"] == 0.7
    assert len(config["mean"]) == len(config["std"]) == 1
    colour = preprocessing(tiny_digits_model(in_chans=3), {"mean": [0.1, 0.2, 0.3]})
    assert tuple(colour["mean"]) == (0.1, 0.2, 0.3) and colour["input_size"] == (3, 16, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def make_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 2, ending: str = "png") -> Path:
    """An ImageNet-like folder with train/ and val/; image k of a class is one colour."""
    for split in ("train", "val"):
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(each):
                Image.new("RGB", (20, 20), (50 * number, 60 * k, 9)).save(folder / f"{k}.{ending}")
    return root


def test_a_loading_process_survives_a_stop_signal_at_its_start(monkeypatch: pytest.MonkeyPatch):
    """The signal comes after torch has set its handlers, of which SIGTERM's would end the process, and before ours."""
    set_handlers = signal_handling._set_worker_signal_handlers

    def set_handlers_and_receive_a_signal():
        set_handlers()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", set_handlers_and_receive_a_signal)
    batches = eval_loader(digits(), CONFIG, batch_size=16, workers=1)
    assert sum(len(targets) for _, targets in batches) == 48
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()  # only that process has the signals blocked


@pytest.mark.parametrize("name", datasets.FOLDER_NAMES)
def test_folder_is_read(tmp_path: Path, name: str):
    train, val = open_splits(name, str(make_folder(tmp_path)))
    assert len(train) == len(val) == 4 and train.num_classes == val.num_classes == 2
    images, targets = next(iter(eval_loader(val, CONFIG, batch_size=4, workers=0)))
    assert images.shape == (4, 3, 16, 16) and targets.tolist() == [0, 0, 1, 1]
    colours = (images[:, :, 8, 8] * 255).round().tolist()
    assert colours == [[0, 0, 9], [0, 60, 9], [50, 0, 9], [50, 60, 9]]


@pytest.mark.parametrize("split", ["valid", "validation", "test"])
def test_folders_of_splits_may_have_other_names(tmp_path: Path, split: str, capsys):
    (make_folder(tmp_path) / "val").rename(tmp_path / split)
    (tmp_path / "train").rename(tmp_path / "training")
    train, val = open_splits("folder", str(tmp_path))
    assert train.source.filename(0, absolute=True) == str(tmp_path / "training/cat/0.png")
    assert val.source.filename(0, absolute=True) == str(tmp_path / split / "cat/0.png")
    assert capsys.readouterr().out == ""


def test_of_several_folders_of_a_split_the_used_one_is_said(tmp_path: Path, capsys):
    (make_folder(tmp_path) / "val").rename(tmp_path / "validation")
    (tmp_path / "test").mkdir()
    val = open_images("folder", str(tmp_path), "val")
    assert val.source.filename(0) == "cat/0.png" and val.source.root == tmp_path / "validation"
    said = capsys.readouterr().out
    assert said == f"--data-path {tmp_path} has the folders validation, test: validation is used for val\n"


def test_val_is_not_opened_where_it_is_not_wanted(tmp_path: Path):
    make_folder(tmp_path)
    (tmp_path / "val").rename(tmp_path / "aside")
    train, val = open_splits("folder", str(tmp_path), with_val=False)
    assert len(train) == 4 and val is None
    with pytest.raises(UserError, match="has no folder val"):
        open_splits("folder", str(tmp_path))


def test_timms_names_are_opened(tmp_path: Path):
    train, val = open_splits("torch/folder", str(make_folder(tmp_path, each=3)))
    assert len(train) == len(val) == 6 and train.num_classes == 2
    _, targets = next(iter(eval_loader(val, CONFIG, batch_size=6, workers=0)))
    assert targets.tolist() == [0, 0, 0, 1, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("name", ["torch/cifar10", "torch/nonsense", "torch/folder"])
def test_timms_data_set_that_is_not_there_is_named(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=rf"^--data-set {name}: timm cannot open it at .*{tmp_path.name}/none: "):
        open_images(name, str(tmp_path / "none"), "train")


def test_a_name_that_nobody_knows_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="imagnet"):
        open_images("imagnet", str(make_folder(tmp_path)), "train")


def test_path_errors_name_the_path(tmp_path: Path):
    with pytest.raises(UserError, match="--data-path is missing"):
        open_images("folder", None, "train")
    with pytest.raises(UserError, match=f"--data-path {tmp_path}/none does not exist"):
        open_images("folder", str(tmp_path / "none"), "train")
    with pytest.raises(UserError, match=f"--data-path {tmp_path} has no folder train"):
        open_images("folder", str(tmp_path), "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path}/train is empty"):
        open_images("folder", str(tmp_path), "train")


def test_class_folder_without_images_is_named(tmp_path: Path):
    make_folder(tmp_path)
    (tmp_path / "train" / "bird").mkdir()
    (tmp_path / "train" / "bird" / "readme.txt").write_text("none yet")
    with pytest.raises(UserError, match=f"class folder {tmp_path}/train/bird holds no image"):
        open_images("folder", str(tmp_path), "train")


def test_classes_that_differ_are_named(tmp_path: Path):
    make_folder(tmp_path)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    with pytest.raises(UserError, match=r"train/ and val/ differ in their classes: dog"):
        open_splits("folder", str(tmp_path))


def broken_folder(root: Path, fault: str) -> Path:
    """A folder in which val/dog/1.png cannot be read."""
    victim = make_folder(root) / "val" / "dog" / "1.png"
    content = victim.read_bytes()
    victim.unlink()
    if fault == "dangling link":
        victim.symlink_to(root / "nowhere.png")
    else:
        victim.write_bytes({"empty": b"", "text": b"not an image", "cut short": content[: len(content) // 2]}[fault])
    return victim


@pytest.mark.parametrize("name", ["folder", "torch/folder"])
@pytest.mark.parametrize(
    ("fault", "workers"), [("empty", 0), ("text", 0), ("text", 2), ("cut short", 0), ("dangling link", 0)]
)
def test_unreadable_image_is_named(tmp_path: Path, fault: str, name: str, workers: int):
    victim = broken_folder(tmp_path, fault)
    loader = eval_loader(open_images(name, str(tmp_path), "val"), CONFIG, batch_size=4, workers=workers)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert f"cannot read image {victim}: " in str(caught.value).splitlines()[-1]


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()


class Reader:
    """A timm reader of the kind that streams."""

    def __len__(self) -> int:
        return 10

    def __iter__(self):
        yield from ()


@pytest.mark.parametrize("stream", [Stream(), IterableImageDataset("", reader=Reader())], ids=["torch", "timm"])
def test_streamed_data_is_an_error(monkeypatch: pytest.MonkeyPatch, stream: IterableDataset):
    monkeypatch.setattr(datasets, "create_dataset", lambda *_args, **_kwargs: stream)
    with pytest.raises(UserError, match="--data-set wds/some is read as a stream"):
        open_images("wds/some", "somewhere", "train")
