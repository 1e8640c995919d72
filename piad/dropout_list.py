"""The dropout list: the order in which units leave the network. PIAD extends it at the start of each epoch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from models.backbone import Backbone, Module, modules_of
from models.macs import fixed_macs, macs_per_dim
from utils import UserError

from .mask_table import MaskTable

# Number of units per module: d/8 dims per head each for attention, M/32 hidden units each for an MLP. A width that this
# does not divide (4304 hidden units) gets the next smaller number that divides it, but at least half as many units.
UNITS = {"attn": 8, "mlp": 32}


@dataclass(frozen=True)
class Units:
    """Size and cost of the units of every module of a network. Each field maps a module key to a number.

    sizes: dims per unit.
    macs_per_dim: MACs per dim.
    fixed_macs: MACs that the module has at any width above 0; they leave together with its last unit.
    """

    sizes: dict[str, int]
    macs_per_dim: dict[str, int]
    fixed_macs: dict[str, int] = field(default_factory=dict)

    def macs(self, key: str, width: int) -> int:
        """MACs of a module at a width."""
        return width * self.macs_per_dim[key] + self.fixed_macs.get(key, 0) if width else 0


@dataclass(frozen=True)
class Step:
    """Units of one module that leave together: `dims` of its width, at `density` = importance per MAC."""

    key: str
    dims: int
    density: float


def units_of(model: Backbone) -> Units:
    """The units of a model, with MACs in the linear convention.

    Raises UserError if a module cannot be divided into equal units, see unit_sizes().
    """
    modules = modules_of(model)
    return Units(
        unit_sizes(modules),
        {key: macs_per_dim(module) for key, module in modules.items()},
        {key: fixed_macs(module) for key, module in modules.items()},
    )


def unit_sizes(modules: dict[str, Module]) -> dict[str, int]:
    """Dims per unit of each module. Raises UserError if a width cannot be divided into equal units."""
    sizes = {}
    for key, module in modules.items():
        most = UNITS[module.kind]
        fewest = -(-most // 2)
        units = next((n for n in range(most, fewest - 1, -1) if module.width % n == 0), None)
        if units is None:
            name = "head_dim" if module.kind == "attn" else "hidden size"
            raise UserError(f"{key}: {name} {module.width} does not divide into {fewest} to {most} equal units")
        sizes[key] = module.width // units
    return sizes


def pool_units(importance: np.ndarray, macs: int | np.ndarray) -> list[tuple[int, float]]:
    """Orders the units of one module: returns [(number of units, density), ...] from tail to head.

    A unit cannot leave before the units behind it. Therefore densities (importance per MAC) must not fall from tail to
    head: neighbours that violate this are pooled and leave together (pool-adjacent-violators, weighted by MACs).

    Args:
        importance: Importance of each unit (units,), from head to tail.
        macs: MACs per unit, either one number or (units,).
    """
    importance = np.asarray(importance, dtype=np.float64)
    costs = np.broadcast_to(np.asarray(macs, dtype=np.float64), importance.shape)
    pools: list[tuple[int, float, float]] = []  # (units, mean density, MACs)
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
        units: Size and MACs of the units.
    """
    steps = []
    for key, width in widths.items():
        if width == 0:
            continue
        size = units.sizes[key]
        totals = np.asarray(importance[key], dtype=np.float64).reshape(width // size, size).sum(axis=1)  # (units,)
        costs = np.diff([units.macs(key, w) for w in range(0, width + 1, size)])  # (units,)
        steps += [Step(key, count * size, density) for count, density in pool_units(totals, costs)]
    return sorted(steps, key=lambda step: step.density)


def grow(table: MaskTable, importance: dict[str, np.ndarray], units: Units, target_macs: float) -> MaskTable:
    """Returns the table with rows appended until the MACs removed from the whole network reach `target_macs`.

    Each step of leaving_order() adds one op code. The existing rows are kept as they are, so units that have left do
    not come back. If the units run out before the target is reached, the table ends with an empty network.

    Args:
        table: The table so far; it is not modified.
        importance: Module key -> importance I_i of its dims (width,) in the smallest network of the table.
        units: Size and MACs of the units, see units_of().
        target_macs: MACs to remove, counted from row 0.
    """
    rows = list(table.rows)
    removed = sum(units.macs(key, rows[0][key]) - units.macs(key, width) for key, width in rows[-1].items())
    for step in leaving_order(rows[-1], importance, units):
        if removed >= target_macs:
            break
        width = rows[-1][step.key]
        rows.append(rows[-1] | {step.key: width - step.dims})
        removed += units.macs(step.key, width) - units.macs(step.key, width - step.dims)
    return MaskTable(rows, table.meta)
