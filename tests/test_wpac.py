"""WPAC: statistics against a reference implementation; the transform changes the weights but not the function."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import all_statistics
from timm.layers import Mlp
from tiny import COSTS, VARIANTS, activations, batches, random_backbone, random_data, relative, use_fused
from torch import Tensor, nn

from models.backbone import modules_of
from models.taylor import feed_collectors
from studies.criteria import CRITERIA, importance_by, sort_dims
from utils import UserError
from wpac.bases import descending_eigenvectors, variance_bases
from wpac.statistics import Statistics, collect_statistics
from wpac.transform import contract, permute_mlp, rotate_attention


def reference_tokens(model: nn.Module, images: Tensor, targets: Tensor, cost: str) -> dict[str, list]:
    """Module key -> [(x, g) of each image]; see tiny.activations."""
    taken: dict[str, list] = {key: [] for key in modules_of(model)}
    for image, target in zip(images, targets, strict=True):
        for key, pair in activations(model, image, target, cost).items():
            taken[key].append(pair)
    return taken


def reference_covariance(pairs: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    """Covariances (3, H, d, d) of one attention module: loops over q, k and v, heads, images and tokens."""
    three, heads, tokens, d = pairs[0][0].shape
    covariance = np.zeros((three, heads, d, d))
    for part in range(three):
        for head in range(heads):
            mu = np.mean([x[part, head, t].numpy() for x, _ in pairs for t in range(tokens)], axis=0)
            for x, g in pairs:
                for t in range(tokens):
                    token, gradient = x[part, head, t].numpy(), g[part, head, t].numpy()
                    theta = np.mean(np.abs(gradient * token))
                    covariance[part, head] += theta * np.outer(token - mu, token - mu)
    return covariance


def reference_importance(pairs: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    """Taylor importance (M,) of one MLP: mean over all tokens of |g * h|."""
    return np.mean([np.abs((g[t] * h[t]).numpy()) for h, g in pairs for t in range(len(h))], axis=0)


def difference(found: Statistics, expected: Statistics) -> float:
    """The largest relative difference over all modules."""
    pairs = [(found.covariance, expected.covariance), (found.importance, expected.importance)]
    return max(relative(ours[key], theirs[key]) for ours, theirs in pairs for key in theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("cost", COSTS)
def test_statistics_equal_the_reference_for_every_cost(backbone, data, cost):
    images, targets = (part[:5] for part in data)
    statistics = collect_statistics(backbone, batches(images, targets, 2), cost)
    for key, pairs in reference_tokens(backbone, images, targets, cost).items():
        if key.endswith("attn"):
            assert relative(statistics.covariance[key], reference_covariance(pairs)) < 1e-10
        else:
            assert relative(statistics.importance[key], reference_importance(pairs)) < 1e-10


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "plain"])
@pytest.mark.parametrize("fused", [True, False])
def test_statistics_equal_the_reference_for_every_kind_of_model(variant, fused):
    model = use_fused(random_backbone(variant), fused)
    images, targets = random_data(2)
    statistics = collect_statistics(model, [(images, targets)], "ce")
    assert statistics.covariance.keys() | statistics.importance.keys() == modules_of(model).keys()
    for key, pairs in reference_tokens(model, images, targets, "ce").items():
        if key.endswith("attn"):
            assert relative(statistics.covariance[key], reference_covariance(pairs)) < 1e-10
        else:
            assert relative(statistics.importance[key], reference_importance(pairs)) < 1e-10


def test_costs_give_different_statistics(backbone, data):
    found = [collect_statistics(backbone, [data], cost) for cost in COSTS]
    assert difference(found[0], found[1]) > 1e-3
    assert difference(found[0], found[2]) > 1e-3


@pytest.mark.parametrize("size", [1, 3])
def test_statistics_do_not_depend_on_the_batch_size(any_backbone, data, size):
    whole = collect_statistics(any_backbone, [data], "ce")
    assert difference(collect_statistics(any_backbone, batches(*data, size), "ce"), whole) < 1e-10


def test_statistics_of_two_processes_equal_those_of_one(two_ranks):
    alone = all_statistics(slice(0, 8))
    for rank in two_ranks:
        for kind in ("covariance", "importance"):
            assert rank["statistics"][kind].keys() == alone[kind].keys()
            for key, expected in alone[kind].items():
                assert relative(rank["statistics"][kind][key], expected) < 1e-10
    for kind in ("covariance", "importance"):
        for key in alone[kind]:
            assert torch.equal(two_ranks[0]["statistics"][kind][key], two_ranks[1]["statistics"][kind][key])


def test_statistics_are_float64_and_leave_the_model_as_it_was(data):
    model = random_backbone(dtype=torch.float32).train()
    model.head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    statistics = collect_statistics(model, [(data[0].float(), data[1])])
    values = [*statistics.covariance.values(), *statistics.importance.values()]
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in values)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_statistics_run_in_eval_mode(data):
    model = random_backbone(proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    expected = collect_statistics(model, [data])
    assert difference(collect_statistics(model.train(), [data]), expected) == 0


def test_statistics_of_a_frozen_model(backbone, data):
    expected = collect_statistics(backbone, [data])
    assert difference(collect_statistics(backbone.requires_grad_(False), [data]), expected) == 0
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_statistics_are_never_taken_in_half_precision(data):
    model, images = random_backbone(dtype=torch.float32), data[0].float()
    expected = collect_statistics(model, [(images, data[1])])
    assert difference(expected, collect_statistics(random_backbone(), [data])) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == torch.bfloat16
        assert difference(collect_statistics(model, [(images, data[1])]), expected) == 0


def test_an_error_in_a_batch_leaves_no_hook_and_no_frozen_parameter(backbone, data):
    def failing():
        yield data
        raise UserError("unreadable image")

    with pytest.raises(UserError):
        collect_statistics(backbone, failing())
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module._forward_hooks for module in backbone.modules())


def test_feed_collectors_removes_its_hooks(backbone, data):
    class Counter:
        calls = 0

        def update(self, x, g):
            assert x.shape == g.shape
            Counter.calls += 1

    with feed_collectors(backbone, {key: Counter() for key in modules_of(backbone)}):
        backbone(data[0]).sum().backward()
    assert Counter.calls == 4
    backbone(data[0]).sum().backward()
    assert Counter.calls == 4


# ---------------------------------------------------------------------------------------------------------------------
# Transform


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("fused", [True, False])
def test_contraction_keeps_the_logits(any_backbone, data, cost, fused):
    model = use_fused(any_backbone, fused)
    before = model(data[0]).detach()
    weights = copy.deepcopy(model.state_dict())
    contract(model, collect_statistics(model, [data], cost))
    assert relative(model(data[0]), before) < 1e-10
    for key, value in model.state_dict().items():
        part = key.split(".")[2] if key.startswith("blocks.") else ""
        changed = part in ("attn", "mlp") and not key.endswith(("proj.bias", "fc2.bias"))
        assert torch.equal(value, weights[key]) != changed, key


def test_contraction_of_a_float32_model_is_done_in_float64(data):
    model = random_backbone(dtype=torch.float32)
    double = copy.deepcopy(model).double()
    statistics = collect_statistics(model, [(data[0].float(), data[1])])
    contract(model, statistics)
    contract(double, statistics)
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, double.state_dict()[key].float()), key


def test_contraction_makes_the_covariances_diagonal(any_backbone, data):
    """C_v and C_q + C_k of the rotated tokens, with the same theta, are diagonal and descending."""
    images, targets = (part[:3] for part in data)
    before = reference_tokens(any_backbone, images, targets, "ce")
    spectra = contract(any_backbone, collect_statistics(any_backbone, [(images, targets)], "ce"))
    after = reference_tokens(any_backbone, images, targets, "ce")
    for key in (key for key in before if key.endswith("attn")):
        x_old, g = (torch.stack(part) for part in zip(*before[key], strict=True))  # (images, 3, H, N, d)
        x_new = torch.stack([x for x, _ in after[key]])
        theta = (g * x_old).abs().mean(-1)
        centred = x_new - x_new.mean((0, 3), keepdim=True)
        covariance = torch.einsum("bphn,bphni,bphnj->phij", theta, centred, centred)
        shares = []
        for matrix in (covariance[0] + covariance[1], covariance[2]):
            diagonal = matrix.diagonal(dim1=-2, dim2=-1)
            assert (matrix - torch.diag_embed(diagonal)).abs().max() < 1e-9 * diagonal.max()
            assert (diagonal.diff(dim=-1) <= 1e-9 * diagonal.max()).all()
            shares.append(diagonal.sum(0) / diagonal.sum())
        assert relative(spectra[key], torch.stack(shares)) < 1e-9


def test_hidden_units_are_in_descending_order_of_importance(any_backbone, data):
    statistics = collect_statistics(any_backbone, [data])
    spectra = contract(any_backbone, statistics)
    after = collect_statistics(any_backbone, [data])
    for key, importance in after.importance.items():
        assert (importance.diff() <= 1e-12 * importance.max()).all()
        assert relative(importance, statistics.importance[key].sort(descending=True).values) < 1e-10
        assert relative(spectra[key], importance / importance.sum()) < 1e-10


def test_equally_important_hidden_units_keep_their_order():
    model = random_backbone(mlp_ratio=0.125)  # 6 hidden units
    statistics = collect_statistics(model, [random_data(2)])
    statistics.importance["0.mlp"] = torch.tensor([1.0, 2.0, 1.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    before = copy.deepcopy(model.blocks[0].mlp)
    spectra = contract(model, statistics)
    with torch.no_grad():
        permute_mlp(before, torch.tensor([1, 3, 0, 2, 5, 4]))
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in model.blocks[0].mlp.state_dict().items())
    assert torch.allclose(spectra["0.mlp"], torch.tensor([2, 2, 1, 1, 1, 0], dtype=torch.float64) / 7)


def test_permute_mlp_permutes_every_weight():
    mlp = Mlp(4, 6).double()
    weights = copy.deepcopy(mlp.state_dict())
    order = [1, 3, 0, 2, 5, 4]
    permute_mlp(mlp, torch.tensor(order))
    assert torch.equal(mlp.fc1.weight, weights["fc1.weight"][order])
    assert torch.equal(mlp.fc1.bias, weights["fc1.bias"][order])
    assert torch.equal(mlp.fc2.weight, weights["fc2.weight"][:, order])
    assert torch.equal(mlp.fc2.bias, weights["fc2.bias"])


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 2**31 - 1))
def test_eigenvectors_are_orthogonal_with_descending_values_and_a_fixed_sign(d, rank, seed):
    factor = torch.randn(2, d, min(rank, d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    covariance = factor @ factor.mT
    values, vectors = descending_eigenvectors(covariance)
    scale = covariance.abs().max().clamp(min=1)
    assert (values.diff(dim=-1) <= 0).all()
    assert (values >= 0).all()
    assert (vectors.mT @ vectors - torch.eye(d, dtype=torch.float64)).abs().max() < 1e-12
    assert (vectors @ torch.diag_embed(values) @ vectors.mT - covariance).abs().max() < 1e-12 * scale
    assert (vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)) > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Degenerate input


def zero_a_head(model: nn.Module) -> None:
    """Makes the outputs of head 1 and of hidden unit 0 of block 0 zero."""
    block = model.blocks[0]
    H, d = block.attn.num_heads, block.attn.head_dim
    with torch.no_grad():
        block.attn.qkv.weight.view(3, H, d, -1)[:, 1] = 0
        block.attn.qkv.bias.view(3, H, d)[:, 1] = 0
        block.mlp.fc1.weight[0] = 0
        block.mlp.fc1.bias[0] = 0


def zero_gradient(model: nn.Module) -> None:
    """Makes the logits independent of the image, so that every theta is 0."""
    nn.init.zeros_(model.head.weight)


@pytest.mark.parametrize("spoil", [None, zero_a_head, zero_gradient])
@pytest.mark.parametrize("kind", ["one image", "constant image", "zero image", "images"])
def test_degenerate_input_is_still_contracted(backbone, data, spoil, kind):
    images, targets = data
    if kind != "images":
        factor = {"one image": images[0], "constant image": torch.ones_like(images[0])}.get(kind, 0 * images[0])
        images, targets = factor[None], targets[:1]
    if spoil:
        spoil(backbone)
    # The logits themselves may not depend on the image; the features always do.
    before = backbone.forward_features(data[0]).detach()
    statistics = collect_statistics(backbone, [(images, targets)])
    for covariance in statistics.covariance.values():
        for matrix in (covariance[0] + covariance[1], covariance[2]):
            _, basis = descending_eigenvectors(matrix)
            assert (basis.mT @ basis - torch.eye(16, dtype=torch.float64)).abs().max() < 1e-12
    spectra = contract(backbone, statistics)
    assert all(torch.isfinite(parameter).all() for parameter in backbone.parameters())
    for values in spectra.values():
        assert torch.allclose(values.sum(-1), torch.ones((), dtype=torch.float64))
    assert relative(backbone.forward_features(data[0]), before) < 1e-10


def test_a_head_with_an_ordered_diagonal_covariance_is_not_rotated(backbone, data):
    """The rotation of a head does not depend on the other heads."""
    attn = backbone.blocks[0].attn
    covariance = torch.diag_embed(torch.arange(16.0, 0.0, -1, dtype=torch.float64)).repeat(3, 3, 1, 1)
    covariance[:, 1] = collect_statistics(backbone, [data]).covariance["0.attn"][:, 1]
    before = attn.qkv.weight.detach().clone().view(3, 3, 16, -1)
    rotate_attention(attn, variance_bases(covariance)[0])
    after = attn.qkv.weight.view(3, 3, 16, -1)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.allclose(after[:, 1], before[:, 1])


# ---------------------------------------------------------------------------------------------------------------------
# Sorting without rotation


@pytest.mark.parametrize("criterion", CRITERIA)
def test_sorting_by_a_criterion_keeps_the_logits_and_puts_the_largest_first(any_backbone, data, criterion):
    before = any_backbone(data[0]).detach()
    importance = importance_by(criterion, any_backbone, [data])
    sort_dims(any_backbone, importance)
    assert relative(any_backbone(data[0]), before) < 1e-10
    if criterion == "random":
        again = importance_by(criterion, any_backbone, seed=0)
        assert all(torch.equal(importance[key], again[key]) for key in importance)
        assert not torch.equal(importance["0.mlp"], importance_by(criterion, any_backbone, seed=1)["0.mlp"])
        return
    for key, values in importance_by(criterion, any_backbone, [data]).items():
        if key.endswith("attn"):
            values = torch.stack([values[0] + values[1], values[2]])
        assert (values.diff(dim=-1) <= 1e-9 * values.max()).all(), key


def test_hessian_is_the_mean_of_the_squares(backbone, data):
    (hessian, taylor) = (importance_by(criterion, backbone, [data])["0.mlp"] for criterion in ("hessian", "taylor"))
    statistics = collect_statistics(backbone, [data], squared=True)
    assert torch.equal(statistics.importance["0.mlp"], hessian)
    assert (hessian >= taylor.square()).all()  # the mean of squares is at least the square of the mean
    assert not torch.equal(hessian.argsort(), taylor.argsort())
