"""Folders of images: listing them, each once and in one order."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from PIL import Image

from files import check_output_dir, write_text
from utils import UserError, on_main_process, progress_bar, say

# Formats that Pillow registers, but that hold no pixels of their own or that it cannot open without other programs.
NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
# A folder that changed so shortly before it was listed may have changed again without a new modification time.
CLOCK_TICK = 2 * 10**9  # nanoseconds


@functools.cache
def image_endings() -> frozenset[str]:
    """The endings, in lower case, of the image files that Pillow opens."""
    Image.init()
    extensions = Image.registered_extensions().items()
    return frozenset(end for end, kind in extensions if kind in Image.OPEN and kind not in NOT_IMAGES)


# ---------------------------------------------------------------------------------------------------------------------
# Listing


def _is_skipped(name: str) -> bool:
    """Whether a file or folder does not belong to the data: it is hidden, or macOS added it to an archive."""
    return name.startswith(".") or name == "__MACOSX"


def _ending(name: str) -> str:
    return PurePath(name).suffix.lower()


def _is_image(name: str) -> bool:
    return _ending(name) in image_endings()


@dataclass
class Listing:
    """What lies in a folder of images; paths are relative to it.

    classes: name -> image files, sorted; without classes, all of them are under the name "".  passed_over: ending ->
    number of the files that are not images.
    folders: every folder that was read -> its modification time in ns.  listed: the time of listing in ns.
    """

    classes: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    passed_over: dict[str, int] = dataclasses.field(default_factory=dict)
    folders: dict[str, int] = dataclasses.field(default_factory=dict)
    listed: int = 0

    def is_current(self, root: Path) -> bool:
        """Whether no folder has changed since."""
        try:
            return all(
                modified < self.listed - CLOCK_TICK and (root / folder).stat().st_mtime_ns == modified
                for folder, modified in self.folders.items()
            )
        except OSError:
            return False

    def say_passed_over(self, root: Path) -> None:
        """One line on the files that are not images, if there are any."""
        if not self.passed_over:
            return
        kinds = sorted(self.passed_over.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{number} {ending or 'without ending'}" for ending, number in kinds[:5]]
        shown += ["..."] if len(kinds) > 5 else []
        total = sum(self.passed_over.values())
        say(f"{root}: files that are not images are passed over: {total} ({', '.join(shown)})")


class _Walk:
    """Files below `root`, and what was met on the way."""

    def __init__(self, root: Path):
        self.root = root
        self.passed_over: Counter[str] = Counter()
        self.folders: dict[str, int] = {}

    def entries(self, folder: str) -> list[os.DirEntry]:
        """What lies in a folder, sorted by name, without what is skipped. Raises UserError if it cannot be read."""
        try:
            self.folders[folder] = (self.root / folder).stat().st_mtime_ns
            with os.scandir(self.root / folder) as entries:
                return sorted((e for e in entries if not _is_skipped(e.name)), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read folder {self.root / folder}: {error.strerror}") from error

    def images(self, folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
        """The image files in a folder and the folders in it; a link to a folder above is not followed."""
        entries = self.entries(folder)
        above = (*above, _identity(self.root / folder))
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                if not entry.is_symlink() or _identity(self.root / path) not in above:
                    yield from self.images(path, above)
            elif _is_image(entry.name) and (entry.is_file() or entry.is_symlink()):
                yield path
            else:
                self.pass_over(entry.name)

    def pass_over(self, name: str) -> None:
        self.passed_over[_ending(name)] += 1


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, sorted; says how many other files are passed over.

    Raises UserError as list_images() does.
    """
    listing = list_images(folder)
    listing.say_passed_over(folder)
    return [folder / path for path in listing.classes[""]]


def list_images(root: Path) -> Listing:
    """Lists all images below a folder, without classes.

    Raises UserError where the folder does not exist or holds no image.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder of images")
    walk, listing = _Walk(root), Listing(listed=time.time_ns())
    listing.classes[""] = sorted(progress_bar(walk.images(""), f"listing {root.name}"))
    if not listing.classes[""]:
        raise UserError(f"{root} holds no image")
    listing.passed_over, listing.folders = dict(walk.passed_over), walk.folders
    return listing


def list_classes(root: Path) -> Listing:
    """Lists a folder of class folders.

    Raises UserError for images beside the class folders, a class folder without images, and a folder without classes.
    """
    walk, listing = _Walk(root), Listing(listed=time.time_ns())
    entries = walk.entries("")
    folders = [entry.name for entry in entries if entry.is_dir()]
    for entry in entries:
        if entry.name not in folders:
            if _is_image(entry.name):
                raise UserError(_stray_image(root, entry.name, flat=not folders))
            walk.pass_over(entry.name)
    if not folders:
        raise UserError(f"{root} {'has no class folder' if entries else 'is empty'}: expected a folder for each class")
    for name in progress_bar(folders, f"listing {root.name}"):
        listing.classes[name] = sorted(walk.images(name))
        if not listing.classes[name]:
            raise UserError(f"class folder {root / name} holds no image")
    listing.passed_over, listing.folders = dict(walk.passed_over), walk.folders
    return listing


def _stray_image(root: Path, name: str, flat: bool) -> str:
    if not flat:
        return f"{root / name} lies beside the class folders: move it into one of them, or out of {root}"
    if root.name.startswith("train"):
        return f"{root} holds images such as {name}, but no class folder: move them into a folder for each class"
    return (
        f"{root} holds images such as {name}, but no class folder: move them into a folder for each class; for "
        "ImageNet the script valprep.sh (github.com/soumith/imagenetloader.torch) does so"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The index: listings that are kept


_listings: dict[tuple[Path, bool], Listing] = {}  # of this process, by the absolute path and whether there are classes


def listing_of(root: Path, index: Path | None, classes: bool = True) -> Listing:
    """list_classes() or list_images(), or what it gave before if nothing has changed since.

    It is kept in this process, and for later ones in the folder `index`.
    """
    if index:
        check_output_dir(index, "--index")
    key = root.resolve(), classes
    listing = _listings.get(key)
    if listing is None or not listing.is_current(root):
        listing = _listings[key] = _indexed(root, index, classes) if index else _list(root, classes)
    return listing


def _list(root: Path, classes: bool) -> Listing:
    return list_classes(root) if classes else list_images(root)


def _indexed(root: Path, index: Path, classes: bool) -> Listing:
    place = root.resolve()
    kind = "" if classes else "-images"
    path = index / f"{place.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}{kind}.json"
    listing = _read_listing(path)
    if listing is None or not listing.is_current(root):
        listing = _list(root, classes)
        write_text(path, json.dumps({"folder": str(place), **dataclasses.asdict(listing)}))
    return listing


def _read_listing(path: Path) -> Listing | None:
    """The listing in an index file; None if the file does not exist, or if it is damaged, which is said."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        del found["folder"]
        listing = Listing(**found)
        files = [file for files in listing.classes.values() for file in files]
        numbers = [listing.listed, *listing.folders.values(), *listing.passed_over.values()]
        if files and all(isinstance(f, str) for f in files) and all(isinstance(n, int) for n in numbers):
            return listing
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    say(f"{path} is damaged: the images are listed anew")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The data set


class ImageFolder:
    """The images of a folder that holds a folder for each class, with their classes, as in torchvision.

    A class is a folder directly below `root`; images may lie in it or in folders inside it. Without `classes`, images
    may lie anywhere below `root`, and all are of class 0. Item: (path, class).
    samples: all items.  class_to_idx: class name -> class, sorted by name.
    """

    def __init__(self, root: Path | str, index: Path | None = None, classes: bool = True):
        """index: a folder where the listing is kept for later runs.

        With several processes this is a collective call: rank 0 lists, the others get what it found.
        """
        root = Path(root)
        listing = on_main_process(lambda: listing_of(root, index, classes))
        listing.say_passed_over(root)
        self.root = root
        self.class_to_idx = {name: number for number, name in enumerate(listing.classes)}
        self.samples = [
            (f"{root}/{file}", self.class_to_idx[name]) for name, files in listing.classes.items() for file in files
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.samples[index]

    def filename(self, index: int, absolute: bool = False) -> str:
        """The path of an image, or its path relative to the root."""
        path = self.samples[index][0]
        return path if absolute else path.removeprefix(f"{self.root}/")
