"""Widths and mask tables for the benchmarks, made from a model's own shapes."""

from __future__ import annotations

import numpy as np
from timm.models.vision_transformer import VisionTransformer

from models.backbone import full_widths, modules_of
from models.macs import count_macs, macs_per_dim
from piad.dropout_list import UNITS, grow, units_of
from piad.mask_table import MaskTable


def half_widths(model: VisionTransformer) -> dict[str, dict[str, int]]:
    """Two choices of widths with half of the MACs (linear convention), or just below it where units do not fit exactly.

    "uniform": half of every attention, and the same number of units in every MLP.
    "mixed": every third attention and every fourth MLP is bypassed; 3/4 of the other attentions, and the same number of
    units in every other MLP.
    """
    mixed = full_widths(model)
    for key, module in modules_of(model).items():
        if module.kind == "attn":
            mixed[key] = 0 if module.block % 3 == 1 else module.width * 3 // 4
        elif module.block % 4 == 2:
            mixed[key] = 0
    return {"uniform": uniform_widths(model, 0.5), "mixed": _fit_mlps(model, mixed, 0.5)}


def uniform_widths(model: VisionTransformer, share: float) -> dict[str, int]:
    """At most this share of the MACs: as much of every attention, and the same number of units in every MLP."""
    widths = full_widths(model)
    for key, module in modules_of(model).items():
        if module.kind == "attn":
            widths[key] = int(module.width * share)
    return _fit_mlps(model, widths, share)


def _fit_mlps(model: VisionTransformer, widths: dict[str, int], share: float) -> dict[str, int]:
    """Gives all MLPs that are not bypassed the same number of units: as many as the share of the MACs allows."""
    limit, full = share * count_macs(model), full_widths(model)
    for units in range(UNITS["mlp"], 0, -1):
        mlps = {key: full[key] * units // UNITS["mlp"] for key in widths if key.endswith(".mlp") and widths[key]}
        if count_macs(model, widths | mlps) <= limit:
            break
    return widths | mlps


def thinnest_widths(model: VisionTransformer) -> dict[str, int]:
    """Widths that keep one unit of every module."""
    return {key: module.width // UNITS[module.kind] for key, module in modules_of(model).items()}


def tables(model: VisionTransformer, op_codes: tuple[int, int], seed: int) -> tuple[MaskTable, MaskTable]:
    """Two mask tables from random importance, with op_codes[0] and op_codes[1] > op_codes[0] op codes.

    The rows of the smaller table are rows of the larger one. Importance per MAC is drawn from the same distribution for
    all modules and descends within each: so every unit leaves alone, which gives the longest possible list, and all
    modules shrink at about the same rate.
    """
    generator = np.random.default_rng(seed)
    full, units = full_widths(model), units_of(model)
    macs = {key: macs_per_dim(module) for key, module in modules_of(model).items()}
    importance = {key: macs[key] * np.sort(generator.random(width))[::-1] for key, width in full.items()}
    whole = grow(MaskTable([full]), importance, units, 0.875 * count_macs(model))
    few, more = op_codes
    longer = MaskTable(_evenly_spaced_rows(whole.rows, more))
    return MaskTable(_evenly_spaced_rows(longer.rows, few)), longer


def _evenly_spaced_rows(rows: list[dict[str, int]], count: int) -> list[dict[str, int]]:
    """At most `count` of the rows, evenly spaced, with the first and the last."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[place] for place in places]
