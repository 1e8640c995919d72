"""Folders of images: what is a class, which files are images, the pixels of each kind of image, the index."""

from __future__ import annotations

import functools
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from programs import MODEL_KWARGS, NAME
from ranks import run_in_ranks

import image_folders
import pixels
import supernet
from datasets import eval_loader, open_images, open_splits
from image_folders import ImageFolder, image_endings, image_files
from pixels import to_pixels
from utils import UserError

RED = (200, 30, 90)
GREY = 0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2]  # what Pillow makes of RED


def save(path: Path, image: Image.Image | None = None, **kwargs: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (8, 8), RED)).save(path, **kwargs)
    return path


def classes(root: Path) -> dict[str, list[str]]:
    """What ImageFolder finds: class name -> paths."""
    folder = ImageFolder(root)
    return {
        name: [folder.filename(k) for k, (_, target) in enumerate(folder.samples) if target == number]
        for name, number in folder.class_to_idx.items()
    }


def age(root: Path) -> None:
    """Makes all folders as old as a minute: of a folder that has just changed no listing is trusted."""
    for folder, _, _ in os.walk(root):
        seconds = Path(folder).stat().st_mtime - 60
        os.utime(folder, (seconds, seconds))


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


def ramp(dtype: str, values: list[float]) -> Image.Image:
    return Image.fromarray(np.tile(np.array(values, dtype), (4, 1)))


def transparent_palette() -> Image.Image:
    """Pixels of RED and of (1, 2, 3); the second is transparent."""
    image = Image.new("P", (2, 4))
    image.putpalette([*RED, 1, 2, 3])
    image.putdata([0, 1] * 4)
    image.info["transparency"] = b"\xff\x00"
    return image


KINDS = {
    "16 bits": (ramp("uint16", [0, 257, 32896, 65535]), "png", [0, 1, 128, 255]),
    "16 bits, TIFF": (ramp("uint16", [0, 257, 32896, 65535]), "tif", [0, 1, 128, 255]),
    "16 bits, PGM": (ramp("uint16", [0, 257, 32896, 65535]), "pgm", [0, 1, 128, 255]),
    "32 bits": (ramp("int32", [0, 257, 32896, 65535]), "tif", [0, 1, 128, 255]),
    "decimal, to 1": (ramp("float32", [0, 0.5, 0.75, 1]), "tif", [0, 128, 191, 255]),
    "decimal, to 255": (ramp("float32", [0, 1, 127.6, 255]), "tif", [0, 1, 128, 255]),
    "two values": (Image.new("1", (2, 4), 1), "png", [255, 255]),
    "grey": (Image.new("L", (2, 4), 77), "png", [77, 77]),
    "grey, transparent": (Image.new("LA", (2, 4), (77, 0)), "png", [77, 77]),
    "colour, transparent": (Image.new("RGBA", (2, 4), (*RED, 0)), "png", [RED, RED]),
    "palette": (transparent_palette(), "png", [RED, (1, 2, 3)]),
    "palette, GIF": (Image.new("RGB", (2, 4), RED).quantize(), "gif", [RED, RED]),
    "CMYK": (Image.new("CMYK", (2, 4), (55, 225, 165, 0)), "tif", [RED, RED]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_values_of_every_kind_of_image(tmp_path: Path, kind: str, mode: str):
    image, ending, row = KINDS[kind]
    path = save(tmp_path / f"cat/image.{ending}", image)
    colours = np.array([value if isinstance(value, tuple) else (value,) * 3 for value in row], "float64")
    expected = colours if mode == "RGB" else colours @ [0.299, 0.587, 0.114]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for found in (to_pixels(image.copy(), mode), to_pixels(Image.open(path), mode)):
            assert found.mode == mode and found.size == image.size
            for line in np.asarray(found):
                np.testing.assert_allclose(line, expected, atol=0.6 if mode == "L" else 0)


def test_jpeg_of_cmyk(tmp_path: Path):
    path = save(tmp_path / "image.jpg", Image.new("CMYK", (8, 8), (55, 225, 165, 0)), quality=100)
    np.testing.assert_allclose(np.asarray(to_pixels(Image.open(path), "RGB"))[4, 4], RED, atol=2)


@pytest.mark.parametrize("ending", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path: Path, ending: str, orientation: int):
    """Stored so that the orientation undoes it: red, green, blue at the corners come back to where they were."""
    upright = np.zeros((32, 48, 3), "uint8")
    upright[:16, :16], upright[:16, 32:], upright[16:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    undo = {**pixels.TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = Image.fromarray(upright)
    stored = stored.transpose(undo[orientation]) if orientation > 1 else stored
    exif = Image.Exif()
    exif[pixels.ORIENTATION] = orientation
    lossless = {"quality": 100, "lossless": True} if ending == "webp" else {"quality": 100} if ending == "jpg" else {}
    path = save(tmp_path / f"image.{ending}", stored, exif=exif, **lossless)
    found = np.asarray(to_pixels(Image.open(path), "RGB")).astype(int)
    assert found.shape == upright.shape
    for y, x in ((4, 4), (4, 44), (28, 4), (28, 44)):
        np.testing.assert_allclose(found[y, x], upright[y, x], atol=10)


def test_damaged_exif_data_leaves_the_image_as_it_is(tmp_path: Path):
    path = save(tmp_path / "image.png", exif=b"Exif\0\0II*\0 nothing")
    assert np.asarray(to_pixels(Image.open(path), "RGB"))[0, 0].tolist() == list(RED)


@pytest.mark.parametrize(
    ("image", "range_"),
    [
        (ramp("int32", [0, 65536]), "0 to 65536"),
        (ramp("int32", [-1, 5]), "-1 to 5"),
        (ramp("float32", [0, 256]), "0 to 256"),
        (ramp("float32", [-0.5, 1]), "-0.5 to 1"),
        (ramp("float32", [0, float("nan")]), "nan to nan"),
    ],
)
def test_values_of_an_unknown_scale_are_refused_by_name(tmp_path: Path, image: Image.Image, range_: str):
    path = save(tmp_path / "val/cat/image.tif", image)
    with pytest.raises(UserError, match=f"^cannot read image {path}: its values go from {range_}, not "):
        open_images("folder", str(tmp_path), "val")[0]


def test_the_network_and_the_loader_read_the_same(tmp_path: Path):
    for number, (image, ending, _) in enumerate(KINDS.values()):
        save(tmp_path / f"val/cat/{number:02}.{ending}", image.resize((20, 20), Image.Resampling.NEAREST))
    exif = Image.Exif()
    exif[pixels.ORIENTATION] = 6
    save(tmp_path / "val/cat/rotated.jpg", Image.linear_gradient("L"), exif=exif)
    val = open_images("folder", str(tmp_path), "val")
    for channels in (1, 3):
        network = supernet.create(NAME, model_kwargs={**MODEL_KWARGS, "in_chans": channels, "num_classes": 2})
        for k, (images, _) in enumerate(eval_loader(val, network.preprocessing, batch_size=1, workers=0)):
            assert images[0].equal(network.read(Image.open(val.source.samples[k][0]))), val.source.filename(k)


@pytest.mark.parametrize("channels", [2, 4])
def test_a_model_of_other_channels_is_refused(tmp_path: Path, channels: int):
    save(tmp_path / "val/cat/0.png")
    config = {"input_size": (channels, 16, 16)}
    with pytest.raises(UserError, match=rf"^the model takes {channels} channels \(in_chans\), images have 1 or 3"):
        eval_loader(open_images("folder", str(tmp_path), "val"), config, batch_size=1, workers=0)


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def test_folders_inside_a_class_folder_belong_to_the_class(tmp_path: Path):
    for name in ("dog/images/0.png", "dog/2024-01/b/1.png", "dog/z.png", "cat/images/0.png", "10/0.png", "9/0.png"):
        save(tmp_path / name)
    assert classes(tmp_path) == {
        "10": ["10/0.png"],
        "9": ["9/0.png"],
        "cat": ["cat/images/0.png"],
        "dog": ["dog/2024-01/b/1.png", "dog/images/0.png", "dog/z.png"],
    }


def test_the_reader_names_its_files(tmp_path: Path):
    path = save(tmp_path / "cat/images/0.png")
    folder = ImageFolder(tmp_path)
    assert (len(folder), folder[0], folder.samples) == (1, (str(path), 0), [(str(path), 0)])
    assert folder.filename(0) == "cat/images/0.png" and folder.filename(0, absolute=True) == str(path)


def test_hidden_names_are_no_data(tmp_path: Path, capsys):
    for name in ("cat/0.png", ".git/0.png", "__MACOSX/cat/0.png", "cat/.ipynb_checkpoints/0.png", "cat/__MACOSX/0.png",
                 "cat/._0.png", ".hidden.png"):  # fmt: skip
        save(tmp_path / name)
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / "cat/.DS_Store").write_text("")
    assert classes(tmp_path) == {"cat": ["cat/0.png"]}
    assert capsys.readouterr().out == ""


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path):
    save(tmp_path / "elsewhere/images/0.png")
    root = tmp_path / "train"
    root.mkdir()
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/images/up").symlink_to(tmp_path / "elsewhere")
    assert classes(root) == {"cat": ["cat/images/0.png"]}


def test_an_image_beside_the_class_folders_is_named(tmp_path: Path):
    save(tmp_path / "train/cat/0.png")
    path = save(tmp_path / "train/overview.PNG")
    with pytest.raises(UserError, match=f"^{path} lies beside the class folders: move it into one of them"):
        open_images("folder", str(tmp_path), "train")


@pytest.mark.parametrize(("split", "mend"), [("train", "each class$"), ("val", "for ImageNet the script valprep.sh")])
def test_a_split_without_class_folders_says_what_to_do(tmp_path: Path, split: str, mend: str):
    save(tmp_path / split / "0.jpg")
    with pytest.raises(UserError, match=f"^{tmp_path}/{split} holds images such as 0.jpg, but no class folder.*{mend}"):
        open_images("folder", str(tmp_path), split)


def test_a_split_of_other_files_has_no_class(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/images.zip").write_text("")
    with pytest.raises(UserError, match=f"^{tmp_path}/train has no class folder: expected a folder for each class$"):
        open_images("folder", str(tmp_path), "train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path):
    save(tmp_path / "cat/0.png")
    (tmp_path / "cat").chmod(0)
    with pytest.raises(UserError, match=f"^cannot read folder {tmp_path}/cat: Permission denied$"):
        ImageFolder(tmp_path)
    (tmp_path / "cat").chmod(0o700)


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("ending", ["webp", "bmp", "tif", "tiff", "ppm", "gif", "jpg", "jpeg", "WEBP", "Png", "JPEG"])
def test_every_image_that_pillow_opens_is_read(tmp_path: Path, ending: str):
    path = tmp_path / f"val/cat/0.{ending}"
    save(path, format=Image.registered_extensions()[f".{ending.lower()}"])
    image, target = open_images("folder", str(tmp_path), "val")[0]
    np.testing.assert_allclose(np.asarray(image)[4, 4], RED, atol=8)
    assert target == 0


def test_endings_are_of_images_alone():
    assert {".png", ".jpg", ".webp", ".bmp", ".tif", ".ppm", ".jp2"} <= image_endings()
    assert not {".pdf", ".mpg", ".mpeg", ".eps", ".h5", ".wmf", ".txt"} & image_endings()


def test_other_files_are_counted(tmp_path: Path, capsys):
    save(tmp_path / "cat/0.png")
    for name in ("cat/a.txt", "cat/more/b.TXT", "cat/c.pdf", "cat/README", "labels.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    os.mkfifo(tmp_path / "cat/pipe.png")
    assert classes(tmp_path) == {"cat": ["cat/0.png"]}
    kinds = "3 .txt, 1 without ending, 1 .pdf, 1 .png"
    assert capsys.readouterr().out == f"{tmp_path}: files that are not images are passed over: 6 ({kinds})\n"


def test_photos_without_classes(tmp_path: Path, capsys):
    for name in ("b.webp", "a/0.JPG", ".thumbnails/0.png"):
        save(tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("")
    assert image_files(tmp_path) == [tmp_path / "a/0.JPG", tmp_path / "b.webp"]
    assert capsys.readouterr().out == f"{tmp_path}: files that are not images are passed over: 1 (1 .txt)\n"
    with pytest.raises(UserError, match="holds no image"):
        image_files(save(tmp_path / "c/.0.png").parent)


# ---------------------------------------------------------------------------------------------------------------------
# The index


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders that are listed, in a process that has listed none so far."""
    found: list[str] = []
    real = image_folders.list_classes
    monkeypatch.setattr(image_folders, "_listings", {})
    monkeypatch.setattr(image_folders, "list_classes", lambda root: found.append(root.name) or real(root))
    return found


def forget() -> None:
    """What a new process knows."""
    image_folders._listings.clear()


def two_splits(root: Path) -> Path:
    for name in ("train/cat/images/0.png", "train/dog/0.png", "val/cat/0.png", "val/dog/0.png"):
        save(root / name)
    age(root)
    return root


def test_a_split_is_listed_once_in_a_process(tmp_path: Path, listed: list[str]):
    root = two_splits(tmp_path)
    open_splits("folder", str(root))
    open_splits("imagenet", f"{root}/../{root.name}")
    assert listed == ["train", "val"]
    save(root / "train/dog/1.png")
    assert len(open_images("folder", str(root), "train")) == 3


def test_an_index_saves_the_listing(tmp_path: Path, listed: list[str], capsys):
    root, index = two_splits(tmp_path / "data"), tmp_path / "new/index"
    (root / "train/cat/images/notes.txt").write_text("")
    age(root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    first = open_splits("folder", str(root), index=index)
    said = capsys.readouterr().out
    forget()
    second = open_splits("folder", str(root), index=index)
    assert listed == ["train", "val"]
    assert [images.source.samples for images in second] == [images.source.samples for images in first]
    assert [images.source.class_to_idx for images in second] == [{"cat": 0, "dog": 1}] * 2
    assert capsys.readouterr().out == said != ""
    assert sorted(json.loads(path.read_text())["folder"] for path in index.iterdir()) == [
        str(root / "train"),
        str(root / "val"),
    ]
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before  # nothing is written to the data


@pytest.mark.parametrize("change", ["bird/0.png", "dog/1.png", "cat/images/1.png"])
def test_an_index_is_made_anew_when_a_folder_changes(tmp_path: Path, listed: list[str], change: str):
    root, index = two_splits(tmp_path / "data"), tmp_path / "index"
    open_images("folder", str(root), "train", index)
    save(root / "train" / change)
    age(root / "val")
    for _ in range(2):
        forget()
        images = open_images("folder", str(root), "train", index)
        assert str(root / "train" / change) in dict(images.source.samples)
    assert listed[:2] == ["train", "train"] and len(list(index.iterdir())) == 1


def test_a_removed_class_is_not_in_the_index(tmp_path: Path, listed: list[str]):
    root, index = two_splits(tmp_path / "data"), tmp_path / "index"
    open_images("folder", str(root), "train", index)
    shutil.rmtree(root / "train/cat")
    forget()
    assert open_images("folder", str(root), "train", index).source.class_to_idx == {"dog": 0}


def test_a_folder_that_has_just_changed_is_listed_again(tmp_path: Path, listed: list[str]):
    """Its modification time may not tell a second change at the same tick."""
    save(tmp_path / "val/cat/0.png")
    for _ in range(2):
        open_images("folder", str(tmp_path), "val", tmp_path / "index")
    assert listed == ["val", "val"]


def test_a_folder_without_classes_has_an_index_of_its_own(tmp_path: Path, listed: list[str], monkeypatch):
    root, index, trees = two_splits(tmp_path / "data") / "train", tmp_path / "index", []
    real = image_folders.list_images
    monkeypatch.setattr(image_folders, "list_images", lambda folder: trees.append(folder.name) or real(folder))
    for _ in range(2):
        forget()
        for _ in range(2):
            assert ImageFolder(root, index).class_to_idx == {"cat": 0, "dog": 1}
            flat = ImageFolder(root, index, classes=False)
            assert flat.samples == [(f"{root}/cat/images/0.png", 0), (f"{root}/dog/0.png", 0)]
    assert listed == trees == ["train"] and len(list(index.iterdir())) == 2
    save(root / "2.png")
    assert len(ImageFolder(root, index, classes=False)) == 3


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"folder": 1, "classes": 3}', '{"folder": "x", "listed": "y"}'])
def test_a_damaged_index_is_made_anew(tmp_path: Path, listed: list[str], content: str, capsys):
    root, index = two_splits(tmp_path / "data"), tmp_path / "index"
    expected = open_images("folder", str(root), "val", index).source.samples
    (path,) = index.iterdir()
    good = path.read_text()
    path.write_text(content)
    forget()
    assert open_images("folder", str(root), "val", index).source.samples == expected
    assert capsys.readouterr().out == f"{path} is damaged: the images are listed anew\n"
    assert json.loads(path.read_text())["classes"] == json.loads(good)["classes"]


def test_an_index_that_cannot_be_written_is_named(tmp_path: Path, listed: list[str]):
    root = two_splits(tmp_path / "data")
    with pytest.raises(UserError, match=r"--index .*0\.png is a file"):
        open_images("folder", str(root), "val", root / "val/cat/0.png")
    assert listed == []


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def open_in_rank(root: Path, rank: int) -> dict[str, Any]:
    """What a rank finds, where only rank 0 may list."""
    if rank:
        image_folders.list_classes = None
    folder = ImageFolder(root / "train")
    try:
        ImageFolder(root / "none")
        error = None
    except UserError as raised:
        error = str(raised)
    return {"samples": folder.samples, "classes": folder.class_to_idx, "error": error}


def test_rank_0_lists_for_all(tmp_path: Path):
    root = two_splits(tmp_path / "data")
    first, second = run_in_ranks(functools.partial(open_in_rank, root), 2, tmp_path)
    assert first == second
    assert first["samples"] == ImageFolder(root / "train").samples
    assert first["error"] == f"cannot read folder {root}/none: No such file or directory"
