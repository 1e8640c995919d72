"""Data sets, transforms, loaders, the proxy set: timm's, made strict and reproducible."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from image_folders import ImageFolder
from pixels import image_mode, to_pixels
from utils import UserError, first_line, ignore_stop_signals, mixed_seed, say, seed_everything, world
from workers import loading_context

FOLDER_NAMES = (
    "folder",
    "imagenet",
    "cifar10",
    "cifar100",
)  # <path>/train and <path>/val, a folder per class
UNLABELLED = "images"  # <path>, images anywhere below it, without classes
HELD_BACK = 10  # one image in so many of an unlabelled data set is its "val" split
# The names of the folder of a split; the first that exists is used.
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}


class Digits(Dataset):
    """scikit-learn's handwritten digits: 1,797 real 8x8 images in a fixed split of 1,437 and 360."""

    num_classes = 10

    def __init__(self, split: str):
        from sklearn.datasets import load_digits  # here, because scikit-learn is slow to import
        from sklearn.model_selection import train_test_split  # here, because it is slow to import

        digits = load_digits()
        parts = train_test_split(digits.images, digits.target, test_size=360, stratify=digits.target, random_state=0)
        train_images, val_images, train_labels, val_labels = parts
        self.images, self.labels = (train_images, train_labels) if split == "train" else (val_images, val_labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray((self.images[index] * (255 / 16)).astype("uint8"))
        return image, int(self.labels[index])


class Images(Dataset):
    """A data set that applies `transform`, and whose items can be indexed by (key, index) as well as by index.

    The key seeds the random transforms, so that an image does not depend on the worker or the run that loads it.
    num_classes: None where there are no labels; 0 stands for each of them then.
    Raises UserError, naming the file, for an image that cannot be read.
    """

    def __init__(self, source: Dataset, num_classes: int | None, indices: Sequence[int] | None = None):
        self.source = source
        self.num_classes = num_classes
        self.mode = "RGB"
        self.indices = range(len(source)) if indices is None else indices
        self.transform: Any = None  # set by the loader, like the mode

    def subset(self, indices: Sequence[int]) -> Images:
        """Some of the images, with their own transform."""
        return Images(self.source, self.num_classes, [self.indices[i] for i in indices])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        index = item
        if isinstance(item, tuple):
            key, index = item
            seed_everything(key)
        index = self.indices[index]
        try:
            image, target = self.source[index]
            image = image if isinstance(image, Image.Image) else Image.open(image)
            image = to_pixels(image, self.mode)
        except Exception as error:  # PIL and the readers raise many types for missing and damaged files
            raise UserError(f"cannot read image {self._name(index)}: {first_line(error)}") from error
        return (self.transform(image) if self.transform else image), target

    def _name(self, index: int) -> str:
        if hasattr(self.source, "filename"):  # ImageFolder and timm's readers
            return str(self.source.filename(index, absolute=True))
        samples = getattr(self.source, "samples", None)  # torchvision's folders
        return str(samples[index][0]) if samples else f"number {index} of the data set"


def open_images(name: str, path: str | None, split: str, index: Path | None = None, seed: int = 0) -> Images:
    """Opens the "train" or "val" split of a data set.

    name: "digits" (embedded), "folder" (ImageNet layout; "imagenet", "cifar10", "cifar100" mean the same), "images"
    (any folder of images, without labels), or a name of timm's create_dataset such as "torch/cifar10". index: a folder
    where listings of folders are kept, so that the next run need not list them. seed: of the split of "images".
    With several processes, all ranks call this: rank 0 lists for all of them.
    Raises UserError for a missing or empty path.
    """
    if name == UNLABELLED:
        return _open_unlabelled(path, index, seed)[split]
    if name == "digits":
        return Images(Digits(split), Digits.num_classes)
    if name in FOLDER_NAMES:
        folder = ImageFolder(_split_folder(path, split), index)
        return Images(folder, len(folder.class_to_idx))
    if "/" not in name:
        near = difflib.get_close_matches(name, ("digits", *FOLDER_NAMES, UNLABELLED), n=1)
        raise UserError(
            f"--data-set {name} is not known{f', did you mean {near[0]}?' if near else ''}: "
            f"digits, {', '.join(FOLDER_NAMES)}, {UNLABELLED}, or a name of timm's such as torch/cifar10"
        )
    try:
        source = create_dataset(name, root=path, split=split)
    except Exception as error:  # each reader raises errors of its own, also for missing packages
        raise UserError(f"--data-set {name}: timm cannot open it at {path}: {first_line(error)}") from error
    if isinstance(source, IterableDataset):
        raise UserError(f"--data-set {name} is read as a stream; a data set with indexed images is needed")
    # timm's data set skips images that it cannot open; its reader does not, so that they can be named.
    source = getattr(source, "reader", source)
    classes = getattr(source, "classes", None) or getattr(source, "class_to_idx", None)
    if classes is None:
        classes = set(getattr(source, "targets", None) or [source[i][1] for i in range(len(source))])
    return Images(source, len(classes))


def _open_unlabelled(path: str | None, index: Path | None, seed: int) -> dict[str, Images]:
    """The splits of a folder of images: a tenth of them, but at least one, drawn from the seed, is "val"."""
    source = ImageFolder(_data_folder(path, "the folder of images"), index, classes=False)
    if len(source) < 2:
        raise UserError(f"--data-path {path} holds a single image: one is held back for evaluation, so give more")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(mixed_seed(seed, HELD_BACK)))
    held_back = max(1, len(source) // HELD_BACK)
    parts = {"train": order[held_back:], "val": order[:held_back]}
    return {split: Images(source, None, part.sort().values.tolist()) for split, part in parts.items()}


def check_labels(images: Images, name: str, what: str, instead: str) -> None:
    """Raises UserError where a data set has no labels. name: of the data set.  what: needs them.  instead: the mend."""
    if images.num_classes is None:
        raise UserError(f"--data-set {name} has no labels, which {what} needs: {instead}")


def _data_folder(path: str | None, what: str) -> Path:
    if not path:
        raise UserError(f"--data-path is missing: give {what}")
    if not Path(path).is_dir():
        raise UserError(f"--data-path {path} {'is a file, not a folder' if Path(path).exists() else 'does not exist'}")
    return Path(path)


def _split_folder(path: str | None, split: str) -> Path:
    folder = _data_folder(path, "the folder that holds train/ and val/")
    found = [name for name in SPLITS[split] if (folder / name).is_dir()]
    if not found:
        raise UserError(f"--data-path {path} has no folder {' or '.join(SPLITS[split])}")
    if len(found) > 1:
        say(f"--data-path {path} has the folders {', '.join(found)}: {found[0]} is used for {split}")
    return folder / found[0]


def open_splits(
    name: str, path: str | None, with_val: bool = True, index: Path | None = None, seed: int = 0
) -> tuple[Images, Images | None]:
    """(train, val) of a data set; val is None without with_val. Raises UserError where their classes differ.

    index, seed: see open_images().
    """
    if name == UNLABELLED:
        found = _open_unlabelled(path, index, seed)
        return found["train"], found["val"] if with_val else None
    train = open_images(name, path, "train", index)
    if not with_val:
        return train, None
    val = open_images(name, path, "val", index)
    maps = [getattr(images.source, "class_to_idx", None) for images in (train, val)]
    if maps[0] != maps[1]:
        odd = sorted(maps[0].keys() ^ maps[1].keys())[0]
        raise UserError(f"train/ and val/ differ in their classes: {odd} is in one of them only")
    return train, val


def preprocessing(model: torch.nn.Module, overrides: dict[str, Any]) -> dict[str, Any]:
    """timm's data configuration of a model: input_size, interpolation, mean, std, crop_pct, crop_mode.

    The size is that of the model. overrides: values that the user gave, None where nothing was given.
    """
    size = (model.in_chans, *model.patch_embed.img_size)
    given = {key: value for key, value in overrides.items() if value is not None}
    config = resolve_data_config({**given, "input_size": size}, model=model)
    if len(config["mean"]) != model.in_chans:  # timm repeats a single value; three values on one channel are averaged
        config["mean"], config["std"] = ((sum(config[k]) / len(config[k]),) * model.in_chans for k in ("mean", "std"))
    return {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


class KeyedSampler:
    """Yields (key, index), the key derived from (seed, epoch, position over all ranks).

    What a position yields therefore does not depend on the number of workers or ranks, nor on earlier draws, and an
    epoch can be resumed in the middle.
    """

    def __init__(self, sampler: DistributedSampler | RepeatAugSampler, seed: int):
        self.sampler, self.seed = sampler, seed
        self.epoch = self.start = 0

    def enter(self, epoch: int, start: int) -> None:
        """Makes the next pass that of `epoch`, from position `start` on."""
        self.epoch, self.start = epoch, start
        # timm's sampler is seeded by the epoch alone, so this number carries the seed as well.
        self.sampler.set_epoch(mixed_seed(self.seed, epoch) % 2**31)

    def __len__(self) -> int:
        return len(self.sampler) - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank, ranks = self.sampler.rank, self.sampler.num_replicas
        for position, index in enumerate(self.sampler):
            if position >= self.start:
                yield mixed_seed(self.seed, self.epoch, position * ranks + rank), index


class TrainLoader:
    """The training batches of this rank: `batches(epoch, start_step)`."""

    def __init__(
        self,
        images: Images,
        config: dict[str, Any],
        augmentation: dict[str, Any],
        *,
        batch_size: int,
        workers: int,
        seed: int,
        repeats: int = 0,
    ):
        """batch_size: images per rank and step; repeats: of an image in an epoch (repeated augmentation), 0 = off."""
        rank, ranks = world()
        if repeats:
            sampler = RepeatAugSampler(images, num_replicas=ranks, rank=rank, num_repeats=repeats)
        else:
            sampler = DistributedSampler(images, num_replicas=ranks, rank=rank)
        if batch_size > len(sampler):
            raise UserError(f"--batch-size {batch_size} is more than the {len(sampler)} training images per process")
        self.sampler = KeyedSampler(sampler, seed)
        self.batch_size = batch_size
        self.loader = _loader(images, config, batch_size, workers, is_training=True, **augmentation)
        # create_loader makes its own sampler, which cannot start in the middle of an epoch.
        self.loader.batch_sampler.sampler = self.sampler

    @property
    def steps(self) -> int:
        """Number of steps in a whole epoch."""
        return len(self.sampler.sampler) // self.batch_size

    def batches(self, epoch: int, start_step: int = 0) -> DataLoader:
        """The epoch's batches (images (B, C, height, width), targets (B,)) from start_step on."""
        self.sampler.enter(epoch, start_step * self.batch_size)
        return self.loader


def eval_loader(images: Images, config: dict[str, Any], *, batch_size: int, workers: int) -> DataLoader:
    """This rank's share of the images in order, under the evaluation transform.

    Over all ranks each image comes once; timm's sampler would repeat some to make the shares equal.
    """
    rank, ranks = world()
    return _loader(images.subset(range(rank, len(images), ranks)), config, batch_size, workers, is_training=False)


def _loader(images: Images, config: dict[str, Any], batch_size: int, workers: int, **kwargs: Any) -> DataLoader:
    images.mode = image_mode(config["input_size"][0])
    try:
        loader = _create_loader(images, config, batch_size, workers, **kwargs)
    except (AssertionError, KeyError, TypeError, ValueError) as error:  # what timm's transforms raise for bad settings
        raise UserError(f"timm cannot make the transforms: {type(error).__name__} {first_line(error)}") from error
    loader.worker_init_fn = ignore_stop_signals  # images are seeded one by one, not by worker
    if workers:
        loader.multiprocessing_context = loading_context()
    return loader


def _create_loader(images: Images, config: dict[str, Any], batch_size: int, workers: int, **kwargs: Any) -> DataLoader:
    return create_loader(
        images,
        input_size=config["input_size"],
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        batch_size=batch_size,
        num_workers=workers,
        use_prefetcher=False,  # it would erase on the device, where the key of the image does not seed
        pin_memory=torch.cuda.is_available(),
        **kwargs,
    )


def proxy_set(images: Images, samples: int, seed: int) -> Images:
    """The proxy set: `samples` training images, drawn from the seed; all of them, which is said, if there are fewer."""
    if samples > len(images):
        say(f"--proxy-samples {samples} is more than the {len(images)} training images: all of them are used")
    return drawn(images, samples, seed)


def drawn(images: Images, count: int, seed: int) -> Images:
    """At most `count` of the images, drawn from the seed, in order."""
    if count >= len(images):
        return images.subset(range(len(images)))
    generator = torch.Generator().manual_seed(mixed_seed(seed))
    return images.subset(torch.randperm(len(images), generator=generator)[:count].sort().values.tolist())
