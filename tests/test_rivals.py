"""The rivals' criteria, corrections and searches against plain references on tiny networks in float64; the program."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import (
    PLAIN,
    SHAPE,
    batches,
    draw_parameters,
    encoder_files,
    random_backbone,
    random_data,
    relative,
    some_widths,
)
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import create_backbone, full_widths
from models.extraction import extract
from models.macs import count_macs
from piad.mask_table import MaskTable
from studies import dependency_pruning, rivals, rivals_corp, rivals_snapvit, rivals_vbp
from studies.common import run_entry_point
from studies.dependency_pruning import Recipe
from studies.rivals_cut import InputMoments, check_plain, keep_heads, keep_units, narrow_query_key, watched
from studies.rivals_methods import METHODS
from studies.rivals_snapvit import Importance
from studies.rivals_task import Size, Task, macs_of, macs_without, smallest_cut
from supernet import Network
from utils import UserError

IMAGES, LABELS = random_data(6)
CLOSE = 1e-9


def task_of(model: nn.Module | None = None, target: str = "logits", dtype: torch.dtype = torch.float64) -> Task:
    """A task on a tiny model, with IMAGES in two batches."""
    model = random_backbone(dtype=dtype) if model is None else model
    network = Network(model, MaskTable([full_widths(model)]), PLAIN, SHAPE, {}, target)
    return Task(network, batches(IMAGES.to(dtype), LABELS, 4))


def inputs_of(model: nn.Module, layer: nn.Module, images: Tensor = IMAGES) -> Tensor:
    """The inputs (B N, n) of a layer while the model runs."""
    seen = []
    hook = layer.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].detach().flatten(0, 1)))
    model(images)
    hook.remove()
    return torch.cat(seen)


def with_inputs(model: nn.Module, change: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
    """The outputs of the model if the inputs of some layers are changed."""

    def hook_of(function: Callable) -> Callable:
        return lambda _m, inputs: (function(inputs[0]),)

    hooks = [layer.register_forward_pre_hook(hook_of(function)) for layer, function in change.items()]
    found = model(IMAGES)
    for hook in hooks:
        hook.remove()
    return found


def replaced(x: Tensor, kept: Tensor, prediction: Callable[[Tensor], Tensor]) -> Tensor:
    """x (..., n) with prediction(x[..., kept]) in place of the inputs that are not kept."""
    others = torch.tensor([i for i in range(x.shape[-1]) if i not in set(kept.tolist())], dtype=torch.long)
    new = x.clone()
    new[..., others] = prediction(x[..., kept])
    return new


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and MACs


def test_sizes_are_read_off_their_names():
    assert Size.parse("0.25") == Size(macs=0.25)
    assert Size.parse("mlp61+qk60") == Size(mlp=0.61, qk=0.6)
    assert Size.parse("mlp35+heads20") == Size(mlp=0.35, heads=0.2)
    for wrong in ("mlp", "0", "1.5", "mlp50+0.5", "nan"):
        with pytest.raises(ValueError):
            Size.parse(wrong)


@pytest.mark.parametrize("variant", ["plain", "layer_scale", "registers", "distilled"])
def test_macs_are_counted_as_the_project_counts_them(variant: str):
    model = random_backbone(variant)
    assert macs_of(model) == count_macs(model) == macs_without(model)
    small = extract(model, some_widths(model))
    assert macs_of(small) == count_macs(small)


def test_the_smallest_cut_is_within_the_limit():
    assert smallest_cut(lambda share: int(100 * (1 - share)), 30) == pytest.approx(0.69, abs=1e-6)  # 30.99 are 30
    assert smallest_cut(lambda share: int(100 - 50 * share), 49) is None


def test_other_models_are_refused():
    check_plain(random_backbone("no_qkv_bias"))
    others = [random_backbone("no_bias"), create_backbone(PLAIN, **SHAPE, qk_norm=True)]
    others += [
        create_backbone("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=12, num_heads=(1, 1, 2, 2))
    ]
    for other in others:
        with pytest.raises(UserError, match="not supported"):
            check_plain(other)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and cutting


def test_moments_are_those_of_all_tokens():
    model = random_backbone()
    layer = model.blocks[1].mlp.fc2
    moments = InputMoments(layer, threshold=0.5)
    with watched({layer: moments}):
        model(IMAGES)
    x = inputs_of(model, layer)
    assert relative(moments.mean, x.mean(0)) < CLOSE
    assert relative(moments.covariance, torch.cov(x.T, correction=0)) < CLOSE
    assert relative(moments.second, x.T @ x / len(x)) < CLOSE
    assert torch.equal(moments.active, (x.abs() > 0.5 * x.square().mean().sqrt()).double().mean(0))
    assert moments.tokens == len(x) and not layer._forward_hooks


@pytest.mark.parametrize("variant", ["plain", "no_qkv_bias", "five_heads"])
def test_cut_units_and_heads_are_gone_and_nothing_else(variant: str):
    model = random_backbone(variant)
    small, removed = copy.deepcopy(model), {}
    for block, old in zip(small.blocks, model.blocks, strict=True):
        H, d = block.attn.num_heads, block.attn.head_dim
        units, heads = torch.randperm(block.mlp.fc1.out_features), torch.randperm(H)
        keep_units(block.mlp, units, 40)
        keep_heads(block.attn, heads, H - 1)
        dims = torch.arange(H * d).view(H, d)[heads[: H - 1]].flatten()
        removed[old.mlp.fc2] = lambda x, kept=units[:40]: replaced(x, kept, lambda _kept: 0.0)
        removed[old.attn.proj] = lambda x, kept=dims: replaced(x, kept, lambda _kept: 0.0)
    assert relative(small(IMAGES), with_inputs(model, removed)) < CLOSE
    units = sum(block.mlp.fc1.out_features - 40 for block in model.blocks)
    assert macs_of(small) == count_macs(small) == macs_without(model, units=units, heads=len(model.blocks))


@pytest.mark.parametrize("variant", ["plain", "no_qkv_bias"])
def test_narrow_query_and_key_keep_the_scale_of_the_scores(variant: str):
    model = random_backbone(variant)
    small, masked = copy.deepcopy(model), copy.deepcopy(model)
    for block, zeroed in zip(small.blocks, masked.blocks, strict=True):
        narrow_query_key(block.attn, torch.eye(16, dtype=torch.float64)[:5].expand(2, 3, 5, 16))
        for parameter in zeroed.attn.qkv.parameters():
            parameter.data.view(3, 3, 16, -1)[:2, :, 5:] = 0
    assert relative(small(IMAGES), masked(IMAGES)) < CLOSE
    assert macs_of(small) == macs_without(model, qk=2 * 11)
    assert small.blocks[0].attn.qkv.weight.shape == (2 * 3 * 5 + 48, 48)


# ---------------------------------------------------------------------------------------------------------------------
# VBP


def test_vbp_replaces_the_units_of_least_variance_by_their_means():
    task = task_of()
    model = task.model
    hidden = [inputs_of(model, block.mlp.fc2) for block in model.blocks]
    variances = torch.stack([x.var(0, correction=0) for x in hidden])
    threshold = variances.flatten().sort().values[int(0.3 * variances.numel())]
    change = {}
    for block, x, variance in zip(model.blocks, hidden, variances, strict=True):
        kept = (variance >= threshold).nonzero()[:, 0]
        others = (variance < threshold).nonzero()[:, 0]
        mean = x.mean(0)[others]
        change[block.mlp.fc2] = lambda y, kept=kept, mean=mean: replaced(y, kept, lambda _kept: mean)
    small = METHODS["VBP"](task)(Size(mlp=0.3))
    assert relative(small(IMAGES), with_inputs(model, change)) < CLOSE
    widths = [int((variance >= threshold).sum()) for variance in variances]
    assert [block.mlp.fc1.out_features for block in small.blocks] == widths and widths[0] != widths[1]


def test_vbp_leaves_each_mlp_a_unit_and_cuts_no_attention():
    assert rivals_vbp.kept_units([torch.arange(5.0), torch.arange(5.0) + 100], 0.9) == [1, 1]
    assert rivals_vbp.kept_units([torch.arange(5.0), torch.arange(5.0) + 100], 0.3) == [2, 5]
    cut = METHODS["VBP"](task_of())
    assert cut(Size(macs=0.2)) is None and cut(Size(mlp=0.5, qk=0.5)) is None


# ---------------------------------------------------------------------------------------------------------------------
# CORP


def ridge_regression(x: Tensor, y: Tensor, amount: float) -> tuple[Tensor, Tensor]:
    """B and c of y = x B + c, with `amount` times the number of rows times |B|^2 added: by an augmented system."""
    centred = torch.cat([x - x.mean(0), math.sqrt(amount * len(x)) * torch.eye(x.shape[1], dtype=x.dtype)])
    target = torch.cat([y - y.mean(0), torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype)])
    solution = torch.linalg.lstsq(centred, target).solution
    return solution, y.mean(0) - x.mean(0) @ solution


def kept_by_energy(x: Tensor, count: int) -> Tensor:
    active = (x.abs() > 0.01 * x.square().mean().sqrt()).double().mean(0)
    return (x.square().mean(0) * active).topk(count).indices


def corp_mlp(x: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    """What CORP makes of the hidden units (T, M), as a change of the inputs of fc2."""
    kept = kept_by_energy(x, count)
    others = torch.tensor([i for i in range(x.shape[1]) if i not in set(kept.tolist())])
    covariance = torch.cov(x[:, kept].T, correction=0)
    amount = rivals_corp.ridge(covariance, len(x))
    solution, constant = ridge_regression(x[:, kept], x[:, others], amount)
    return lambda y: replaced(y, kept, lambda part: part @ solution + constant)


def test_the_ridge_is_the_shrinkage_of_the_covariance():
    x = random_data(40)[0].flatten(1)[:, :12] * torch.arange(1, 13)
    covariance, n, p = torch.cov(x.T, correction=0), 40, 12
    values = torch.linalg.eigvalsh(covariance)
    square, trace = values.square().sum().item(), values.sum().item()
    shrinkage = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
    assert 0 < shrinkage < 1
    assert rivals_corp.ridge(covariance, n) == pytest.approx(shrinkage * trace / p)
    assert rivals_corp.ridge(covariance, 10**9) == rivals_corp.RIDGE
    assert rivals_corp.ridge(torch.eye(3, dtype=torch.float64), 5) == pytest.approx(1)


def test_corp_predicts_removed_units_from_the_others():
    task = task_of()
    model = task.model
    change = {block.mlp.fc2: corp_mlp(inputs_of(model, block.mlp.fc2), 96) for block in model.blocks}
    # With 4 + 2 images the batches have other thresholds of activity than all six together: one batch here.
    task.batches = [(IMAGES, LABELS)]
    small = METHODS["CORP, statistics of the whole network"](task)(Size(mlp=0.5))
    assert relative(small(IMAGES), with_inputs(model, change)) < 1e-7


def test_corp_in_sequence_takes_the_statistics_of_the_network_that_is_cut_so_far():
    task = task_of()
    task.batches, model = [(IMAGES, LABELS)], task.model
    first, second = model.blocks
    change = {first.mlp.fc2: corp_mlp(inputs_of(model, first.mlp.fc2), 96)}
    seen = {}

    def learned(y: Tensor) -> Tensor:
        seen.setdefault("change", corp_mlp(y.detach().flatten(0, 1), 96))
        return seen["change"](y)

    small = METHODS["CORP"](task)(Size(mlp=0.5))
    assert relative(small(IMAGES), with_inputs(model, change | {second.mlp.fc2: learned})) < 1e-7
    one_pass = METHODS["CORP, statistics of the whole network"](task)(Size(mlp=0.5))
    assert relative(one_pass(IMAGES), small(IMAGES)) > 1e-6


def corrected_scores(q: Tensor, k: Tensor, count: int) -> Tensor:
    """CORP's scores of one head: q, k (B, N, d) -> (B, N, N), with all sums and the Kronecker product written out."""
    parts = q.mT[..., None] * k.mT[:, :, None]  # (B, d, N, N): what each dim adds
    energy = parts.square().sum((2, 3)).mean(0)
    kept = energy.topk(count).indices
    others = torch.tensor([j for j in range(q.shape[-1]) if j not in set(kept.tolist())])
    rows = [x.flatten(0, 1) for x in (q, k)]
    gram = [x[:, kept].T @ x[:, kept] for x in rows]
    crossed = [x[:, kept].T @ x[:, others] for x in rows]
    amount = rivals_corp.ridge(torch.cov(rows[0][:, kept].T, correction=0), len(rows[0]))
    system = torch.kron(gram[0], gram[1].contiguous()) + amount * torch.eye(
        count**2, dtype=q.dtype
    )  # rows of M in turn
    lost = torch.linalg.solve(system, (crossed[0] @ crossed[1].T).flatten()).view(count, count)
    return q[..., kept] @ (torch.eye(count, dtype=q.dtype) + lost) @ k[..., kept].mT


def test_corp_corrects_the_scores_of_narrow_query_and_key():
    model = random_backbone(depth=1)
    block, task = model.blocks[0], task_of(model)
    q, k, v = block.attn.qkv(block.norm1(model._pos_embed(model.patch_embed(IMAGES)))).view(6, 17, 3, 3, 16).unbind(2)
    heads = []
    for h in range(3):
        scores = corrected_scores(q[:, :, h], k[:, :, h], 8) / 16**0.5
        heads.append(scores.softmax(-1) @ v[:, :, h])
    change = {block.attn.proj: lambda _x: torch.cat(heads, -1)}
    small = METHODS["CORP"](task)(Size(qk=0.5))
    assert relative(small(IMAGES), with_inputs(model, change)) < 1e-6
    without = copy.deepcopy(model)
    order = [torch.stack([q[:, :, h].square().sum(1) * k[:, :, h].square().sum(1)]).mean((0, 1)).topk(8).indices
             for h in range(3)]  # fmt: skip
    narrow_query_key(
        without.blocks[0].attn, torch.stack([torch.eye(16)[o].double() for o in order]).expand(2, 3, 8, 16)
    )
    errors = [(other(IMAGES) - model(IMAGES)).square().sum() for other in (small, without)]
    assert errors[0] < errors[1]  # the correction helps


def test_corp_cuts_every_block_alike_and_keeps_a_few_dims():
    task = task_of()
    small = METHODS["CORP"](task)(Size(macs=0.6))
    shapes = {(block.mlp.fc1.out_features, block.attn.qk_dim) for block in small.blocks}
    assert len(shapes) == 1 and min(shapes)[0] >= 64 and min(shapes)[1] >= 8
    assert 0.57 < macs_of(small) / macs_of(task.model) <= 0.6
    cut = METHODS["CORP"](task)
    assert cut(Size(macs=0.5)) is None and cut(Size(mlp=0.5, heads=0.5)) is None and cut(Size(mlp=0.9)) is None


def test_corp_is_the_same_in_float32():
    sizes = [METHODS["CORP"](task_of(dtype=dtype))(Size(mlp=0.5, qk=0.5)) for dtype in (torch.float64, torch.float32)]
    assert sizes[1].blocks[0].attn.qkv.weight.dtype == torch.float32
    assert relative(sizes[1](IMAGES.float()).double(), sizes[0](IMAGES)) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# SnapViT


def test_the_loss_is_the_cross_entropy_of_every_pair_of_views():
    features = random_data(12 * 3)[0].flatten(1)[:, :7].view(12, 3, 7)
    total = 0.0
    for image, teacher, student in itertools.product(range(3), range(2), range(12)):
        if teacher != student:
            t, s = (x / x.norm() for x in (features[teacher, image], features[student, image]))
            total -= (t.softmax(0) * s.softmax(0).log()).sum()
    assert relative(rivals_snapvit.self_supervised_loss(features), total) < CLOSE


def test_crops_differ_by_view_and_image():
    images = IMAGES[:1].repeat(2, 1, 1, 1)
    views = rivals_snapvit.crops(images)
    assert views.shape == (12, 2, 3, 32, 32)
    flat = views.flatten(0, 1).flatten(1)
    assert len({tuple(row[:9].tolist()) for row in flat}) == 24


def test_importance_is_the_mean_squared_gradient_of_rows(monkeypatch: pytest.MonkeyPatch):
    model = random_backbone()
    monkeypatch.setattr(rivals_snapvit, "crops", lambda x: torch.stack([x, x.flip(-1), x.flip(-2), x * 0.5]))
    found = rivals_snapvit.gradient_importance(model, IMAGES, seed=0)  # in chunks of 4 and 2 images
    views = torch.stack([IMAGES, IMAGES.flip(-1), IMAGES.flip(-2), IMAGES * 0.5])
    features = model.forward_head(model.forward_features(views.flatten(0, 1)), pre_logits=True).view(4, 6, -1)
    (rivals_snapvit.self_supervised_loss(features) / 6).backward()
    for index, block in enumerate(model.blocks):
        units = torch.stack([row.square().mean() for row in block.mlp.fc1.weight.grad])
        heads = torch.stack([rows.square().mean() for rows in block.attn.qkv.weight.grad[96:].split(16)])
        assert relative(found.units[index], units) < CLOSE
        assert relative(found.heads[index], heads) < CLOSE
    assert all(parameter.requires_grad for parameter in model.parameters())


def some_importance(seed: int = 0) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    return Importance(*(torch.rand(2, n, generator=generator, dtype=torch.float64) for n in (192, 3)))


def test_units_are_ranked_over_all_blocks_but_each_keeps_some():
    scores = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])
    assert rivals_snapvit.kept_of(scores, 0.375, 2).tolist() == [[False, False, True, True], [False, True, True, True]]
    assert rivals_snapvit.kept_of(scores, 0.9, 1).tolist() == [[False, False, False, True], [False, False, False, True]]
    importance = some_importance()
    multipliers = torch.linspace(-1, 2, 2 + 6, dtype=torch.float64)
    times = importance.times(multipliers)
    assert torch.equal(times.units[1], importance.units[1] * multipliers[1].abs())
    assert torch.equal(times.heads[1, 2], importance.heads[1, 2] * multipliers[7].abs())
    start = rivals_snapvit.starting_multipliers(importance)
    assert start.tolist() == pytest.approx([1.2, 0.8] + [1.2] * 3 + [0.8] * 3)


def removed_by(importance: Importance, mlp: float, heads: float) -> list[tuple[Tensor, Tensor]]:
    """For each block, the kept units and the kept inputs of proj."""
    found = []
    for units, heads_kept in zip(
        rivals_snapvit.kept_of(importance.units, mlp, 9),
        rivals_snapvit.kept_of(importance.heads, heads, 1),
        strict=True,
    ):
        dims = heads_kept.repeat_interleave(16)
        found.append((units.nonzero()[:, 0], dims.nonzero()[:, 0]))
    return found


def test_snapvit_cuts_units_and_heads():
    model, importance = random_backbone(), some_importance()
    small = rivals_snapvit.plain_cut(copy.deepcopy(model), importance, 0.4, 0.34)
    change = {}
    for block, (units, dims) in zip(model.blocks, removed_by(importance, 0.4, 0.34), strict=True):
        change[block.mlp.fc2] = lambda x, kept=units: replaced(x, kept, lambda _kept: 0.0)
        change[block.attn.proj] = lambda x, kept=dims: replaced(x, kept, lambda _kept: 0.0)
    assert relative(small(IMAGES), with_inputs(model, change)) < CLOSE
    assert sum(block.attn.num_heads for block in small.blocks) == 4


def test_snapvit_corrects_by_least_squares_on_the_network_cut_so_far():
    model, importance = random_backbone(depth=1), some_importance()
    importance = Importance(importance.units[:1], importance.heads[:1])
    units, dims = removed_by(importance, 0.4, 0.34)[0]
    assert 0 < len(dims) < 48
    small = rivals_snapvit.corrected_cut(copy.deepcopy(model), importance, 0.4, 0.34, [IMAGES[:4], IMAGES[4:]])
    block, change = model.blocks[0], {}
    for layer, kept in ((block.mlp.fc2, units), (block.attn.proj, dims)):
        x = inputs_of(model, layer)
        others = torch.tensor([i for i in range(x.shape[1]) if i not in set(kept.tolist())])
        amount = math.sqrt(0.01 * x.square().mean().item() * len(x))
        system = torch.cat([x[:, kept], amount * torch.eye(len(kept), dtype=x.dtype)])
        target = torch.cat([x[:, others], torch.zeros(len(kept), len(others), dtype=x.dtype)])
        solution = torch.linalg.lstsq(system, target).solution
        change[layer] = lambda y, kept=kept, solution=solution: replaced(y, kept, lambda part: part @ solution)
    assert relative(small(IMAGES), with_inputs(model, change)) < 1e-7
    cut = rivals_snapvit.plain_cut(copy.deepcopy(model), importance, 0.4, 0.34)
    errors = [(other(IMAGES) - model(IMAGES)).square().sum() for other in (small, cut)]
    assert errors[0] < errors[1]


def test_the_evolution_strategy_finds_a_minimum():
    target = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    scale = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
    calls = []

    def fitness(point: Tensor) -> float:
        calls.append(point)
        return (scale * (point - target).square()).sum().item()

    point, value = rivals_snapvit.minimise(fitness, torch.ones(3, dtype=torch.float64), 1200, seed=0)
    assert len(calls) == 1200 and value == fitness(point) == min(map(fitness, calls[:1200]))
    assert value < 1e-4 < min(map(fitness, calls[:50]))
    again, _ = rivals_snapvit.minimise(fitness, torch.ones(3, dtype=torch.float64), 1200, seed=0)
    assert torch.equal(point, again)


def test_the_fitness_is_the_distance_of_the_pooled_outputs(monkeypatch: pytest.MonkeyPatch):
    model, importance, multipliers = random_backbone(), some_importance(), torch.rand(8, dtype=torch.float64)
    monkeypatch.setattr(rivals_snapvit, "COMPONENTS", 4)
    found = rivals_snapvit.fitness_of(model, importance, [IMAGES[:4], IMAGES[4:]])(multipliers)

    def features(network: nn.Module) -> np.ndarray:
        return network.forward_head(network.forward_features(IMAGES), pre_logits=True).detach().numpy()

    whole = features(model)
    values, vectors = np.linalg.eigh(np.cov(whole.T))
    axes, distances = vectors[:, np.argsort(values)[-4:]], []
    for mlp, heads in ((0.15, 0), (0.35, 0.2), (0.55, 0.4), (0.65, 0.5)):
        small = rivals_snapvit.plain_cut(copy.deepcopy(model), importance.times(multipliers), mlp, heads)
        pairs = zip((features(small) - whole.mean(0)) @ axes, (whole - whole.mean(0)) @ axes, strict=True)
        distances += [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
    assert found == pytest.approx(np.mean(distances))


def test_a_search_is_done_once_and_can_be_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rivals_snapvit, "EVALUATIONS", 3)
    task = task_of(dtype=torch.float32)
    small = METHODS["SnapViT, not corrected"](task)(Size(macs=0.5))
    found = copy.deepcopy(task.searches)
    monkeypatch.setattr(rivals_snapvit, "minimise", None)
    METHODS["SnapViT"](task)
    assert task.borrowed > found["snapvit"]["seconds"]
    other = task_of(dtype=torch.float32)
    other.searches = json.loads(json.dumps(found))
    again = METHODS["SnapViT, not corrected"](other)(Size(macs=0.5))
    images = IMAGES.float()
    assert torch.equal(small(images), again(images)) and other.borrowed == found["snapvit"]["seconds"]


# ---------------------------------------------------------------------------------------------------------------------
# Torch-Pruning


def matched(small: Tensor, whole: Tensor) -> Tensor:
    """The rows of `whole` that the rows of `small` are."""
    return torch.stack([(whole == row).all(1).nonzero()[0, 0] for row in small])


@pytest.mark.parametrize("isomorphic", [False, True])
def test_a_pruned_network_is_the_masked_one(isomorphic: bool):
    pytest.importorskip("torch_pruning")
    base = random_backbone()
    gradients = dependency_pruning.gradients_of(base, [(IMAGES, LABELS)], "ce", "logits")
    recipe = Recipe(bottleneck=True, isomorphic=isomorphic)
    small = dependency_pruning.prune_within(base, gradients, IMAGES[:1], 0.5 * count_macs(base), recipe)
    assert 0.4 * count_macs(base) < count_macs(small) == macs_of(small) <= 0.5 * count_macs(base)
    assert (small.embed_dim, len(small.blocks)) == (48, 2)
    masked = copy.deepcopy(base)
    for block, cut, whole in zip(masked.blocks, small.blocks, base.blocks, strict=True):
        kept = matched(cut.mlp.fc1.weight, whole.mlp.fc1.weight)
        zero = torch.ones(192, dtype=torch.bool)
        zero[kept] = False
        block.mlp.fc2.weight.data[:, zero] = 0
        kept = matched(cut.attn.qkv.weight, whole.attn.qkv.weight)
        zero = torch.ones(144, dtype=torch.bool)
        zero[kept] = False
        block.attn.qkv.weight.data[zero], block.attn.qkv.bias.data[zero] = 0, 0
        # The package divides the scores by the root of the dims that are left.
        rows = slice(0, 48)
        block.attn.qkv.weight.data[rows] *= (16 / cut.attn.head_dim) ** 0.5
        block.attn.qkv.bias.data[rows] *= (16 / cut.attn.head_dim) ** 0.5
    assert relative(small(IMAGES), masked(IMAGES)) < CLOSE
    assert any(cut.attn.num_heads < 3 for cut in small.blocks) == isomorphic


@pytest.mark.parametrize("isomorphic", [False, True])
def test_the_units_without_a_gradient_are_pruned_first(isomorphic: bool):
    pytest.importorskip("torch_pruning")
    base = random_backbone()
    unused = torch.randperm(192, generator=torch.Generator().manual_seed(0))[:60]
    layers = [(block.mlp.fc1, block.mlp.fc2) for block in base.blocks]
    gradients = [torch.ones_like(parameter) for parameter in base.parameters()]
    place = {id(parameter): index for index, parameter in enumerate(base.parameters())}
    for first, last in layers:
        for parameter in (first.weight, first.bias):
            gradients[place[id(parameter)]][unused] = 0
        gradients[place[id(last.weight)]][:, unused] = 0
    recipe = Recipe(bottleneck=True, isomorphic=isomorphic)
    small = dependency_pruning.pruned(base, gradients, IMAGES[:1], 60 / 192, recipe)
    for cut, (first, _) in zip(small.blocks, layers, strict=True):
        assert set(matched(cut.mlp.fc1.weight, first.weight).tolist()) == set(range(192)) - set(unused.tolist())


def test_isomorphic_pruning_leaves_every_block_a_unit():
    pytest.importorskip("torch_pruning")
    base = random_backbone()
    gradients = dependency_pruning.gradients_of(base, [(IMAGES, LABELS)], "ce", "logits")
    wanted = torch.zeros(192, dtype=torch.float64).index_fill(0, torch.arange(96), 2.0), torch.ones(192)
    for index, (name, parameter) in enumerate(base.named_parameters()):
        if ".mlp.fc" in name and parameter.shape != (48,):  # each unit of block 1 has an importance of 1
            importance = wanted[int(name.split(".")[1])].view(-1, *[1] * (parameter.ndim - 1))
            gradients[index] = (importance.mT if ".fc2." in name else importance) / parameter.detach()
    small = dependency_pruning.pruned(base, gradients, IMAGES[:1], 0.6, Recipe(bottleneck=True, isomorphic=True))
    assert [block.mlp.fc1.out_features for block in small.blocks] == [96, 1]
    assert small(IMAGES).isfinite().all()


def test_the_gradient_of_the_importance_is_summed_over_batches():
    base = random_backbone()
    found = dependency_pruning.gradients_of(base, batches(IMAGES, LABELS, 4), "ce", "logits")
    F.cross_entropy(base(IMAGES), LABELS, reduction="sum").backward()
    for gradient, parameter in zip(found, base.parameters(), strict=True):
        assert relative(gradient, parameter.grad) < CLOSE


# ---------------------------------------------------------------------------------------------------------------------
# All methods, and the program

SLOW = "steps"


@pytest.mark.parametrize("target", ["logits", "tokens"])
@pytest.mark.parametrize("name", [name for name in METHODS if SLOW not in name])
def test_every_method_makes_plain_networks_within_the_macs(name: str, target: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rivals_snapvit, "EVALUATIONS", 2)
    if "Torch" in name or "Isomorphic" in name:
        pytest.importorskip("torch_pruning")
    model = random_backbone(num_classes=7 if target == "logits" else 0, dtype=torch.float32)
    task, before = task_of(model, target, torch.float32), copy.deepcopy(model.state_dict())
    small = METHODS[name](task)(Size(macs=0.6))
    if target == "tokens" and name in ("Torch-Pruning", "Isomorphic"):
        assert small is None
        return
    assert 0.45 < macs_of(small) / macs_of(model) <= 0.6
    assert small.forward_features(IMAGES.float()).isfinite().all()
    assert small is not model and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in small.parameters())


DIGITS = ["--data-set", "digits", "--batch-size", 256, "--workers", 0, "--device", "cpu", "--proxy-samples", 64]
TINY = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
MODEL = ["--model", PLAIN, "--model-kwargs", *(f"{key}={value}" for key, value in TINY.items())]


def test_the_program_measures_a_classifier_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(rivals_snapvit, "EVALUATIONS", 2)
    monkeypatch.setattr(rivals_corp, "MIN_UNITS", 8)
    monkeypatch.setattr(rivals_corp, "MIN_DIMS", 2)
    model = draw_parameters(create_backbone(PLAIN, **TINY, num_classes=10))
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    words = ["classifier", "--name", "tiny", *DIGITS, *MODEL, "--crop-pct", 1, "--val-images", 90]
    words += ["--checkpoint", tmp_path / "plain.safetensors", "--output-dir", tmp_path]
    words += ["--sizes", 0.5, "mlp50", "mlp10+qk25", "--methods"]
    methods = ["random", "VBP", "SnapViT", "CORP", "best", "best, refitted"]
    run_entry_point(rivals.main, *words, *methods[:3])
    for _ in range(2):  # the second time everything is there
        run_entry_point(rivals.main, *words, *methods)
        content = json.loads((tmp_path / "rivals_tiny.json").read_text())
        assert [(row["method"], row["size"]) for row in content["rows"]] == list(
            itertools.product(methods, ("0.5", "mlp50", "mlp10+qk25"))
        )
    found = {(row["method"], row["size"]): row for row in content["rows"]}
    assert found["random", "mlp10+qk25"]["macs_share"] is None
    assert found["CORP", "mlp50"]["kl"] < found["random", "mlp50"]["kl"] / 2
    assert found["best, refitted", "0.5"]["macs_share"] <= 0.5
    assert [row["search"] for row in content["searches"]] == ["snapvit"]
    assert len(content["whole"]) == 1 and content["whole"][0]["images"] == 90
    text = rivals.markdown(content)
    row = found["VBP", "mlp50"]
    assert f" | {row['top1']:.1f}, {row['kl']:.4f} |" in next(line for line in text.splitlines() if "| VBP |" in line)
    assert text in capsys.readouterr().out
    assert (tmp_path / "rivals_tiny.png").exists()


def test_the_program_measures_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rivals_snapvit, "EVALUATIONS", 2)
    words = ["encoder", "--name", "tiny", *encoder_files(tmp_path, 12), "--fit", 8, "--report", 4]
    methods = ["Taylor", "SnapViT", "CORP", "best"]
    run_entry_point(rivals.main, *words, "--methods", *methods, "--sizes", 0.75, "mlp35+heads34")
    rows = json.loads((tmp_path / "rivals_tiny.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [name for name in methods for _ in range(2)]
    shares = {row["method"]: row["macs_share"] for row in rows if row["size"] == "mlp35+heads34"}
    assert shares["CORP"] is None and shares["Taylor"] == shares["best"] and 0.68 < shares["SnapViT"] < 0.72
    assert all(-1 <= row["features"] <= 1 and 0 <= row["iou"] <= 1 for row in rows if row["macs_share"])
    assert "features, patch, iou" in rivals.markdown({"rows": rows})
    without = [{key: value for key, value in row.items() if key != "iou"} for row in rows]  # as without --head
    assert "features, patch." in rivals.markdown({"rows": without})
