"""Folders of unlabelled images, and encoders, through the real programs."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import scalars
from programs import MODEL, ROOT, Road, exit_code, run
from safetensors.torch import save_file
from test_targets import Labels
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import default_collate

import datasets
import supernet
from datasets import Digits, Images, open_images, open_splits
from fidelity import Evaluator
from models.extraction import extract
from models.targets import output_of
from supernet import formats
from utils import UserError

LOADING = ["--workers", "0", "--batch-size", "32", "--device", "cpu"]
PHOTOS = 150
BEST = ("--method", "best", "--mask-table", "--dropout-ratio", 0.875)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as a tree of images, beside other files."""
    folder, digits = tmp_path_factory.mktemp("photos"), Digits("train")
    for index in range(PHOTOS):
        place = folder / ("", "summer", "winter/north")[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        digits[index][0].save(place / f"{index}.png")
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches whose labels raise an error when they are used."""
    create = datasets._create_loader

    def with_labels_that_raise(*args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        loader = create(*args, **kwargs)
        loader.collate_fn = lambda items: (default_collate([image for image, _ in items]), Labels())
        return loader

    monkeypatch.setattr(datasets, "_create_loader", with_labels_that_raise)


@pytest.fixture(scope="module")
def encoder(road: Road, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The pre-trained network without its head, and the flags that open it."""
    weights = {key: value for key, value in road.weights(road.pretrained / "checkpoint_3.pth").items()}
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_file({key: value for key, value in weights.items() if not key.startswith("head.")}, path)
    return ["--checkpoint", str(path), *MODEL, "num_classes=0"]


def unlabelled(photos: Path) -> list[str]:
    return ["--data-set", "images", "--data-path", str(photos), *LOADING]


def fidelity_of(small: VisionTransformer, net: supernet.Network, photos: Path, seed: int = 0) -> dict[str, float]:
    """In one pass over the images that are held back."""
    images = open_images("images", str(photos), "val", seed=seed)
    batch = torch.stack([net.read(images[index][0]) for index in range(len(images))])
    return Evaluator(net.target, [(batch, Labels())], torch.device("cpu"), labels=False, whole=net.model)(small)


def assert_faithful(found: dict[str, float], small: VisionTransformer, net: supernet.Network, photos: Path) -> None:
    expected = fidelity_of(small, net, photos)
    assert {key: found.get(key) for key in expected} == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The data set


def names(images: Images) -> list[str]:
    return [images._name(index) for index in images.indices]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_tenth_is_held_back(photos: Path, seed: int, capsys: pytest.CaptureFixture):
    train, val = open_splits("images", str(photos), seed=seed)
    said = f"{photos}: files that are not images are passed over: 1 (1 .txt)\n"
    assert capsys.readouterr().out == said  # once
    assert (len(train), len(val)) == (PHOTOS * 9 // 10, PHOTOS // 10) and train.num_classes is val.num_classes is None
    assert sorted(names(train) + names(val)) == sorted(map(str, photos.rglob("*.png")))
    assert len({Path(name).parent for name in names(val)}) == 3
    for split, expected in (("train", train), ("val", val)):
        assert names(open_images("images", str(photos), split, seed=seed)) == names(expected)
    assert names(open_images("images", str(photos), "val", seed=seed + 1)) != names(val)
    assert open_splits("images", str(photos), with_val=False)[1] is None
    assert val[0][1] == 0 and val.subset([2]).num_classes is None


def test_one_image_at_least_is_held_back(photos: Path, tmp_path: Path):
    for count in (1, 2):
        (tmp_path / f"{count}.png").write_bytes((photos / "0.png").read_bytes())
        if count == 1:
            with pytest.raises(UserError, match=f"--data-path {tmp_path} holds a single image"):
                open_splits("images", str(tmp_path))
    assert [len(images) for images in open_splits("images", str(tmp_path))] == [1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# The programs


@pytest.mark.parametrize(("method", "cost"), [("paper", "fisher"), ("best", "fisher")])
def test_a_classifier_without_labels(
    method: str, cost: str, road: Road, photos: Path, tmp_path: Path, no_labels: None, capsys: pytest.CaptureFixture
):
    more = ["--mask-table"] if method == "best" else []
    run("reparam.py", *unlabelled(photos), "--checkpoint", road.pretrained / "checkpoint_3.pth", "--method", method,
        *more, "--output-dir", tmp_path)  # fmt: skip
    facts = json.loads((tmp_path / "contracted.json").read_text())
    assert (facts["cost"], facts["target"], facts["proxy_samples"]) == (cost, "logits", PHOTOS * 9 // 10)
    found = facts["evaluation"]
    assert [*found] == ["after", *(f"at {share} of the attention dims" for share in (0.75, 0.5, 0.25))]
    assert found["after"] == {"agreement": 100.0, "kl": pytest.approx(0, abs=1e-9)}
    net = supernet.load(tmp_path, plain_weights=True)
    half = {key: width // 2 if key.endswith("attn") else width for key, width in net.table.widths(0).items()}
    if method == "paper":
        assert_faithful(found["at 0.5 of the attention dims"], extract(net.model, half), net, photos)
    assert "after: agreement 100.00 %, KL " in capsys.readouterr().out
    assert [step for step, _ in scalars(tmp_path)["agreement"]] == [100, 25, 50, 75]


@pytest.fixture(scope="module")
def contracted(encoder: list[str], photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder as a super-network."""
    folder = tmp_path_factory.mktemp("contracted")
    run("reparam.py", *unlabelled(photos), *encoder, *BEST, "--output-dir", folder)
    return folder


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "frontier.json").read_text())["sizes"]


def test_an_encoder_without_labels(
    encoder: list[str], contracted: Path, photos: Path, tmp_path: Path, no_labels: None, capsys: pytest.CaptureFixture
):
    again = tmp_path / "again"
    run("reparam.py", *unlabelled(photos), *encoder, *BEST, "--output-dir", again)
    facts = json.loads((again / "contracted.json").read_text())
    assert facts == json.loads((contracted / "contracted.json").read_text())
    assert (facts["cost"], facts["target"], facts["model_kwargs"]["num_classes"]) == ("signs", "tokens", 0)
    for refit in ([], ["--refit"]):
        run("main.py", "--eval", *unlabelled(photos), "--checkpoint", contracted, "--frontier", 3, *refit,
            "--write-sub-networks", "--output-dir", tmp_path)  # fmt: skip
        shown, net = capsys.readouterr().out, supernet.load(contracted)
        assert f"15 images of {photos.name}" in shown and "tokens p5" in shown and "top-1" not in shown
        rows = read_rows(tmp_path)
        assert len(rows) == 3
        for row in rows:
            folder = tmp_path / f"op_{row['op_code']}"
            small = supernet.load(folder)
            assert_faithful(row, small.model, net, photos)
            measured = {key: row[key] for key in ("token_cosine", "token_cosine_p5", "feature_cosine")}
            assert small.facts["fidelity"] == measured | {"images": 15, "data_set": "images"}
            assert "accuracy" not in small.facts and small.target == "tokens" and not {"top1", "knn"} & row.keys()
    assert rows[0]["token_cosine"] == pytest.approx(1, abs=1e-4) and 0.2 < rows[-1]["token_cosine"] < 0.9999
    with (tmp_path / "frontier.csv").open() as file:
        assert [float(row["token_cosine_p5"]) for row in csv.DictReader(file)] == [r["token_cosine_p5"] for r in rows]
    whole = json.loads((tmp_path / "frontier.json").read_text())
    assert (whole["target"], whole["compared_with"]) == ("tokens", str(contracted / "contracted.safetensors"))


def test_the_seed_says_which_images_are_held_back(contracted: Path, photos: Path, tmp_path: Path):
    run("main.py", "--eval", *unlabelled(photos), "--checkpoint", contracted, "--op-code", -1, "--seed", 3,
        "--output-dir", tmp_path)  # fmt: skip
    (row,), net = read_rows(tmp_path), supernet.load(contracted)
    expected = fidelity_of(net.cut(-1), net, photos, seed=3)["token_cosine"]
    assert row["token_cosine"] == pytest.approx(expected, abs=1e-6)
    assert expected != pytest.approx(fidelity_of(net.cut(-1), net, photos)["token_cosine"], abs=1e-5)
    words = json.loads((tmp_path / "frontier.json").read_text())["arguments"]
    assert "--seed 3" in shlex.join(words)  # the page's command evaluates on the same images


def test_an_encoder_with_labels(contracted: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """k-NN instead of an error: here among all 1,437 training images, and among 100 of them."""
    labelled = ["--data-set", "digits", *LOADING]
    run("main.py", "--eval", *labelled, "--checkpoint", contracted, "--op-code", 0, -1, "--baseline",
        contracted / "contracted.safetensors", "--write-sub-networks", "--output-dir", tmp_path)  # fmt: skip
    rows, net = read_rows(tmp_path), supernet.load(contracted)
    shown = capsys.readouterr().out
    assert "k-NN: accuracy of k-NN (20 neighbours), %." in shown and "tokens: mean cosine of the tokens" in shown
    parts = [[(torch.stack([net.read(image) for image, _ in d]), torch.tensor(d.labels))]
             for d in (Digits("val"), Digits("train"))]  # fmt: skip
    evaluate = Evaluator("tokens", parts[0], torch.device("cpu"), labels=True, training=parts[1], whole=net.model)
    for row in rows:
        expected = evaluate(net.cut(row["op_code"]))
        assert {key: row[key] for key in expected} == pytest.approx(expected, abs=0.3)  # a tie may go either way
        assert row["knn"] > 30 and "top1" not in row and row["baseline_knn"] > 20
        accuracy = json.loads((tmp_path / f"op_{row['op_code']}" / "config.json").read_text())["accuracy"]
        assert accuracy == {"knn": row["knn"], "images": 360, "data_set": "digits"}
    run("main.py", "--eval", *labelled, "--checkpoint", contracted, "--op-code", 0, "--knn-images", 100,
        "--output-dir", tmp_path / "few")  # fmt: skip
    assert read_rows(tmp_path / "few")[0]["knn"] < rows[0]["knn"]


def test_a_sub_network_alone_has_nothing_to_be_compared_with(
    road: Road, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    command = ["--eval", *unlabelled(photos), "--sub-network", road.peeled, "--output-dir", tmp_path]
    assert exit_code("main.py", *command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--data-set images has no labels" in line and "give that as --baseline, or a data set with labels" in line
    run("main.py", *command, "--baseline", road.contracted)
    (row,), whole = read_rows(tmp_path), supernet.load(road.contracted, plain_weights=True)
    small = supernet.load(road.peeled)
    assert_faithful(row, small.model, whole, photos)
    assert json.loads((tmp_path / "frontier.json").read_text())["compared_with"] == str(road.contracted)
    cut = extract(whole.model, small.table.widths(0))
    assert row["baseline_agreement"] == pytest.approx(fidelity_of(cut, whole, photos)["agreement"])


# ---------------------------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize(("target", "shape"), [("tokens", (5, 48)), ("features", (48,))])
def test_an_exported_file_gives_the_target(
    target: str,
    shape: tuple[int, ...],
    encoder: list[str],
    contracted: Path,
    photos: Path,
    tmp_path: Path,
    no_labels: None,
):
    """The outputs of each file, by torch or onnxruntime alone, at two batch sizes."""
    names = [name for name, needed in formats.NEEDS.items() if all(map(importlib.util.find_spec, needed))]
    if target == "features":
        contracted = tmp_path / "contracted"
        run("reparam.py", *unlabelled(photos), *encoder, "--target", target, "--method", "best", "--mask-table",
            "--no-eval", "--output-dir", contracted)  # fmt: skip
    out = tmp_path / "out"
    run("export.py", contracted, "--op-code", -1, "--format", "folder", "torch-export", *names, "--measure", "fidelity",
        "--data-set", "images", "--data-path", photos, "--device", "cpu", "--output", out)  # fmt: skip
    index, net = json.loads((out / "index.json").read_text()), supernet.load(contracted)
    assert index["target"] == target and index["output"].startswith(f"{target}, float32 (batch, ")
    (row,), small = index["sizes"], net.cut(-1)
    assert_faithful(row["fidelity"], small, net, photos)
    assert row["fidelity"]["images"] == PHOTOS // 10
    assert json.loads((out / "config.json").read_text())["fidelity"] == row["fidelity"]
    for errors in row["relative_error"].values():
        assert errors.keys() == {"random images", "real images"} and all(0 <= error < 1e-4 for error in errors.values())
    for measures in row.get("reduced", {}).values():
        assert measures["feature_cosine"] > 0.99 and ("token_cosine" in measures) == (target == "tokens")
    run_file = {"torch-export": torch.export.load(out / "model.pt2").module()}
    if names:
        import onnxruntime

        session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == [target]
        run_file["onnx"] = lambda images: torch.from_numpy(session.run([target], {"images": images.numpy()})[0])
    for count in (1, 3):
        images = torch.randn(count, 1, 16, 16)
        with torch.no_grad():
            expected = output_of(small, images, target)
            assert expected.shape == (count, *shape)
            for found in run_file.values():
                torch.testing.assert_close(found(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data-set", "digits"], "--measure top1 needs logits, {contracted} gives tokens: give fidelity"),
        (["--data-set", "images", "--data-path", "{photos}"], "has no labels, which --measure top1 needs: give fidel"),
    ],
)
def test_an_encoder_has_no_top1(flags: list[str], says: str, contracted: Path, photos: Path, tmp_path: Path, capsys):
    places = {"contracted": contracted, "photos": photos}
    flags = [flag.format(**places) for flag in flags]
    command = [contracted, "--op-code", 0, "--measure", "top1", *flags, "--output", tmp_path / "out"]
    assert exit_code("export.py", *command, "--device", "cpu") == 2
    assert says.format(**places) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What needs labels


@pytest.mark.parametrize(
    ("program", "flags", "says"),
    [
        ("main.py", ["--stage", "pretrain", *MODEL], "--data-set images has no labels, which --stage pretrain needs"),
        ("main.py", ["--stage", "piad"], "--data-set images has no labels, which --stage piad needs: give a data set"),
        ("main.py", ["--stage", "finetune"], "--data-set images has no labels, which --stage finetune needs"),
        ("reparam.py", ["--cost", "logit"], "--data-set images has no labels, which --cost logit needs: leave it out"),
        ("reparam.py", ["--cost", "ce"], "--data-set images has no labels, which --cost ce needs: leave it out"),
    ],
)
def test_what_needs_labels_says_so(
    program: str, flags: list[str], says: str, road: Road, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    weights = [] if "pretrain" in flags else ["--checkpoint", road.pretrained / "checkpoint_3.pth"]
    assert exit_code(program, *unlabelled(photos), *weights, *flags, "--output-dir", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "out" / "contracted.json").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--cost", "logit"], "the cost logit is not for the target tokens: give signs"),
        (["--target", "logits"], "the model has no classifier head, so it has no logits: give the target features"),
    ],
)
def test_what_an_encoder_does_not_have(flags: list[str], says: str, encoder: list[str], tmp_path: Path, capsys):
    assert exit_code("reparam.py", "--data-set", "digits", *LOADING, *encoder, *flags, "--output-dir", tmp_path) == 2
    assert says in capsys.readouterr().err


def test_an_encoder_and_photos_become_a_smaller_encoder(encoder: list[str], photos: Path, tmp_path: Path):
    """run_compress.sh: contraction, refitting by gradient descent, and a table, without labels."""
    more = {"PYTHON": sys.executable, "CHECKPOINT": encoder[1], "MODEL": encoder[3], "OUTPUT": str(tmp_path)}
    more |= {"MODEL_KWARGS": " ".join(encoder[5:]), "DATA_PATH": str(photos), "SIZES": "--macs-ratio 0.2 0.4"}
    more |= {"REFIT": "20", "NAME": "small", "DEVICE": "cpu", "WORKERS": "0", "BATCH_SIZE": "32"}
    done = subprocess.run(["sh", ROOT / "run_compress.sh"], env={**os.environ, **more}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "compressed/small"
    index, net = json.loads((out / "index.json").read_text()), supernet.load(tmp_path / "reparamed/small")
    for row in index["sizes"]:
        small = supernet.load(out / row["files"]["folder"])
        assert small.grade == row["grade"] and row["grade"] in ("compensated", "refitted, 20 steps per block")
        assert_faithful(row["fidelity"], small.model, net, photos)
        plain = fidelity_of(net.cut(row["op_code"]), net, photos)
        assert (plain["token_cosine"] == pytest.approx(row["fidelity"]["token_cosine"], abs=1e-7)) == (
            row["grade"] == "compensated"
        )
        assert f"{row['fidelity']['token_cosine']:.4f}" in done.stdout
    assert any(row["grade"] != "compensated" for row in index["sizes"])


def test_export_refits_as_python_does(contracted: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    export = ["export.py", contracted, "--op-code", -1, "--output", tmp_path / "out", "--device", "cpu"]
    assert exit_code(*export, "--refit") == 2
    assert "--refit needs images: give --data-set and --data-path" in capsys.readouterr().err
    data = ["--data-set", "images", "--data-path", photos]
    run(*export, "--refit", 60, *data)
    found, net = supernet.load(tmp_path / "out"), supernet.load(contracted)
    train = open_images("images", str(photos), "train")
    images = torch.stack([net.read(train[index][0]) for index in range(len(train))])
    expected = net.cut(-1, refit=images.split(64), refit_steps=60)  # the batches of export.py: sums are rounded alike
    assert found.grade == net.grade_of(expected) == "refitted, 60 steps per block"
    outputs = [output_of(model, images, "tokens") for model in (found.model, expected)]
    assert torch.allclose(*outputs, atol=1e-4)
    again = ["export.py", tmp_path / "out", "--refit", *data, "--output", tmp_path / "again", "--device", "cpu"]
    assert exit_code(*again) == 2
    assert "is a sub-network, which is cut already: leave --refit out" in capsys.readouterr().err
