"""Opening networks from their files alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from programs import CLASSES, COMMON, MODEL_KWARGS, NAME, PROXY, ROOT, Road, run, tiny_digits_model

import models
import piad
import supernet
import wpac
from datasets import Digits, eval_loader, open_images
from files import load_checkpoint, save_checkpoint
from models.backbone import full_widths
from models.extraction import extract
from piad.mask_table import MaskTable
from supernet import load
from utils import UserError

KWARGS = {**MODEL_KWARGS, "num_classes": CLASSES}


def assert_same_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == weights.keys() and all(torch.equal(own[key], weights[key]) for key in own)


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_folder_of_training_opens_at_its_newest_checkpoint(use_ema: bool, road: Road):
    network = load(road.peelable, use_ema=use_ema)
    assert_same_weights(network.model, load_checkpoint(road.super_network)["model_ema" if use_ema else "model"])
    assert network.table == MaskTable.load(road.mask_table) and not network.model.training
    assert (network.name, network.model_kwargs, network.grade) == (NAME, KWARGS, "cut")
    assert network.source == road.super_network
    first = road.peelable / "checkpoint_0.pth"
    assert_same_weights(load(str(first)).model, road.weights(first))


def test_contracted_weights_open_with_their_compensation(road: Road, tmp_path: Path):
    run("reparam.py", *COMMON, *PROXY, "--checkpoint", road.pretrained / "checkpoint_3.pth", "--method", "best",
        "--mask-table", "--no-eval", "--output-dir", tmp_path)  # fmt: skip
    network, cut = load(tmp_path), load(tmp_path / "contracted.safetensors", compensate=False)
    assert (network.grade, cut.grade) == ("compensated", "cut")
    widths = network.table.widths(-1)
    images = torch.randn(2, 1, 16, 16)
    assert not torch.allclose(extract(network.model, widths)(images), extract(cut.model, widths)(images))
    facts = json.loads((tmp_path / "contracted.json").read_text())
    assert network.preprocessing == facts["preprocessing"]


def test_a_sub_network_opens_with_its_one_size(road: Road):
    config = json.loads((road.peeled / "config.json").read_text())
    for path in (road.peeled, road.peeled / "model.safetensors", road.peeled / "config.json"):
        network = load(path)
        assert network.table.rows == [full_widths(network.model)] == [config["widths"]]
        assert network.grade == "cut, then fine-tuned" and network.name == NAME


def test_an_image_is_read_as_in_evaluation(road: Road):
    network = load(road.peelable)
    (images, _), image = next(iter(eval_loader(open_images("digits", None, "val"), network.preprocessing, batch_size=1,
                                               workers=0))), Digits("val")[0][0]  # fmt: skip
    assert torch.equal(network.read(image), images[0]) and network.read(image).shape == (1, 16, 16)
    assert torch.equal(network.read(image.convert("RGB")), images[0])  # whatever mode a file has
    assert isinstance(image, Image.Image)


@pytest.mark.parametrize("earlier_version", [False, True])
def test_preprocessing_is_that_of_the_run(earlier_version: bool, road: Road, tmp_path: Path):
    """The settings of an earlier version hold the flags instead of the whole configuration."""
    shutil.copytree(road.peelable, tmp_path / "run")
    state = load_checkpoint(road.super_network)
    said = {"mean": [0.25], "std": [0.125], "crop_pct": 0.5, "interpolation": "bilinear"}
    preprocessing = state["settings"].pop("preprocessing")
    state["settings"] |= said if earlier_version else {"preprocessing": preprocessing | said}
    save_checkpoint(tmp_path / "run" / "checkpoint_1.pth", state)
    found = load(tmp_path / "run").preprocessing
    assert (found["mean"], found["std"], found["crop_pct"]) == ([0.25], [0.125], 0.5)
    assert found["interpolation"] == "bilinear" and found["input_size"] == [1, 16, 16]


def test_what_is_saved_opens_again(road: Road, tmp_path: Path):
    network = load(road.peelable)
    small = extract(network.model, network.table.widths(3))
    config = network.save(tmp_path / "small", small, op_code=3)
    again = load(tmp_path / "small")
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(again.model(images), small(images))
    assert config == json.loads((tmp_path / "small" / "config.json").read_text())
    assert again.facts == {"op_code": 3} and config["op_code"] == 3 and config["grade"] == again.grade == "cut"
    assert again.preprocessing == network.preprocessing == config["preprocessing"]


def test_weights_that_do_not_say_their_model_take_a_name(road: Road, tmp_path: Path):
    """As the authors' checkpoints do not."""
    save_checkpoint(tmp_path / "checkpoint_7.pth", {"model": road.weights()})
    with pytest.raises(UserError, match="does not say of which model it is: give its name"):
        load(tmp_path, plain_weights=True)
    MaskTable(MaskTable.load(road.mask_table).rows).save(tmp_path / "mask_table.json")
    with pytest.raises(UserError, match="does not say of which model it is: give its name"):
        load(tmp_path)
    assert_same_weights(load(tmp_path, name=NAME, model_kwargs=MODEL_KWARGS).model, road.weights())


def test_a_name_beside_weights_that_say_theirs(road: Road):
    """What is recorded counts; a name that says the same is no mistake."""
    network = load(road.peelable, name=NAME)
    assert network.model_kwargs == KWARGS and network.preprocessing == load(road.peelable).preprocessing
    assert load(road.peelable, name=NAME, model_kwargs=MODEL_KWARGS).name == NAME
    with pytest.raises(UserError, match=f"says that its model is {NAME} .*, --model says vit_small: leave --model"):
        load(road.peelable, name="vit_small")
    with pytest.raises(UserError, match=f"{road.super_network} says depth=2, --model-kwargs says depth=3: leave it"):
        load(road.peelable, name=NAME, model_kwargs={**MODEL_KWARGS, "depth": 3})


def test_settings_reach_no_file(road: Road, tmp_path: Path):
    """A checkpoint is data from elsewhere: what it says of its model may shape it and nothing else."""
    state = load_checkpoint(road.super_network)
    state["settings"]["model_kwargs"] = {**MODEL_KWARGS, "checkpoint_path": "/etc/passwd"}
    save_checkpoint(tmp_path / "checkpoint_1.pth", state)
    shutil.copy(road.mask_table, tmp_path)
    with pytest.raises(UserError, match="checkpoint_path does not shape"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder, road: None, "is not a super-network"),
        (lambda folder, road: shutil.copy(road.mask_table, folder), "is not a super-network"),
        (lambda folder, road: shutil.copy(road.super_network, folder), "is not a super-network"),
        (lambda folder, road: (folder / "config.json").write_text("[]"), "model.safetensors does not exist"),
        (
            lambda folder, road: (
                shutil.copy(road.contracted, folder / "model.safetensors"),
                (folder / "config.json").write_text("[]"),
            ),
            "config.json does not say of which model it is",
        ),
    ],
    ids=["empty", "a table alone", "a checkpoint alone", "a config alone", "a config of something else"],
)
def test_a_folder_that_holds_no_network(make, says: str, road: Road, tmp_path: Path):
    make(tmp_path, road)
    with pytest.raises(UserError, match=says):
        load(tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_a_table_of_another_network(road: Road, tmp_path: Path):
    """Beside weights that bring no table of their own, and where it is given instead of theirs."""
    shutil.copy(road.contracted, tmp_path)
    rows = [full_widths(tiny_digits_model(depth=3))]
    MaskTable(rows).save(tmp_path / "mask_table.json")
    with pytest.raises(UserError, match="mask table covers 3 blocks"):
        load(tmp_path, name=NAME, model_kwargs=MODEL_KWARGS)
    with pytest.raises(UserError, match="mask table covers 3 blocks"):
        load(road.peelable, mask_table=tmp_path / "mask_table.json")


def test_the_table_in_a_checkpoint_counts_before_the_file_beside_it(road: Road, tmp_path: Path):
    shutil.copy(road.super_network, tmp_path)
    MaskTable([full_widths(tiny_digits_model(depth=3))]).save(tmp_path / "mask_table.json")
    assert load(tmp_path).table == MaskTable.load(road.mask_table)


@pytest.mark.parametrize("first", ["models", "piad", "wpac", "supernet", "datasets"])
def test_packages_import_in_any_order(first: str):
    """supernet.load knows piad and wpac, which know models: none may need another to be imported before it."""
    names = ["from supernet import load", "from models import extract, count_macs", "from piad import MaskTable"]
    code = "; ".join([f"import {first}", *names, "from wpac import contract"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_public_names_say_what_they_raise():
    table = piad.MaskTable
    raised = {public: "UserError" for public in (supernet.load, models.extract, supernet.Network.select, table.load)}
    raised |= {table.widths: "UserError", table.check: "UserError"}
    raised |= {models.count_macs: "ValueError", wpac.contract: "KeyError"}
    for public, error in raised.items():
        assert re.search(rf"\bRaises\b.*\b{error}\b", public.__doc__, re.DOTALL), public
