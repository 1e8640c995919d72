"""The dropout list: in which order units leave the network, grown a little at the start of each epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.backbone import Module
from utils import UserError

from .mask_table import MaskTable

# How many units a module has: d/8 dims per head each for an attention, M/32 hidden units each for an MLP. Where a width
# does not divide so (4304 hidden units), as many fewer as divide it, down to half.
UNITS = {"attn": 8, "mlp": 32}


@dataclass(frozen=True)
class Step:
    """Units of one module that leave together: `dims` of its width and their MACs, at `density` importance per MAC."""

    key: str
    dims: int
    density: float
    macs: int


def unit_sizes(modules: dict[str, Module]) -> dict[str, int]:
    """Dims in a unit, for each module. Raises UserError where a width does not divide into its units."""
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
    """Orders one module's units for leaving: [(number of units, density), ...] from tail to head.

    importance: (units,), head to tail; macs: MACs of one unit, or of each (units,). A unit cannot leave before those
    behind it, so densities (importance per MAC) must not fall from tail to head: neighbours that break this are pooled
    and leave as one (pool-adjacent-violators, weighted by MACs).
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


def leaving_order(
    widths: dict[str, int],
    importance: dict[str, np.ndarray],
    sizes: dict[str, int],
    macs: dict[str, int],
    fixed: dict[str, int] | None = None,
) -> list[Step]:
    """Every step that could follow, least dense first, from the network at `widths`.

    importance: module key -> I_i of its kept dims (width,), in order.  sizes: dims in a unit.  macs: MACs of one dim.
    fixed: MACs that leave with a module's last unit (models.macs.fixed_macs).
    Equal densities keep the modules' order, and each module's own order is tail to head.
    """
    steps = []
    for key, width in widths.items():
        if width == 0:
            continue
        size, rest = sizes[key], (fixed or {}).get(key, 0)
        units = np.asarray(importance[key], dtype=np.float64).reshape(width // size, size).sum(axis=1)  # (units,)
        costs = np.full(len(units), size * macs[key])
        costs[0] += rest
        for count, density in pool_units(units, costs):
            width -= count * size
            steps.append(Step(key, count * size, density, count * size * macs[key] + (rest if width == 0 else 0)))
    return sorted(steps, key=lambda step: step.density)


def grow(
    table: MaskTable,
    importance: dict[str, np.ndarray],
    sizes: dict[str, int],
    macs: dict[str, int],
    target: float,
    fixed: dict[str, int] | None = None,
) -> MaskTable:
    """The table with steps appended until the MACs of all that has left reach `target`; one op code a step.

    What has left stays out: the rows of `table` are kept as they are. importance is that of the smallest network so
    far (see leaving_order).
    """
    rows = list(table.rows)
    gone = sum((rows[0][key] - width) * macs[key] for key, width in rows[-1].items())
    gone += sum(rest for key, rest in (fixed or {}).items() if rows[-1][key] == 0 < rows[0][key])
    for step in leaving_order(rows[-1], importance, sizes, macs, fixed):
        if gone >= target:
            break
        rows.append(rows[-1] | {step.key: rows[-1][step.key] - step.dims})
        gone += step.macs
    return MaskTable(rows, table.meta)
