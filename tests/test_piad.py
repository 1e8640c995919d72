"""PIAD: importance, the order in which units leave, the growth of the mask table, and the draw of op codes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import all_statistics
from scipy import stats
from sklearn.isotonic import IsotonicRegression
from tiny import VARIANTS, activations, batches, random_backbone, random_data, some_widths
from torch import nn
from torch.nn import functional as F

from models.backbone import Module, create_backbone, full_widths, modules_of
from models.elastic import make_elastic
from models.extraction import extract
from models.macs import count_macs
from piad.dropout_list import UNITS, Units, grow, leaving_order, pool_units, rounded_unit_sizes, unit_sizes, units_of
from piad.importance import dimension_importance, importance_of_dims, module_sensitivity
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout
from piad.sampling import SCALES, draw_by_scale, draw_op_code

# Round numbers are drawn often, because they make equal densities.
DENSITIES = st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e3, allow_subnormal=False))


# ---------------------------------------------------------------------------------------------------------------------
# The order in which units leave


@settings(max_examples=200)
@given(st.lists(DENSITIES, min_size=1, max_size=32), st.integers(1, 10**6))
def test_pooling_is_isotonic_regression(importance, macs):
    pools = pool_units(np.array(importance), macs)
    assert sum(count for count, _ in pools) == len(importance)
    assert all(count > 0 for count, _ in pools)
    found = np.repeat([density for _, density in pools], [count for count, _ in pools])
    tail_to_head = np.array(importance[::-1]) / macs
    expected = IsotonicRegression().fit_transform(np.arange(len(importance)), tail_to_head)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * max(tail_to_head.max(), 1e-300))
    assert (np.diff([density for _, density in pools]) >= 0).all()


def test_units_that_need_no_pooling_leave_one_by_one():
    assert pool_units(np.array([8.0, 6.0, 6.0, 2.0]), 2) == [(1, 1.0), (1, 3.0), (1, 3.0), (1, 4.0)]
    assert pool_units(np.array([1.0, 2.0, 6.0]), 1) == [(3, 3.0)]
    assert pool_units(np.array([9.0, 1.0, 3.0]), 1) == [(2, 2.0), (1, 9.0)]


@st.composite
def networks(draw):
    """(widths, importance of each dim, units) of one to six modules, some of them cut or bypassed."""
    widths, importance, sizes, macs, fixed = {}, {}, {}, {}, {}
    for block, kind in itertools.product(range(draw(st.integers(1, 3))), ("attn", "mlp")):
        key = f"{block}.{kind}"
        sizes[key] = draw(st.integers(1, 3))
        widths[key] = sizes[key] * draw(st.integers(0, 6))
        macs[key] = draw(st.integers(1, 20))
        fixed[key] = draw(st.sampled_from([0, 0, 30]))
        if widths[key]:
            importance[key] = np.array(draw(st.lists(DENSITIES, min_size=widths[key], max_size=widths[key])))
    return widths, importance, linear(sizes, macs, fixed)


def linear(sizes: dict[str, int], per_dim: dict[str, int], fixed: dict[str, int] | None = None) -> Units:
    """Units whose costs are proportional to the width, plus what a module costs at any width above 0."""
    return Units(sizes, lambda key, width: width * per_dim[key] + (fixed or {}).get(key, 0) if width else 0)


@given(networks())
def test_no_unit_leaves_before_those_behind_it(network):
    widths, importance, units = network
    kept = dict(widths)
    steps = leaving_order(widths, importance, units)
    for step in steps:
        assert step.dims > 0
        assert step.dims % units.sizes[step.key] == 0
        # The dims that leave are the tail of those that are kept, and the density is that of exactly these dims.
        leaving = importance[step.key][kept[step.key] - step.dims : kept[step.key]]
        before = units.cost(step.key, kept[step.key])
        kept[step.key] -= step.dims
        cost = before - units.cost(step.key, kept[step.key])
        assert step.density == pytest.approx(leaving.sum() / cost, rel=1e-9, abs=1e-12)
    assert not any(kept.values())
    assert [step.density for step in steps] == sorted(step.density for step in steps)


def test_equal_densities_keep_the_order_of_the_modules():
    widths = {"0.attn": 2, "0.mlp": 2, "1.attn": 1}
    importance = {key: np.ones(width) for key, width in widths.items()}
    steps = leaving_order(widths, importance, linear(dict.fromkeys(widths, 1), dict.fromkeys(widths, 1)))
    assert [step.key for step in steps] == ["0.attn", "0.attn", "0.mlp", "0.mlp", "1.attn"]


def test_macs_weigh_the_importance():
    """The expensive module leaves first, although the cheap one is less important."""
    widths = {"0.attn": 1, "0.mlp": 1}
    importance = {"0.attn": np.array([1.0]), "0.mlp": np.array([2.0])}
    steps = leaving_order(widths, importance, linear({"0.attn": 1, "0.mlp": 1}, {"0.attn": 1, "0.mlp": 4}))
    assert [(step.key, step.density) for step in steps] == [("0.mlp", 0.5), ("0.attn", 1.0)]


# ---------------------------------------------------------------------------------------------------------------------
# Growth of the mask table


@given(networks(), st.integers(1, 4), st.floats(0.05, 1.2), st.randoms(use_true_random=False))
def test_the_table_grows_to_its_target_each_epoch(network, epochs, ratio, random):
    widths, _, units = network
    total = units.total(widths)
    table = MaskTable([widths], {"model": "tiny"})
    for epoch in range(epochs):
        target = ratio * (epoch + 1) / epochs * total
        smallest = table.widths(-1)
        importance = {key: np.array([random.random() for _ in range(w)]) for key, w in smallest.items() if w}
        before = [dict(row) for row in table.rows]
        grown = grow(table, importance, units, target)
        assert table.rows == before  # the old table is not modified
        assert grown.rows[: len(before)] == before  # and its rows are kept
        assert grown.meta == {"model": "tiny"}

        removed = [total - units.total(row) for row in grown.rows]
        assert removed[-1] >= target or not any(grown.widths(-1).values())
        new = len(grown) - len(before)
        assert all(macs < target for macs in removed[len(before) - 1 : -1])  # and not a step further
        steps = leaving_order(smallest, importance, units)
        for row, following, step in zip(grown.rows[-new - 1 :], grown.rows[len(before) :], steps, strict=False):
            changed = {key: row[key] - following[key] for key in row if row[key] != following[key]}
            assert changed == {step.key: step.dims}
        table = grown


def test_the_table_ends_with_an_empty_network():
    table = MaskTable([{"0.attn": 8, "0.mlp": 32}])
    importance = {"0.attn": np.arange(8.0, 0, -1), "0.mlp": np.arange(32.0, 0, -1)}
    units = linear({"0.attn": 1, "0.mlp": 1}, {"0.attn": 3, "0.mlp": 1})
    empty = grow(table, importance, units, 1e9)
    assert empty.widths(-1) == {"0.attn": 0, "0.mlp": 0}
    assert len(empty) == 1 + 8 + 32
    assert grow(empty, {}, units, 1e9) == empty
    assert grow(table, importance, units, 0) == table


def test_units_of_a_model(backbone):
    assert unit_sizes(modules_of(backbone)) == {"0.attn": 2, "0.mlp": 6, "1.attn": 2, "1.mlp": 6}
    with torch.device("meta"):
        deit = create_backbone("vit_base")
    assert set(unit_sizes(modules_of(deit)).items()) == {(f"{b}.attn", 8) for b in range(12)} | {
        (f"{b}.mlp", 96) for b in range(12)
    }
    assert UNITS == {"attn": 8, "mlp": 32}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_units_account_for_all_macs_of_the_modules(qk_norm):
    """With norms of q and k, v alone is cut, and the layers of q and k leave with the last unit."""
    model = random_backbone(qk_norm=qk_norm)
    units, full = units_of(model), full_widths(model)
    assert units.sizes == unit_sizes(modules_of(model))
    assert (units.cost("0.attn", 2) < 2 * units.cost("0.attn", 1)) == qk_norm
    empty = count_macs(model, dict.fromkeys(full, 0))
    for widths in (full, {key: units.sizes[key] for key in full}, full | {"0.attn": 0}):
        assert units.total(widths) == count_macs(model, widths) - empty


def sizes_of(attn: int, mlp: int) -> dict[str, int]:
    """Of the units of a network with attentions and MLPs of these widths."""
    widths = {"attn": attn, "mlp": mlp}
    return unit_sizes({k: Module(f"0.{k}", 0, k, width, heads=1, dim=8) for k, width in widths.items()})


@pytest.mark.parametrize(
    ("attn", "mlp", "sizes"),
    [
        (64, 1536, (8, 48)),  # DeiT-S
        (32, 384, (4, 12)),  # the first stage of Swin-T
        (88, 6144, (11, 192)),  # ViT-g
        (72, 4304, (8, 136)),  # SigLIP-so400m: its attention alone would divide
        (64, 2730, (8, 88)),
        (11, 148, (2, 8)),
    ],
)
def test_units_are_equal_where_all_widths_of_a_network_divide(attn: int, mlp: int, sizes: tuple[int, int]):
    """Otherwise they have rounded sizes. A network of which there are published tables keeps its units."""
    assert tuple(sizes_of(attn, mlp).values()) == sizes


def test_a_table_ends_with_an_empty_network_where_units_are_not_equal():
    model = random_backbone(embed_dim=33, mlp_ratio=5)  # 11 dims per head, 165 hidden units
    piad = ProgressiveDropout(make_elastic(model), [random_data(8)], ratio=1.0, epochs=1, seed=0, table=None)
    piad.begin_epoch(0)
    units = piad.units
    assert units.sizes["0.attn"] == 2 and units.sizes["0.mlp"] == 8
    found = {key: {row[key] for row in piad.table.rows} for key in units.sizes}
    for key, width in full_widths(model).items():
        assert {0, width} <= found[key] <= {*units.edges(key, width)}
    assert not any(piad.table.widths(-1).values())


def test_a_table_of_other_units_can_grow():
    """As one that was made for a device."""
    model = random_backbone()
    full = full_widths(model)
    table = MaskTable([full, full | {"0.attn": 15, "0.mlp": 184}])
    piad = ProgressiveDropout(make_elastic(model), [random_data(8)], ratio=1.0, epochs=1, seed=0, table=table)
    piad.begin_epoch(0)
    assert piad.table.rows[:2] == table.rows and not any(piad.table.widths(-1).values())
    assert {row["0.mlp"] for row in piad.table.rows[1:]} <= {*range(0, 184, 6), 184}


@pytest.mark.parametrize(
    ("kind", "width", "edges"),
    [
        ("mlp", 4304, [0, 136, ..., 4080, 4216, 4304]),  # SigLIP-so400m
        ("attn", 72, [0, 8, ..., 56, 64, 72]),
        ("mlp", 2730, [0, 88, ..., 2552, 2640, 2728, 2730]),
        ("mlp", 1536, [0, 48, ..., 1440, 1488, 1536]),
        ("attn", 64, [0, 8, ..., 48, 56, 64]),
        ("attn", 32, [0, 4, ..., 24, 28, 32]),  # a multiple of 8 would halve the number of units
        ("attn", 11, [0, 2, ..., 8, 10, 11]),
    ],
)
def test_rounded_units_are_multiples_of_8_and_the_last_may_be_shorter(kind, width, edges):
    key = f"0.{kind}"
    sizes = rounded_unit_sizes({key: Module(key, 0, kind, width, heads=1, dim=8)})
    units = linear(sizes, {key: 1})
    found = units.edges(key, width)
    assert [*found[:2], ..., *found[2 - len(edges) + 1 :]] == edges
    importance = {key: np.arange(width, 0.0, -1)}
    steps = leaving_order({key: width}, importance, units)
    assert [width - edge for edge in found[::-1]] == [0, *np.cumsum([step.dims for step in steps])]


def test_units_that_save_nothing_leave_with_the_next_one_that_does():
    """A device may take as long for 3 units as for 2: the third leaves together with the second."""
    seconds = [0.0, 1.0, 2.0, 2.0]
    units = Units({"0.attn": 1}, lambda _key, width: seconds[width])
    steps = leaving_order({"0.attn": 3}, {"0.attn": np.array([9.0, 2.0, 1.0])}, units)
    assert [(step.dims, step.density) for step in steps] == [(2, pytest.approx(3.0)), (1, pytest.approx(9.0))]


# ---------------------------------------------------------------------------------------------------------------------
# Importance


@torch.no_grad()
def plain_sensitivity(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> tuple[float, dict[str, float]]:
    """(C, (C_m - C) / C of each module that is not bypassed), with the output of the module set to zero by a hook."""
    cost = F.cross_entropy(model(images), targets).item()
    rises = {}
    for key, width in full_widths(model).items():
        if width:
            index, kind = key.split(".")
            part = getattr(model.blocks[int(index)], kind)
            hook = part.register_forward_hook(lambda _m, _i, output: torch.zeros_like(output))
            rises[key] = (F.cross_entropy(model(images), targets).item() - cost) / cost
            hook.remove()
    return cost, rises


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cut", [full_widths, some_widths], ids=["full width", "cut"])
def test_sensitivity_equals_the_plain_reference(variant, cut, data):
    model = random_backbone(variant)
    small = extract(model, cut(model))
    cost, rises = plain_sensitivity(small, *data)
    for size in (1, 3, 8):
        found = module_sensitivity(small, batches(*data, size))
        assert found.cost == pytest.approx(cost, rel=1e-10)
        assert list(found.gamma) == list(full_widths(model))
        for key, gamma in found.gamma.items():
            assert gamma == pytest.approx(max(0.0, rises.get(key, 0.0)), rel=1e-9, abs=1e-12)
        n = len(rises)
        assert found.branches_run == n + n * (n - 1) // 2


def test_sensitivity_equals_extraction_without_the_module(backbone, data):
    found = module_sensitivity(backbone, [data])
    full, clipped = full_widths(backbone), 0
    for key, gamma in found.gamma.items():
        without = extract(backbone, full | {key: 0})
        rise = (F.cross_entropy(without(data[0]), data[1]).item() - found.cost) / found.cost
        assert gamma == pytest.approx(max(0.0, rise), rel=1e-9, abs=1e-12)
        clipped += rise < 0
    assert 0 < clipped < len(full)  # both cases of the max occur


def test_sensitivity_reports_the_branches_that_it_runs(data):
    model = random_backbone("one_head")
    runs = 0

    def count(*_):
        nonlocal runs
        runs += 1

    for block in model.blocks:
        block.attn.register_forward_hook(count)
        block.mlp.register_forward_hook(count)
    found = module_sensitivity(model, [data])
    assert runs == found.branches_run == 6 + 5 + 4 + 3 + 2 + 1


def test_sensitivity_runs_in_eval_mode_and_restores_the_model(data):
    model = random_backbone(proj_drop_rate=0.5, drop_path_rate=0.5)
    expected = module_sensitivity(model, [data])
    assert module_sensitivity(model.train(), [data]) == expected
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_importance_does_not_use_autocast(data):
    model, data = random_backbone(dtype=torch.float32), (data[0].float(), data[1])
    expected = module_sensitivity(model, [data]), dimension_importance(model, [data])
    assert expected[0].cost == pytest.approx(module_sensitivity(model.double(), [random_data(8)]).cost, rel=1e-5)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert module_sensitivity(model, [data]) == expected[0]
        alpha = dimension_importance(model, [data])
    assert all(np.array_equal(alpha[key], expected[1][key]) for key in expected[1])


def test_sensitivity_is_finite_at_a_cross_entropy_of_0(backbone, data):
    with torch.no_grad():
        backbone.head.weight.zero_()
        backbone.head.bias.copy_(F.one_hot(torch.tensor(2), 7) * 1e4)
    found = module_sensitivity(backbone, [(data[0], torch.full((8,), 2))])
    assert found.cost == 0
    assert set(found.gamma.values()) == {0.0}


def plain_alpha(model: nn.Module, images: torch.Tensor, targets: torch.Tensor, cost: str) -> dict[str, np.ndarray]:
    """Mean over tokens of |g * x| of each dim; for attention the sum over q, k, v and the mean over heads."""
    totals: dict[str, np.ndarray] = {}
    for image, target in zip(images, targets, strict=True):
        for key, (x, g) in activations(model, image, target, cost).items():
            product = np.abs((x * g).numpy())
            if key.endswith("attn"):
                q, k, v = product.sum(axis=2) / product.shape[2]  # (H, w) each
                dims = np.mean(q + k + v, axis=0)
            else:
                dims = product.sum(axis=0) / product.shape[0]
            totals[key] = totals.get(key, 0) + dims / len(images)
    return {key: dims / dims.sum() for key, dims in totals.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cost", ["logit", "ce", "pred"])
@pytest.mark.parametrize("cut", [full_widths, some_widths], ids=["full width", "cut"])
def test_dimension_importance_equals_the_plain_reference(variant, cost, cut):
    model = random_backbone(variant)
    small, data = extract(model, cut(model)), random_data(3)
    expected = plain_alpha(small, *data, cost)
    for size in (1, 2, 3):
        alpha = dimension_importance(small, batches(*data, size), cost)
        assert alpha.keys() == expected.keys() == {key for key, width in full_widths(small).items() if width}
        for key, dims in alpha.items():
            assert dims.shape == (full_widths(small)[key],)
            assert dims.sum() == pytest.approx(1, rel=1e-12)
            np.testing.assert_allclose(dims, expected[key], rtol=1e-9, atol=1e-13)


def test_dims_without_any_gradient_get_equal_importance(backbone, data):
    nn.init.zeros_(backbone.head.weight)
    for key, dims in dimension_importance(backbone, [data]).items():
        np.testing.assert_array_equal(dims, np.full(full_widths(backbone)[key], 1 / full_widths(backbone)[key]))


def test_importance_of_an_empty_network(backbone, data):
    empty = extract(backbone, dict.fromkeys(full_widths(backbone), 0))
    found = module_sensitivity(empty, [data])
    assert found.cost == pytest.approx(F.cross_entropy(empty(data[0]), data[1]).item())
    assert (set(found.gamma.values()), found.branches_run) == ({0.0}, 0)
    assert importance_of_dims(empty, [data]) == {}


def test_importance_of_dims_is_the_product(backbone, data):
    small = extract(backbone, some_widths(backbone))
    gamma, alpha = module_sensitivity(small, [data]).gamma, dimension_importance(small, [data])
    found = importance_of_dims(small, [data])
    assert found.keys() == alpha.keys()
    for key, dims in found.items():
        np.testing.assert_allclose(dims, gamma[key] * alpha[key])
    assert any(dims.any() for dims in found.values())


def test_importance_of_two_processes_equals_that_of_one(two_ranks):
    alone = all_statistics(slice(0, 8))
    for rank in (entry["statistics"] for entry in two_ranks):
        assert rank["cost"] == pytest.approx(alone["cost"], rel=1e-10)
        assert rank["gamma"].keys() == alone["gamma"].keys()
        assert rank["alpha"].keys() == alone["alpha"].keys()
        for key, gamma in alone["gamma"].items():
            assert rank["gamma"][key] == pytest.approx(gamma, rel=1e-10, abs=1e-14)
        for key, dims in alone["alpha"].items():
            np.testing.assert_allclose(rank["alpha"][key], dims, rtol=1e-10)
    first, second = (entry["statistics"] for entry in two_ranks)
    assert first["gamma"] == second["gamma"]
    assert all(np.array_equal(first["alpha"][key], second["alpha"][key]) for key in first["alpha"])


# ---------------------------------------------------------------------------------------------------------------------
# The draw of op codes


def draws(count: int, op_codes: int = 5, **key: int) -> np.ndarray:
    where = {"seed": 0, "epoch": 0, "rank": 0} | key
    return np.array([draw_op_code(op_codes, step=step, **where) for step in range(count)])


@pytest.mark.parametrize("op_codes", [1, 2, 5, 37])
def test_op_codes_are_drawn_uniformly_with_both_ends(op_codes):
    counts = np.bincount(draws(100 * op_codes, op_codes), minlength=op_codes)
    assert len(counts) == op_codes
    assert counts.min() > 0
    assert op_codes == 1 or stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("law", ["log-macs", "inverse-macs"])
def test_op_codes_are_drawn_uniformly_on_a_scale_of_their_macs(law: str):
    """Each of evenly spaced values gets its share, the ends half of it."""
    macs = [16.0, 8, 4, 2] if law == "log-macs" else [1.0, 1 / 2, 1 / 3, 1 / 4]
    scale = [SCALES[law](value) for value in macs]
    drawn = [draw_by_scale(scale, seed=0, epoch=0, step=step, rank=0) for step in range(1200)]
    assert stats.chisquare(np.bincount(drawn), [200, 400, 400, 200]).pvalue > 1e-3
    assert draw_by_scale(scale[:1], seed=0, epoch=0, step=0, rank=0) == 0


@pytest.mark.parametrize("scale", [None, [6.0, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6]])
def test_several_sizes_per_step_are_drawn_each_from_its_own_part(scale: list[float] | None):
    """Numbered from small to large; together they are drawn by the same law as one size per step."""

    def draw(step: int, number: int) -> int:
        place = {"seed": 0, "epoch": 0, "step": step, "rank": 0, "number": number, "numbers": 3}
        return draw_op_code(6, **place) if scale is None else draw_by_scale(scale, **place)

    drawn = np.array([[draw(step, number) for number in range(3)] for step in range(400)])
    parts = [{4, 5}, {2, 3}, {0, 1}] if scale is None else [{3, 4, 5}, {2, 3}, {0, 1, 2}]
    assert [{*column} for column in drawn.T.tolist()] == parts
    shares = [1] * 6 if scale is None else [0.5, 1, 1, 1, 1, 0.5]
    expected = np.array(shares) / sum(shares) * drawn.size
    assert stats.chisquare(np.bincount(drawn.ravel()), expected).pvalue > 1e-3
    assert all((np.diff(row) <= 0).all() for row in drawn)
    assert draw_op_code(1, seed=0, epoch=0, step=0, rank=0, number=1, numbers=3) == 0  # fewer sizes than that


def test_ranks_draw_independently():
    first, second = draws(2000, rank=0), draws(2000, rank=1)
    pairs = np.histogram2d(first, second, bins=5)[0]
    assert stats.chi2_contingency(pairs).pvalue > 1e-3
    assert 0 < (first == second).sum() < 2000


def test_a_draw_depends_on_seed_epoch_step_and_rank_only():
    np.testing.assert_array_equal(draws(50), draws(50))
    for key in ({"seed": 1}, {"epoch": 1}, {"rank": 1}):
        assert (draws(50) != draws(50, **key)).sum() > 20
    assert type(draw_op_code(3, seed=0, epoch=0, step=0, rank=0)) is int
    # Swapping two of the numbers changes the draw.
    assert (draws(50, epoch=1) != draws(50, rank=1)).sum() > 20
