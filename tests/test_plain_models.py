"""A cut model is a plain one: what torch and timm do with timm's own models works on it, bypassed branches included."""

from __future__ import annotations

import copy

import pytest
import torch
from test_families import FAMILIES, V_ALONE, made, some_widths
from timm.optim import param_groups_layer_decay
from tiny import random_data, relative
from torch import Tensor, nn

from models.backbone import full_widths, modules_of
from models.extraction import extract
from models.macs import count_macs
from models.subnetwork import ValueLayer, ValueProjection, blocks_of

# Of torch about what it will drop, of tracing timm's checks of shapes, and of timm's interpolation.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated", "ignore::torch.jit.TracerWarning", "ignore:.*searchsorted"
)
EACH = pytest.mark.parametrize("family", FAMILIES)
IMAGES, OTHERS = (random_data(2, seed)[0].float() for seed in (1, 2))


def whole_and_cut(family: str) -> tuple[nn.Module, nn.Module]:
    model = made(family).float()
    return model, extract(model, some_widths(model))


def loss_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a loss. In eval mode, so that stochastic depth draws nothing."""
    model.zero_grad()
    model(IMAGES).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@EACH
def test_it_can_be_traced(family):
    _, small = whole_and_cut(family)
    traced = torch.jit.trace(small, IMAGES)
    assert torch.equal(traced(OTHERS), small(OTHERS))


@EACH
def test_it_can_be_scripted_where_timms_own_can(family, tmp_path):
    whole, small = whole_and_cut(family)
    try:
        torch.jit.script(whole)
    except Exception:
        pytest.skip("timm's own model cannot be scripted")
    torch.jit.script(small).save(tmp_path / "small.pt")
    assert relative(torch.jit.load(tmp_path / "small.pt")(IMAGES), small(IMAGES)) < 1e-5


@EACH
def test_it_can_be_compiled_as_one_graph(family):
    _, small = whole_and_cut(family)
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert relative(compiled(IMAGES), small(IMAGES)) < 1e-5


@EACH
def test_it_can_be_exported(family):
    _, small = whole_and_cut(family)
    program = torch.export.export(small, (IMAGES,))
    assert relative(program.module()(OTHERS), small(OTHERS)) < 1e-5


@EACH
def test_gradient_checkpointing_gives_the_same_gradients(family):
    _, small = whole_and_cut(family)
    expected = loss_gradients(small)
    small.set_grad_checkpointing()
    found = loss_gradients(small)
    assert found.keys() == expected.keys()
    assert all((found[name] - expected[name]).abs().max() < 1e-4 for name in found)


@EACH
def test_its_layers_decay_as_those_of_the_whole_model(family):
    scales = []
    for model in whole_and_cut(family):
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
        scales.append(
            {names[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
        )
        assert scales[-1].keys() == set(names.values())
    assert scales[1].items() <= scales[0].items()


@EACH
def test_its_head_can_be_changed(family):
    _, small = whole_and_cut(family)
    features = small.forward_head(small.forward_features(IMAGES), pre_logits=True)
    small.reset_classifier(5)
    assert small(IMAGES).shape == (2, 5)
    small.reset_classifier(0)
    assert torch.equal(small(IMAGES), features)


@EACH
def test_another_image_size_gives_what_the_whole_model_of_that_size_gives_cut(family):
    whole, small = whole_and_cut(family)
    small.set_input_size(img_size=(48, 48))
    whole.set_input_size(img_size=(48, 48))
    expected = extract(whole, some_widths(whole))
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(small(images), expected(images))
    assert full_widths(small) == some_widths(whole)
    sizes = [[(m.tokens, m.keys) for m in modules_of(model).values()] for model in (small, expected)]
    assert sizes[0] == sizes[1] and count_macs(small) == count_macs(expected)


@EACH
def test_it_gives_what_its_blocks_give(family):
    _, small = whole_and_cut(family)
    seen: list[Tensor] = []
    stages = small.layers if hasattr(small, "layers") else small.blocks
    hooks = [stage.register_forward_hook(lambda _m, _i, output: seen.append(output)) for stage in stages]
    features = small.forward_features(IMAGES)
    for hook in hooks:
        hook.remove()
    last, found = small.forward_intermediates(IMAGES, output_fmt="NCHW")
    assert torch.equal(last, features) and len(found) == len(seen)
    prefix = getattr(small, "num_prefix_tokens", 0)
    for grid, tokens in zip(found, seen, strict=True):
        tokens = tokens.flatten(1, -2) if tokens.ndim == 4 else tokens[:, prefix:]
        assert torch.equal(grid.flatten(2).mT, tokens)
    if hasattr(small, "get_intermediate_layers"):
        layers = small.get_intermediate_layers(IMAGES, len(seen))
        assert all(torch.equal(layer, tokens[:, prefix:]) for layer, tokens in zip(layers, seen, strict=True))


@EACH
def test_its_linear_layers_can_be_quantized(family):
    """Into int8, but for the two layers that leave dims of v out: they are of other classes and stay as they are."""
    _, small = whole_and_cut(family)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(small), {nn.Linear}, dtype=torch.qint8)
    left = [type(module) for module in quantized.modules() if isinstance(module, nn.Linear)]
    cut = [block.attn for block in blocks_of(small) if hasattr(block, "attn")] if family in V_ALONE else []
    assert left == [ValueLayer, ValueProjection] * len(cut)
    assert relative(quantized(IMAGES), small(IMAGES)) < 0.1
