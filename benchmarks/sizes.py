"""Widths and mask tables to measure at, made from a model's own shapes."""

from __future__ import annotations

import numpy as np
from timm.models.vision_transformer import VisionTransformer

from models.backbone import full_widths, modules_of
from models.macs import count_macs, fixed_macs, macs_per_dim
from piad.dropout_list import UNITS, grow, unit_sizes
from piad.mask_table import MaskTable


def half_widths(model: VisionTransformer) -> dict[str, dict[str, int]]:
    """Widths of half the MACs (linear convention), or as little under it as whole units allow, in two ways.

    uniform: half of every attention, and the same number of units of every MLP.  mixed: every third attention and
    every fourth MLP bypassed, 3/4 of the other attentions, and the same number of units of the other MLPs.
    """
    uniform, mixed = full_widths(model), full_widths(model)
    for key, module in modules_of(model).items():
        if module.kind == "attn":
            uniform[key] = module.width // 2
            mixed[key] = 0 if module.block % 3 == 1 else module.width * 3 // 4
        elif module.block % 4 == 2:
            mixed[key] = 0
    return {"uniform": _fit_mlps(model, uniform, 0.5), "mixed": _fit_mlps(model, mixed, 0.5)}


def _fit_mlps(model: VisionTransformer, widths: dict[str, int], share: float) -> dict[str, int]:
    """The widths with the most units, the same number in every MLP that runs, at which MACs are within the share."""
    limit, full = share * count_macs(model), full_widths(model)
    for units in range(UNITS["mlp"], 0, -1):
        mlps = {key: full[key] * units // UNITS["mlp"] for key in widths if key.endswith(".mlp") and widths[key]}
        if count_macs(model, widths | mlps) <= limit:
            break
    return widths | mlps


def thinnest_widths(model: VisionTransformer) -> dict[str, int]:
    """One unit of every module."""
    return {key: module.width // UNITS[module.kind] for key, module in modules_of(model).items()}


def tables(model: VisionTransformer, op_codes: tuple[int, int], seed: int) -> tuple[MaskTable, MaskTable]:
    """Two mask tables of so many op codes (fewer, more), from random importance; the first has rows of the second.

    Importance per MAC descends in each module, and is drawn alike for all: every unit leaves on its own, so that the
    list is as long as it can be, and all modules shrink side by side.
    """
    generator = np.random.default_rng(seed)
    modules = modules_of(model)
    macs = {key: macs_per_dim(module) for key, module in modules.items()}
    fixed = {key: fixed_macs(module) for key, module in modules.items()}
    importance = {key: macs[key] * np.sort(generator.random(module.width))[::-1] for key, module in modules.items()}
    whole = grow(
        MaskTable([full_widths(model)]), importance, unit_sizes(modules), macs, 0.875 * count_macs(model), fixed
    )
    few, more = op_codes
    longer = MaskTable(_evenly(whole.rows, more))
    return MaskTable(_evenly(longer.rows, few)), longer


def _evenly(rows: list[dict[str, int]], count: int) -> list[dict[str, int]]:
    """At most `count` of the rows, the first and the last among them."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[place] for place in places]
