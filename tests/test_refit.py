"""Refitting, for every family: exact where it can be, never worse on held-out images, the same however it is run."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import EACH, made, some_widths
from tiny import batches, draw_parameters, random_backbone, random_data, relative, widths_strategy
from torch import Tensor, nn
from torch.nn import functional as F

import supernet
from models.backbone import blocks_of, first_layers, full_widths, modules_of, value_bias, value_layer
from models.extraction import extract
from models.targets import output_of
from piad.mask_table import MaskTable
from utils import UserError
from wpac import least_squares
from wpac.compensation import compensate
from wpac.least_squares import DAMPINGS, Moments
from wpac.refit import _compared, _distance, refit
from wpac.statistics import collect_statistics
from wpac.streams import HELD_OUT, held_out_limit, image_key
from wpac.transform import contract

COUNT = 48


def halves(model: nn.Module) -> dict[str, int]:
    return {key: max(width // 2, 1) for key, width in full_widths(model).items()}


@cache
def images() -> Tensor:
    return random_data(COUNT)[0]


@cache
def compensated(family: str) -> nn.Module:
    """A backbone of the family, contracted by --method best and compensated; not to be changed."""
    model = made(family)
    statistics = collect_statistics(model, batches(*random_data(COUNT), 16), outputs=True)
    contract(model, statistics, "fisher", "fisher")
    compensate(model, statistics.outputs)
    return model


def held_out(data: Tensor) -> Tensor:
    keys = [image_key(image) for image in data]
    return data[torch.tensor(keys) <= held_out_limit(keys)]


def divergence(whole: nn.Module, small: nn.Module, data: Tensor) -> float:
    expected, found = whole(data).log_softmax(-1), small(data).log_softmax(-1)
    return F.kl_div(found, expected, log_target=True, reduction="batchmean").item()


@EACH
def test_the_whole_network_is_not_changed(family):
    model = made(family)
    small = extract(model, full_widths(model))
    refit(model, small, [images()])
    assert relative(small(images()), model(images())) < 1e-10


@EACH
def test_it_comes_nearer_on_other_images(family):
    model = made(family)
    small = extract(model, some_widths(model))
    others = random_data(COUNT, seed=2)[0]
    before = relative(small(others), model(others))
    assert refit(model, small, images().split(16)).helped
    assert relative(small(others), model(others)) < 0.7 * before


@torch.no_grad()
def repeat_dims(model: nn.Module) -> None:
    """Makes the second half of the dims of every module a copy of the first half, at the last layer's inputs.

    Of q and k, where they are cut, the second half becomes 0.
    """
    for module in modules_of(model).values():
        block, half = blocks_of(model)[module.block], module.width // 2
        if module.kind == "mlp":
            for parameter in (p for layer in first_layers(block.mlp).values() for p in layer.parameters()):
                units = parameter.unflatten(0, (-1, module.width))
                units[:, half:] = units[:, :half].clone()
            continue
        bias = value_bias(block.attn)
        for parameter in (value_layer(block.attn).weight, *([] if bias is None else [bias])):
            rows = parameter[-module.parts * module.heads * module.width :].unflatten(
                0, (module.parts, module.heads, module.width)
            )
            rows[:-1, :, half:] = 0
            rows[-1, :, half:] = rows[-1, :, :half].clone()


@EACH
def test_what_the_rest_predicts_exactly_is_restored_exactly(family):
    model = made(family)
    repeat_dims(model)
    small = extract(model, halves(model))
    others = random_data(COUNT, seed=2)[0]
    assert relative(small(others), model(others)) > 0.01
    refit(model, small, images().split(16))
    assert relative(small(others), model(others)) < 1e-7


@pytest.mark.parametrize("family", ["swiglu", "rope", "swin_v2"])
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_the_output_on_held_out_images_is_never_worse_than_compensated(family, data):
    model = compensated(family)
    small = extract(model, data.draw(widths_strategy(full_widths(model))))
    compensated_only, others = copy.deepcopy(small), held_out(images())
    result = refit(model, small, images().split(16))
    before, after = (divergence(model, network, others) for network in (compensated_only, small))
    assert result.before == pytest.approx(before, rel=1e-6, abs=1e-12)
    assert after == pytest.approx(result.after if result.helped else result.before, rel=1e-6, abs=1e-12)
    assert after <= before
    if not result.helped:
        assert all(torch.equal(a, b) for a, b in zip(small.parameters(), compensated_only.parameters(), strict=True))


@pytest.mark.parametrize("target", ["features", "tokens"])
def test_without_a_head_the_cosine_of_the_target_decides(target):
    model = random_backbone("registers", num_classes=0)
    small = extract(model, halves(model))
    result = refit(model, small, [images()], target)
    assert result.helped
    found, expected = (output_of(network, held_out(images()), target) for network in (small, model))
    assert result.after == pytest.approx((1 - F.cosine_similarity(found, expected, dim=-1)).mean().item())


@pytest.mark.parametrize("family", ["siglip", "swin_padded"])
def test_batches_and_their_order_do_not_matter(family):
    model, found = compensated(family), []
    for data in ([images()], images().flip(0).split(5)):
        small = extract(model, halves(model))
        refit(model, small, data)
        found.append(small(images()))
    assert relative(found[1], found[0]) < 1e-8


def test_one_image_in_eight_is_held_out_and_the_same_image_is_on_one_side():
    keys = [image_key(image) for image in images()]
    limit = held_out_limit(keys)
    assert sum(key <= limit for key in keys) == COUNT // HELD_OUT
    assert held_out_limit([*keys, *keys]) == limit
    for few in (images()[:1], images()[:1].expand(4, -1, -1, -1)):
        with pytest.raises(UserError, match="at least two different images, and there are 1"):
            model = random_backbone()
            refit(model, extract(model, halves(model)), [few])


@torch.no_grad()
def scale_dims(model: nn.Module, factor: float) -> None:
    """Scales some inputs of qkv, proj and fc1, exactly: the layer before gets `factor`, the layer its inverse."""
    for block in model.blocks:
        for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            for parameter in norm.parameters():
                parameter[::7] *= factor
            layer.weight[:, ::7] /= factor
        heads, dim = block.attn.num_heads, block.attn.head_dim
        for parameter in block.attn.qkv.parameters():
            parameter[-heads * dim :].view(heads, dim, -1)[:, 1] *= factor
        block.attn.proj.weight.view(-1, heads, dim)[:, :, 1] /= factor


def test_dims_with_large_activations_change_nothing(monkeypatch):
    """With one damping, since scaled v are also weighed otherwise when a damping is chosen."""
    monkeypatch.setattr(least_squares, "DAMPINGS", (0.1,))
    found = []
    for factor in (1, 1000):
        model = random_backbone()
        scale_dims(model, factor)
        small = extract(model, halves(model))
        refit(model, small, [images()])
        found.append(small(images()))
    assert relative(found[1], found[0]) < 1e-8


def test_large_means_do_not_drown_small_deviations_in_float32():
    """Inputs of mean 1000 and deviation 1: of their squares, float32 keeps less than a digit of the deviation."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4096, 6, generator=generator), torch.randn(6, 3, generator=generator)
    moments = Moments(6, 3, x.device)
    for held, rows in enumerate(x.chunk(2)):
        moments.update(rows + 1000, rows @ weight + 5, torch.ones(len(rows)), bool(held))
    moments.finalize()
    solution, offset = moments.fit(torch.ones(3), constant=True)
    assert relative(solution, weight.double()) < 1e-3
    assert relative(offset + 1000 * solution.sum(0), torch.full((3,), 5.0, dtype=torch.float64)) < 1e-2


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("damping", DAMPINGS[1:])
def test_a_fit_is_the_damped_least_squares_solution(damping, constant, monkeypatch):
    """Compared with a direct least-squares solution, in which further rows of the inputs express the damping."""
    monkeypatch.setattr(least_squares, "DAMPINGS", (damping,))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator, dtype=torch.float64) @ torch.randn(5, 5, generator=generator).double()
    x, r = x + 2, x @ torch.randn(5, 3, generator=generator).double() + 1
    weight = torch.rand(200, generator=generator, dtype=torch.float64)
    moments = Moments(5, 3, x.device)
    moments.update(x, r, weight, held_out=False)
    moments.update(x, r, weight, held_out=True)
    moments.finalize()
    solution, offset = moments.fit(torch.ones(3), constant)
    w = weight[:, None] / weight.sum()
    mean, mean_out = (w * x).sum(0) * constant, (w * r).sum(0) * constant
    deviation = (w * (x - mean).square()).sum(0).sqrt()
    rows = torch.cat([w.sqrt() * (x - mean), damping**0.5 * deviation.diag()])
    wanted = torch.linalg.lstsq(rows, torch.cat([w.sqrt() * (r - mean_out), torch.zeros(5, 3).double()])).solution
    assert relative(solution, wanted) < 1e-8
    assert relative(offset + 1, mean_out - mean @ wanted + 1) < 1e-8


def test_what_cannot_be_predicted_on_held_out_images_is_left():
    generator = torch.Generator().manual_seed(0)
    moments = Moments(30, 2, torch.device("cpu"))
    x, r = torch.randn(40, 30, generator=generator), torch.randn(40, 2, generator=generator)
    for held, sign in ((False, 1), (True, -1)):
        moments.update(x, sign * r, torch.ones(40), held)
    moments.finalize()
    assert moments.fit(torch.ones(2), constant=False) is None


def test_a_network_that_shares_memory_leaves_the_super_network_as_it_was():
    model = made("qk_norm")
    network = dataclasses.replace(supernet.create("deit_tiny_patch16_224"), model=copy.deepcopy(model))
    network.table = MaskTable([full_widths(model), full_widths(model) | {"1.mlp": 60}])
    small = network.cut(1, refit=images().split(16), share_memory=True)
    assert (small.grade, hasattr(network.cut(0, refit=[images()]), "grade")) == ("refitted", False)
    assert not torch.equal(small.blocks[1].mlp.fc2.weight, network.cut(1).blocks[1].mlp.fc2.weight)
    states = model.state_dict(), network.model.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


def test_layer_scale_of_zero_and_bypassed_branches():
    model = draw_parameters(random_backbone("layer_scale"))
    with torch.no_grad():
        model.blocks[0].ls1.gamma[0] = 0
    small = extract(model, some_widths(model))
    refit(model, small, [images()])
    assert all(parameter.isfinite().all() for parameter in small.parameters())


def test_a_gain_within_the_error_of_few_images_is_not_taken():
    before, after = (torch.tensor(values, dtype=torch.float64) for values in ((1, 1, 1, 1), (0, 1.4, 1, 1)))
    result = _compared(before, after)
    assert (result.before, result.after) == pytest.approx((1, 0.85))
    assert result.error == pytest.approx(((after - before).std(correction=0) / 2).item())
    assert not result.helped
    assert _compared(before, after - 0.5).helped


def test_distances():
    p, q = torch.randn(2, 3, 5, dtype=torch.float64)
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert relative(_distance("logits", p, q), kl) < 1e-12
    assert relative(_distance("features", p, q), 1 - F.cosine_similarity(p, q)) < 1e-12
    tokens = torch.stack([p, q], 1), torch.stack([q, q], 1)  # (3, 2, 5)
    assert relative(_distance("tokens", *tokens), (1 - F.cosine_similarity(p, q)) / 2) < 1e-12
