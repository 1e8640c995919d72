"""supernet.contract(): from a timm model object and images to a super-network, without files or labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from tiny import PLAIN, SHAPE, draw_parameters, relative

import supernet
from supernet.contraction import contract_network, network_of
from utils import UserError
from wpac.statistics import collect_statistics
from wpac.transform import contract as contract_weights


def tiny_model(**more) -> torch.nn.Module:
    return draw_parameters(timm.create_model(PLAIN, **(SHAPE | more)))


def photos(folder: Path, count: int = 20) -> Path:
    """Images of several sizes and modes in folders below one another."""
    for number in range(count):
        place = folder / f"{number % 3}" / "more"
        place.mkdir(parents=True, exist_ok=True)
        mode, colour = (("RGB", (10 * number, 99, 7)), ("L", 10 * number))[number % 2]
        Image.new(mode, (40 + number, 36), colour).save(place / f"{number}.{'png' if number % 2 else 'JPG'}", "PNG")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_sizes_of_a_model_object_without_files_or_labels(tmp_path: Path):
    model, images = tiny_model(), torch.randn(96, 3, 32, 32)
    before = model(images[:8]).detach()
    net = supernet.contract(model, images, samples=80)
    assert net.model is model and relative(model(images[:8]).detach(), before) < 1e-5
    assert len(net.table) > 10 and (net.grade, net.method, net.target) == ("compensated", "best", "logits")
    code = net.select(max_macs=net.macs() / 2)
    assert net.macs(code) <= net.macs() / 2 < net.macs(code - 1)
    small = net.cut(code)
    net.save(tmp_path, small, op_code=code)
    again = supernet.load(tmp_path)
    assert torch.equal(again.model(images[:2]), small(images[:2])) and again.preprocessing == net.preprocessing


def test_all_forms_of_images_give_the_same_statistics(tmp_path: Path):
    """A folder, PIL images, tensors, batches of tensors, and batches with labels, as a data loader gives them."""
    folder = photos(tmp_path)
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".JPG"))
    read = network_of(tiny_model()).read
    tensors = [read(Image.open(path)) for path in paths]
    forms = [folder, str(folder), [Image.open(path) for path in paths], tensors, [torch.stack(tensors)],
             [(torch.stack(tensors[:7]), torch.zeros(7)), (torch.stack(tensors[7:]), torch.zeros(13))]]  # fmt: skip
    networks = [supernet.contract(tiny_model(), form, batch_size=8) for form in forms]
    for net in networks[1:]:
        assert net.stamp == networks[0].stamp and net.table == networks[0].table


def test_it_is_what_the_parts_give():
    images = torch.randn(16, 3, 32, 32)
    net = supernet.contract(tiny_model(), images, method="paper")
    other = tiny_model()
    contract_weights(other, collect_statistics(other, [(images, torch.zeros(16, dtype=torch.long))], "fisher"))
    for found, expected in zip(net.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert len(net.table) == 1 and net.grade == "cut"


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_small_patch14_dinov2"])
def test_arguments_are_read_off_the_model_or_asked_for(name: str):
    more = {"img_size": 56, "num_classes": 3}
    net = network_of(timm.create_model(name, **more))
    assert net.model_kwargs.items() >= more.items() and net.name == name
    if name.startswith("swin"):
        return
    odd = timm.create_model(name, **more, reg_tokens=2)
    with pytest.raises(UserError, match="does not make this model again: give model_kwargs"):
        network_of(odd)
    assert network_of(odd, {**more, "reg_tokens": 2}).model_kwargs["reg_tokens"] == 2


def test_what_cannot_be_contracted_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="resnet18 is not supported"):
        supernet.contract(timm.create_model("resnet18"), torch.randn(4, 3, 32, 32))
    with pytest.raises(UserError, match="was not made by timm"):
        supernet.contract(torch.nn.Linear(2, 2), [])
    with pytest.raises(UserError, match="no image to take statistics on"):
        supernet.contract(tiny_model(), [])
    with pytest.raises(UserError, match="holds no image"):
        supernet.contract(tiny_model(), tmp_path)
    with pytest.raises(UserError, match="is not a folder of images"):
        supernet.contract(tiny_model(), tmp_path / "nowhere")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float):
    net = network_of(tiny_model())
    with torch.no_grad():
        net.model.blocks[0].attn.qkv.weight[0, 0] = value
    with pytest.raises(UserError, match="not finite"):
        contract_network(
            net, [(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))], cost="pred", method="paper"
        )
