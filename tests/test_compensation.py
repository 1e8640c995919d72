"""Compensation: exact at full width, least squares at every other; bases and orders, and the file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import last_layer_moments, run_in_ranks
from safetensors.torch import load_file, save_file
from tiny import VARIANTS, batches, random_backbone, random_data, relative, some_widths
from torch import Tensor, nn

from models.backbone import Module, full_widths, last_layer, modules_of
from models.elastic import make_elastic, set_widths
from models.extraction import extract
from studies.centring import centre_values
from supernet.facts import stamp_of
from utils import UserError, tf32
from wpac.allocation import dim_errors
from wpac.bases import elimination_order, score_bases, square_roots, value_basis
from wpac.compensation import (
    COMPENSATION,
    UNIFORM_SHARE,
    Compensation,
    OutputCollector,
    OutputMoments,
    compensate,
    load_compensation,
    ordered_layer,
    save_compensation,
)
from wpac.statistics import collect_statistics
from wpac.transform import contract

WITH_BIASES = [name for name in VARIANTS if name != "no_bias"]


def contracted(variant: str = "plain", count: int = 24, **more) -> tuple[nn.Module, dict[str, OutputMoments]]:
    """A backbone contracted by --method best and compensated, and its moments."""
    model = random_backbone(variant, **more)
    images, targets = random_data(count)
    images = images.to(model.head.weight.dtype)
    statistics = collect_statistics(model, batches(images, targets, 8), outputs=True)
    contract(model, statistics, "fisher", "fisher")
    centre_values(model, statistics)
    assert compensate(model, statistics.outputs) == []
    return model, statistics.outputs


def wide_data(n: int, rank: int, count: int, seed: int) -> Tensor:
    """Correlated inputs (count, n) of rank `rank` with a mean other than zero."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    return torch.randn(count, rank, generator=generator, dtype=torch.float64) @ factor + factor.sum(0)


def moments_of(x: Tensor, outputs: int = 3) -> OutputMoments:
    """The moments of inputs x (count, n), all weighted equally, with the identity as metric."""
    covariance = torch.cov(x.T, correction=0).view(x.shape[1], x.shape[1])
    one = torch.eye(outputs, dtype=torch.float64)
    return OutputMoments(x.mean(0), covariance, one, torch.ones(1, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# The layer


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(1, 9), st.integers(10, 30), st.integers(0, 2**31 - 1))
def test_a_compensated_layer_is_the_least_squares_solution_on_the_data(n, rank, count, seed):
    """Compared with a direct least-squares solution, in which further rows of the inputs express the damping."""
    x = wide_data(n, rank, count, seed)
    weight, bias = torch.randn(3, n, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    moments, damping = moments_of(x), 1e-3
    found = Compensation(moments.mean, torch.linalg.cholesky(moments.damped(damping)), moments.positions)
    centred = x - x.mean(0)
    damp = (damping * count * moments.covariance.diagonal().mean()).sqrt()
    for k in range(1, n):
        # The prediction of the other inputs from the first k is damped; the layer then absorbs it.
        rows = torch.cat([centred[:, :k], damp * torch.eye(k, dtype=torch.float64)])
        targets = torch.cat([centred[:, k:], torch.zeros(k, n - k, dtype=torch.float64)])
        prediction = torch.linalg.lstsq(rows, targets, driver="gelsd").solution  # (k, n - k)
        wanted = weight[:, :k] + weight[:, k:] @ prediction.T
        wanted_bias = bias + weight @ moments.mean - wanted @ moments.mean[:k]
        cut, cut_bias = found(weight, bias, k)
        assert relative(cut, wanted) < 1e-8
        assert relative(cut_bias, wanted_bias) < 1e-8


def test_without_damping_no_layer_of_the_same_size_is_better(seed: int = 0):
    x = wide_data(6, 6, 50, seed)
    weight, bias = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    moments = moments_of(x)
    found = Compensation(moments.mean, torch.linalg.cholesky(moments.covariance), moments.positions)
    target = x @ weight.T + bias
    for k in range(1, 6):
        rows = torch.cat([x[:, :k], torch.ones(50, 1, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(rows, target).solution
        cut, cut_bias = found(weight, bias, k)
        assert relative(x[:, :k] @ cut.T + cut_bias, rows @ best) < 1e-8


def test_one_factor_serves_every_size():
    """Cutting to k and then to j < k equals cutting to j directly."""
    moments = moments_of(wide_data(8, 8, 40, 3))
    lower = torch.linalg.cholesky(moments.damped(1e-3))
    weight, bias = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    whole = Compensation(moments.mean, lower, moments.positions)
    prefix = Compensation(moments.mean[:5], lower[:5, :5], moments.positions)
    for k in range(1, 5):
        for twice, once in zip(prefix(*whole(weight, bias, 5), k), whole(weight, bias, k), strict=True):
            assert relative(twice, once) < 1e-10


@pytest.mark.parametrize("spoil", ["zeros", "constant", "one row", "fewer rows than dims", "twice the same", "huge"])
def test_singular_inputs_give_a_finite_layer_that_is_no_worse(spoil):
    x = wide_data(6, 6, 40, 0)
    x = {
        "zeros": 0 * x,
        "constant": x[:1].expand(40, 6),
        "one row": x[:1],
        "fewer rows than dims": x[:3],
        "twice the same": x[:, [0, 1, 2, 0, 1, 2]],
        "huge": x * torch.tensor([1, 1e-8, 1e8, 1, 0, 1e-3], dtype=torch.float64),
    }[spoil]
    weight, bias = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    moments = moments_of(x)
    found = Compensation(moments.mean, torch.linalg.cholesky(moments.damped()), moments.positions)
    target = x @ weight.T + bias
    for k in range(1, 6):
        cut, cut_bias = found(weight, bias, k)
        assert cut.isfinite().all() and cut_bias.isfinite().all()
        error = (x[:, :k] @ cut.T + cut_bias - target).square().sum()
        assert error <= (x[:, :k] @ weight[:, :k].T + bias - target).square().sum() + 1e-9 * target.square().sum()


@pytest.mark.parametrize("spread", [0, 1e-4, 1])
def test_moments_of_a_float32_model_can_be_factorised(spread):
    """Even if their mean is large compared with their spread, and almost without damping."""
    collector = OutputCollector(Module("0.mlp", 0, "mlp", 300, 1, 3), torch.device("cpu"))
    x = 30 + spread * torch.randn(2, 50, 300, generator=torch.Generator().manual_seed(0))
    collector.update(x, torch.ones(2, 50, 3))
    moments = collector.finalize()
    assert torch.linalg.cholesky(moments.damped(1e-30)).isfinite().all()
    assert relative(moments.mean, x.double().mean((0, 1))) < 1e-6
    wanted = torch.cov(x.double().flatten(0, 1).T, correction=0)
    assert (moments.covariance - wanted).norm() <= moments.rounding


def test_a_module_that_compensation_makes_worse_is_not_compensated():
    model, moments = contracted()
    bad = copy.copy(moments["1.mlp"])
    bad.covariance = bad.covariance * float("nan")
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(bad.damped())
    # A factor that does not belong to the inputs: that of the same inputs in reverse order.
    worse = copy.copy(moments["1.mlp"])
    worse.damped = lambda _damping: moments["1.mlp"].damped().flip(0).flip(1)
    refused = compensate(model, moments | {"1.mlp": worse})
    assert refused == ["1.mlp"]
    assert model.blocks[1].mlp.compensation is None
    assert model.blocks[0].mlp.compensation is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modules_may_be_compensated_one_after_another(dtype: torch.dtype):
    model, moments = contracted(dtype=dtype)
    together = copy.deepcopy(model)
    for block in model.blocks:
        block.attn.compensation = block.mlp.compensation = None
    for key, moment in moments.items():
        assert compensate(model, {key: moment}) == []
    for one, other in zip(model.blocks, together.blocks, strict=True):
        for kind in ("attn", "mlp"):
            found, expected = getattr(one, kind).compensation, getattr(other, kind).compensation
            assert torch.equal(found.lower, expected.lower) and found.lower.dtype == dtype


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("variant", WITH_BIASES)
def test_contraction_by_the_method_best_keeps_the_logits(variant, data):
    model = random_backbone(variant)
    before = model(data[0]).detach()
    statistics = collect_statistics(model, [data], outputs=True)
    contract(model, statistics, "fisher", "fisher")
    assert relative(model(data[0]), before) < 1e-10
    centre_values(model, statistics)
    compensate(model, statistics.outputs)
    assert relative(model(data[0]), before) < 1e-10
    assert relative(extract(model, full_widths(model))(data[0]), before) < 1e-10


@pytest.mark.parametrize("method", [("wpac", "taylor"), ("fisher", "fisher")])
def test_a_proxy_set_with_fewer_tokens_than_dims_per_head(method, data):
    """One image of 5 tokens, 16 dims per head, 192 hidden units: finite, exact at full width, and it can be cut."""
    model = random_backbone(patch_size=16)
    images, targets = data
    before = model(images).detach()
    statistics = collect_statistics(model, [(images[:1], targets[:1])], outputs=True)
    contract(model, statistics, *method)
    compensate(model, statistics.outputs)
    assert relative(model(images), before) < 1e-10
    assert extract(model, some_widths(model))(images).isfinite().all()


def test_moments_follow_the_contraction(data):
    """The moments that contract() and centre_values() transform equal those of the contracted model."""
    for variant in ("plain", "five_heads", "layer_scale"):
        model = random_backbone(variant)
        statistics = collect_statistics(model, [data], "ce", outputs=True)
        contract(model, statistics, "fisher", "fisher")
        centre_values(model, statistics)
        again = collect_statistics(model, [data], "ce", outputs=True)
        for key, module in modules_of(model).items():
            order = torch.arange(module.heads * module.width)
            if module.kind == "attn":
                order = order.view(module.heads, module.width).T.flatten()
            found, expected = statistics.outputs[key], again.outputs[key].reordered(order)
            scale = expected.covariance.diagonal().mean().sqrt()
            assert (found.mean - expected.mean).abs().max() < 1e-9 * scale
            assert relative(found.covariance, expected.covariance) < 1e-9
            assert relative(found.metric, expected.metric) < 1e-9
            if module.kind == "attn":
                assert found.mean.abs().max() == 0
                assert relative(statistics.tokens[key].gradient, again.tokens[key].gradient) < 1e-9


def test_last_layer_moments_equal_the_reference(backbone, data):
    images, targets = (part[:4] for part in data)
    statistics = collect_statistics(backbone, batches(images, targets, 3), "ce", outputs=True)
    for key, found in statistics.outputs.items():
        block, kind = key.split(".")
        layer, rows = last_layer(backbone.blocks[int(block)], kind), []
        hook = layer.register_forward_hook(lambda _m, inputs, output, rows=rows: rows.append((inputs[0], output)))
        for image, target in zip(images, targets, strict=True):
            loss = nn.functional.cross_entropy(backbone(image[None]), target[None])
            x, output = rows.pop()
            (g,) = torch.autograd.grad(loss, output)
            rows.insert(0, (x[0].detach(), g[0]))
        hook.remove()
        energy = torch.stack([g.square().sum(1) for _, g in rows])  # (images, N)
        weight = UNIFORM_SHARE + (1 - UNIFORM_SHARE) * energy / energy.mean(1, keepdim=True)
        x, g = torch.cat([x for x, _ in rows]), torch.cat([g for _, g in rows])
        w = weight.flatten() / weight.sum()
        mean = w @ x
        assert relative(found.mean, mean) < 1e-10
        assert relative(found.covariance, ((x - mean) * w[:, None]).T @ (x - mean)) < 1e-10
        assert relative(found.metric, g.T @ g / len(g)) < 1e-10
        assert relative(found.positions, energy.mean(0) / energy.mean()) < 1e-10


@pytest.mark.parametrize("size", [1, 3])
def test_moments_do_not_depend_on_the_batch_size(any_backbone, data, size):
    whole = collect_statistics(any_backbone, [data], "ce", outputs=True).outputs
    parts = collect_statistics(any_backbone, batches(*data, size), "ce", outputs=True).outputs
    for key in whole:
        for name in ("mean", "covariance", "metric", "positions"):
            assert relative(getattr(parts[key], name), getattr(whole[key], name)) < 1e-10


def test_moments_and_refitting_of_two_processes_equal_those_of_one(tmp_path):
    alone = last_layer_moments(slice(0, 8))
    for rank in run_in_ranks(last_layer_moments_of_rank, 2, tmp_path):
        assert rank.keys() == alone.keys()
        assert all(relative(rank[key], alone[key]) < 1e-9 for key in alone)


def last_layer_moments_of_rank(rank: int) -> dict[str, Tensor]:
    return last_layer_moments((slice(0, 5), slice(5, 8))[rank])


@pytest.mark.parametrize("variant", WITH_BIASES)
def test_an_extracted_compensated_model_equals_the_compensated_super_network(variant, data):
    model, _ = contracted(variant)
    widths = some_widths(model)
    small = extract(model, widths)
    assert not any(isinstance(module, Compensation) for module in small.modules())
    assert small.state_dict().keys() <= random_backbone(variant).state_dict().keys()
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        block.attn.compensation = block.mlp.compensation = None
    assert relative(extract(plain, widths)(data[0]), small(data[0])) > 1e-3
    super_network = make_elastic(model)
    set_widths(super_network, widths)
    assert relative(super_network(data[0]), small(data[0])) < 1e-10


def test_cut_columns_have_a_gradient_through_compensation(data):
    """Compensation uses the cut columns of the last layer, but not the cut rows of the first."""
    model = make_elastic(contracted()[0])
    set_widths(model, {key: width // 2 for key, width in full_widths(model).items()})
    model(data[0]).sum().backward()
    half = model.blocks[0].mlp.fc2.in_features // 2
    assert model.blocks[0].mlp.fc2.weight.grad[:, half:].abs().max() > 0
    assert model.blocks[0].mlp.fc1.weight.grad[half:].abs().max() == 0


def test_products_are_exact_where_training_is_in_tf32(data, monkeypatch):
    found, solve = [], torch.linalg.solve_triangular

    def noted(*words, **more) -> Tensor:
        found.append(torch.get_float32_matmul_precision())
        return solve(*words, **more)

    monkeypatch.setattr(torch.linalg, "solve_triangular", noted)
    model = make_elastic(contracted()[0])
    set_widths(model, {key: width // 2 for key, width in full_widths(model).items()})
    with tf32():
        model(data[0])
        assert torch.get_float32_matmul_precision() == "high"
    assert found and {*found} == {"highest"} and torch.get_float32_matmul_precision() == "highest"


def test_compensation_reduces_the_error_at_every_share():
    """Measured on images that are not in the proxy set."""
    model, _ = contracted(count=64)
    images, _ = random_data(32, seed=9)
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        block.attn.compensation = block.mlp.compensation = None
    whole = model(images)
    for eighths in (2, 4, 6):
        widths = {key: width * eighths // 8 for key, width in full_widths(model).items()}
        compensated, cut = ((extract(m, widths)(images) - whole).square().mean() for m in (model, plain))
        assert compensated < cut


# ---------------------------------------------------------------------------------------------------------------------
# Bases and orders


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31 - 1))
def test_the_first_dims_of_q_and_k_approximate_the_scores_best(d, rank, seed):
    """The first k dims give a best approximation of the scores of rank k, up to RIDGE; all dims give the scores."""
    q, k = wide_data(d, rank, 60, seed), wide_data(d, min(rank + 1, d), 60, seed + 1)
    k = k - k.mean(0)
    moments = torch.stack([q.T @ q, k.T @ k])[:, None] / 60  # (2, 1, d, d)
    bases, values = score_bases(moments)
    T_q, T_k = bases[:, 0]
    assert relative(T_q.T @ T_k, torch.eye(d, dtype=torch.float64)) < 1e-9
    assert (values.diff() <= 1e-12 * values.max()).all()
    scores = q @ k.T
    best = torch.linalg.svdvals(scores)
    for kept in range(1, d):
        cut = (q @ T_q[:kept].T) @ (k @ T_k[:kept].T).T
        left = (scores - cut).square().sum()
        assert left <= best[kept:].square().sum() * (1 + 1e-6) + 1e-2 * best.square().sum()


def test_the_first_dims_of_v_are_the_best_subspace_for_the_loss():
    """Their error in the metric, after compensation, is below that of 200 random subspaces of the same size."""
    generator = torch.Generator().manual_seed(0)

    def positive(n: int) -> Tensor:
        factor = torch.randn(n, n, generator=generator, dtype=torch.float64)
        return factor @ factor.T

    proj, covariance, metric = torch.randn(1, 5, 6, generator=generator).double(), positive(6)[None], positive(5)
    (T_v,), _ = value_basis(proj, covariance, metric)
    assert relative(T_v @ T_v.T, torch.eye(6, dtype=torch.float64)) < 1e-12

    def error(rows: Tensor) -> float:
        prediction = covariance[0] @ rows.T @ torch.linalg.solve(rows @ covariance[0] @ rows.T, rows)
        lost = proj[0] @ (torch.eye(6, dtype=torch.float64) - prediction)
        return (metric * (lost @ covariance[0] @ lost.T)).sum().item()

    for k in range(1, 5):
        others = [error(torch.randn(k, 6, generator=generator, dtype=torch.float64)) for _ in range(200)]
        assert error(T_v[:k]) < min(others)


def test_elimination_order_finds_the_best_pair():
    """Compared with all pairs of units, of which two, 0 and 4, are almost the same up to scale."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5, 0.1])
    x = torch.cat([x, 3 * x[:, :1] + 0.01 * torch.randn(500, 1, generator=generator, dtype=torch.float64)], 1)
    moments = moments_of(x)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    order = elimination_order(weight, moments.damped(1e-6), moments.metric, rounds=5)
    assert sorted(order.tolist()) == list(range(5))
    centred = x - x.mean(0)

    def error(kept: list[int]) -> float:
        solution = torch.linalg.lstsq(centred[:, kept], centred @ weight.T)
        return (centred[:, kept] @ solution.solution - centred @ weight.T).square().sum().item()

    pairs = {pair: error(list(pair)) for pair in [(a, b) for a in range(5) for b in range(a)]}
    assert error(order[:2].tolist()) == pytest.approx(min(pairs.values()), rel=1e-3)
    assert set(order[:2].tolist()) != {0, 4}


@pytest.mark.parametrize("kind", ["zeros", "one direction"])
def test_square_roots_of_singular_moments(kind):
    vector = torch.arange(4, dtype=torch.float64)[:, None]
    root, inverse = square_roots(vector @ vector.T * (kind != "zeros"))
    assert relative(root @ inverse, torch.eye(4, dtype=torch.float64)) < 1e-9


def test_dim_errors_equal_the_error_of_a_cut(data):
    """For an MLP, their sum from k on is the error, in the metric, of the layer cut to k, up to damping."""
    model, moments = contracted()
    statistics = collect_statistics(model, [data], outputs=True)
    statistics.outputs = moments
    errors = dim_errors(model, statistics, damping=1e-9)
    module = modules_of(model)["0.mlp"]
    weight, bias = ordered_layer(model, module)
    moment = moments["0.mlp"]
    lower = torch.linalg.cholesky(moment.damped(1e-9))
    for k in (48, 96, 144):
        cut, _ = Compensation(moment.mean, lower, moment.positions)(weight, bias, k)
        lost = weight.clone()
        lost[:, :k] -= cut
        error = (moment.metric * (lost @ moment.covariance @ lost.T)).sum().item()
        assert errors["0.mlp"][k:].sum() == pytest.approx(error, rel=1e-3)
    assert all((error >= 0).all() and error.shape == (modules_of(model)[key].width,) for key, error in errors.items())


# ---------------------------------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize("scale", [1, 1e-6, 1e6])
def test_save_and_load_compensation(scale: float, tmp_path: Path, data):
    """In half precision, but in float32 if the factor exceeds the range of float16."""
    model, _ = contracted(dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, Compensation):
            module.lower *= scale
    path = tmp_path / COMPENSATION
    assert save_compensation(path, model, stamp_of(model.parameters())) == path.stat().st_size
    again = copy.deepcopy(model)
    for block in again.blocks:
        block.attn.compensation = block.mlp.compensation = None
    load_compensation(path, again, stamp_of(again.parameters()))
    images = data[0].float()
    widths = some_widths(model)
    half = scale == 1
    assert relative(extract(again, widths)(images), extract(model, widths)(images)) < (2e-3 if half else 1e-5)
    factors, vectors = 192 * 193 + 48 * 49, 2 * (192 + 48 + 2 * 17)  # in two blocks
    assert path.stat().st_size < (2 if half else 4) * factors + 4 * vectors + 2000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"stamp": t["stamp"] + 1}, "made for other weights"),
        (lambda t: t | {"0.mlp.lower": t["0.mlp.lower"][:-1]}, "0.mlp.lower has shape"),
        (lambda t: t | {"7.mlp.mean": t["0.mlp.mean"].clone()}, "7.mlp.mean has shape"),
        (lambda t: {key: value for key, value in t.items() if key != "0.mlp.lower"}, "0.mlp.lower is missing"),
        (lambda t: {key: value for key, value in t.items() if key != "0.mlp.mean"}, "0.mlp.mean is missing"),
        (lambda t: {key: value for key, value in t.items() if key != "stamp"}, "made for other weights"),
        (lambda t: t | {"1.attn.positions": t["1.attn.positions"][:-1].clone()}, "1.attn.positions has shape"),
        (lambda t: t | {"0.mlp.mean": t["0.mlp.mean"].int()}, "0.mlp.mean has shape"),
    ],
)
def test_a_compensation_that_does_not_fit_is_refused(change, said, tmp_path: Path):
    model, _ = contracted(dtype=torch.float32)
    path = tmp_path / COMPENSATION
    save_compensation(path, model, stamp_of(model.parameters()))
    save_file(change(load_file(path)), path)
    with pytest.raises(UserError, match=said):
        load_compensation(path, model, stamp_of(model.parameters()))


def test_a_model_without_biases_is_refused():
    model = random_backbone("no_bias")
    statistics = collect_statistics(model, [random_data(4)], outputs=True)
    with pytest.raises(UserError, match=r"0\.attn: its last layer has no bias"):
        compensate(model, statistics.outputs)
