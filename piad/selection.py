"""Choosing op codes of a mask table by size."""

from __future__ import annotations

import bisect

from models.backbone import Backbone
from models.macs import count_macs, count_params
from utils import UserError

from .mask_table import MaskTable

FACTORS = {"K": 1e3, "M": 1e6, "G": 1e9}


def parse_amount(text: str) -> float:
    """ "2.4G" -> 2.4e9; K, M and G are 1e3, 1e6, 1e9. Raises ValueError for anything else."""
    number, unit = (text[:-1], FACTORS[text[-1].upper()]) if text and text[-1].upper() in FACTORS else (text, 1.0)
    value = float(number) * unit
    if not 0 < value < float("inf"):
        raise ValueError(f"{text} is not a positive amount")
    return value


def format_amount(value: float) -> str:
    """2.4e9 -> "2.4G", three digits."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def largest_within(
    model: Backbone,
    table: MaskTable,
    *,
    max_macs: float | None = None,
    max_params: float | None = None,
    convention: str = "linear",
) -> int:
    """The op code of the largest sub-network within the limits, for one image of the super-network `model`.

    Raises UserError that names the smallest sub-network where even it is too large.
    """

    def within(widths: dict[str, int]) -> bool:
        macs_fit = max_macs is None or count_macs(model, widths, convention) <= max_macs
        return macs_fit and (max_params is None or count_params(model, widths) <= max_params)

    # No width grows with the op code, so neither does the size: those that fit are the last ones.
    op_code = bisect.bisect_left(table.rows, True, key=within)
    if op_code == len(table):
        smallest = table.widths(-1)
        macs, params = count_macs(model, smallest, convention), count_params(model, smallest)
        asked = [f"{format_amount(max_macs)} MACs"] if max_macs else []
        asked += [f"{format_amount(max_params)} parameters"] if max_params else []
        raise UserError(
            f"no sub-network has at most {' and '.join(asked)}: the smallest, op code {len(table) - 1}, "
            f"has {format_amount(macs)} MACs ({convention}) and {format_amount(params)} parameters"
        )
    return op_code


def evenly_spaced(model: Backbone, table: MaskTable, count: int) -> list[int]:
    """At most `count` op codes, from 0 to the smallest, whose MACs lie as evenly as the table allows."""
    macs = [count_macs(model, row) for row in table.rows]
    step = (macs[0] - macs[-1]) / max(count - 1, 1)
    wanted = [macs[0] - step * i for i in range(count)]
    return sorted({min(range(len(macs)), key=lambda code: (abs(macs[code] - w), code)) for w in wanted})
