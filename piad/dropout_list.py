"""The dropout list: the order in which units leave the network. PIAD extends it at the start of each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from models.backbone import Backbone, Module, modules_of
from models.macs import module_macs

from .mask_table import MaskTable

# Number of units per module: d/8 dims per head each for attention, M/32 hidden units each for an MLP. A network with a
# width that this does not divide, such as 4304 hidden units, has units of a rounded size, the last one shorter.
UNITS = {"attn": 8, "mlp": 32}
MULTIPLE = 8  # of the dims of a rounded unit: kernels work on 8 numbers or more at once
FLOOR = 1e-9  # of the cost of all modules: the least cost of a unit, so that its density is finite


@dataclass(frozen=True)
class Units:
    """Size and cost of the units of every module of a network.

    sizes: module key -> dims per unit. The last unit of a module is shorter where its width is not a multiple.
    cost: (module key, width) -> the cost of the module at the width, in MACs or in seconds: 0 at width 0, and it does
    not fall with the width. What a module costs at any width above 0 leaves together with its last unit.
    """

    sizes: dict[str, int]
    cost: Callable[[str, int], float]

    def edges(self, key: str, width: int) -> list[int]:
        """The widths at which a module can be cut from `width` down, ascending, with 0 and `width`."""
        return [*range(0, width, self.sizes[key]), width]

    def total(self, widths: dict[str, int]) -> float:
        """The cost of all modules at the widths."""
        return sum(self.cost(key, width) for key, width in widths.items())


@dataclass(frozen=True)
class Step:
    """Units of one module that leave together: `dims` of its width, at `density` = importance per cost."""

    key: str
    dims: int
    density: float


def units_of(model: Backbone) -> Units:
    """The units of a model, of the sizes of unit_sizes(); they cost their MACs in the linear convention."""
    modules = modules_of(model)
    return Units(unit_sizes(modules), lambda key, width: module_macs(modules[key], width))


def unit_sizes(modules: dict[str, Module]) -> dict[str, int]:
    """Dims per unit of each module of a network: as in UNITS where they divide all of its widths, else rounded ones.

    The published tables have the former, so that a network for which there are any always has them.
    """
    if any(module.width % UNITS[module.kind] for module in modules.values()):
        return rounded_unit_sizes(modules)
    return {key: module.width // UNITS[module.kind] for key, module in modules.items()}


def rounded_unit_sizes(modules: dict[str, Module]) -> dict[str, int]:
    """Dims per unit of each module as in UNITS, but the nearest multiple of 8 wherever that is not 0.

    The last unit is shorter where they do not divide the width: 4,304 hidden units are 31 units of 136 and one of 88.
    """
    sizes = {}
    for key, module in modules.items():
        usual = module.width / UNITS[module.kind]
        sizes[key] = round(usual / MULTIPLE) * MULTIPLE or math.ceil(usual)
    return sizes


def pool_units(importance: np.ndarray, costs: float | np.ndarray) -> list[tuple[int, float]]:
    """Orders the units of one module: returns [(number of units, density), ...] from tail to head.

    A unit cannot leave before the units behind it. Therefore densities (importance per cost) must not fall from tail to
    head: neighbours that violate this are pooled and leave together (pool-adjacent-violators, weighted by cost).

    Args:
        importance: Importance of each unit (units,), from head to tail.
        costs: Cost per unit, above 0: either one number or (units,).
    """
    importance = np.asarray(importance, dtype=np.float64)
    costs = np.broadcast_to(np.asarray(costs, dtype=np.float64), importance.shape)
    pools: list[tuple[int, float, float]] = []  # (units, mean density, cost)
    for density, cost in zip((importance / costs)[::-1], costs[::-1], strict=True):
        count, mean = 1, float(density)
        while pools and pools[-1][1] > mean:
            other, other_mean, other_cost = pools.pop()
            mean = (mean * cost + other_mean * other_cost) / (cost + other_cost)
            count, cost = count + other, cost + other_cost
        pools.append((count, mean, cost))
    return [(count, mean) for count, mean, _ in pools]


def leaving_order(widths: dict[str, int], importance: dict[str, np.ndarray], units: Units) -> list[Step]:
    """All steps from the network at `widths` down to width 0 everywhere, least dense first.

    Steps of one module are ordered from tail to head. Steps of equal density keep the order of the modules.

    Args:
        widths: Module key -> current width.
        importance: Module key -> importance I_i of its kept dims (width,), head to tail; none is needed at width 0.
        units: Size and cost of the units. A unit that costs nothing, because the module takes as long without it,
            counts as FLOOR of the cost of all modules.
    """
    steps, floor = [], FLOOR * units.total(widths)
    for key, width in widths.items():
        if width == 0:
            continue
        edges = units.edges(key, width)
        costs = np.diff([units.cost(key, edge) for edge in edges])  # (units,)
        end = len(edges) - 1
        for count, density in pool_units(unit_totals(importance[key], units.sizes[key]), np.maximum(costs, floor)):
            steps.append(Step(key, edges[end] - edges[end - count], density))
            end -= count
    return sorted(steps, key=lambda step: step.density)


def unit_totals(importance: np.ndarray, size: int) -> np.ndarray:
    """The sum over the dims of each unit (units,); importance: of the dims (width,)."""
    importance = np.asarray(importance, dtype=np.float64)
    whole = len(importance) // size * size
    totals = importance[:whole].reshape(-1, size).sum(axis=1)
    return np.append(totals, importance[whole:].sum()) if whole < len(importance) else totals


def grow(table: MaskTable, importance: dict[str, np.ndarray], units: Units, target: float) -> MaskTable:
    """Returns the table with rows appended until the cost removed from the whole network reaches `target`.

    Each step of leaving_order() adds one op code. The existing rows are kept as they are, so units that have left do
    not come back. If the units run out before the target is reached, the table ends with an empty network.

    Args:
        table: The table so far; it is not modified.
        importance: Module key -> importance I_i of its dims (width,) in the smallest network of the table.
        units: Size and cost of the units, see units_of().
        target: Cost to remove, counted from row 0.
    """
    rows = list(table.rows)
    removed = units.total(rows[0]) - units.total(rows[-1])
    for step in leaving_order(rows[-1], importance, units):
        if removed >= target:
            break
        width = rows[-1][step.key]
        rows.append(rows[-1] | {step.key: width - step.dims})
        removed += units.cost(step.key, width) - units.cost(step.key, width - step.dims)
    return MaskTable(rows, table.meta)
