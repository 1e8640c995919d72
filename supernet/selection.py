"""Choosing op codes of a mask table by size: amounts as they are typed and shown, counted sizes, budgets."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from models.backbone import Backbone
from models.macs import count_macs, count_params
from utils import UserError

from .latency import Latencies

if TYPE_CHECKING:
    from piad.mask_table import MaskTable

UNITS = {
    "amount": {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9},
    "bytes": {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30},
    "seconds": {"S": 1.0, "MS": 1e-3, "US": 1e-6},
}


def parse_amount(text: str, kind: str = "amount") -> float:
    """ "2.4G" -> 2.4e9; of kind bytes "40MB" -> 4e7 ("MiB" is 2**20), of kind seconds "5ms" -> 5e-3.

    Raises ValueError for anything else, a unit that is left out among it.
    """
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(number) :].strip().upper()
    if unit not in UNITS[kind]:
        raise ValueError(f"{text} has not one of the units {', '.join(UNITS[kind])}")
    value = float(number) * UNITS[kind][unit]
    if not 0 < value < float("inf"):
        raise ValueError(f"{text} is not a positive amount")
    return value


def format_amount(value: float, unit: str = "") -> str:
    """2.4e9 -> "2.4G", three digits; with a unit, such as B, "2.4 GB"."""
    space = " " if unit else ""
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= factor * (1 - 5e-4):  # what would round to 1,000 of the next prefix down
            return f"{value / factor:.3g}{space}{prefix}{unit}"
    return f"{value:.3g}{space}{unit}"


def format_seconds(value: float) -> str:
    """5e-3 -> "5 ms", three digits."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def count_sizes(model: Backbone, widths: dict[str, int] | None = None, convention: str = "linear") -> dict[str, int]:
    """macs (one image), params and memory (bytes of the weights, in the model's type) of a sub-network of `model`."""
    params = count_params(model, widths)
    item = next(model.parameters()).element_size()
    return {"macs": count_macs(model, widths, convention), "params": params, "memory": params * item}


def format_sizes(sizes: dict[str, float]) -> str:
    """What count_sizes() gives, and the latency in seconds where there is one, as words."""
    words = [f"{format_amount(sizes['macs'])} MACs", f"{format_amount(sizes['params'])} parameters"]
    words.append(format_amount(sizes["memory"], "B"))
    return ", ".join(words + ([format_seconds(sizes["latency"])] if "latency" in sizes else []))


def largest_within(
    model: Backbone,
    table: MaskTable,
    limits: dict[str, float],
    convention: str = "linear",
    latencies: Latencies | None = None,
) -> int:
    """The largest op code that meets all limits: macs, params, memory and latency, see MaskTable.select().

    What is counted never grows with the op code, so bisection finds the largest size exactly. Latency is measured on
    about log2(op codes) sizes, also by bisection, but falls with the op code only on the whole: what is given is the
    largest of the sizes that were measured, none of whose next size up meets the limit; a larger one may.
    """
    counted = {key: limit for key, limit in limits.items() if key != "latency"}

    def within(widths: dict[str, int]) -> bool:
        sizes = count_sizes(model, widths, convention)
        return all(sizes[key] <= limit for key, limit in counted.items())

    first = bisect.bisect_left(table.rows, True, key=within)
    if first == len(table):
        raise UserError(_too_small(model, table, counted, convention))
    if "latency" not in limits:
        return first
    bisect.bisect_left(range(len(table)), True, lo=first, key=lambda code: latencies.of(code) <= limits["latency"])
    measured = {code: seconds for code, seconds in latencies.seconds.items() if code >= first}
    fast_enough = [code for code, seconds in measured.items() if seconds <= limits["latency"]]
    if not fast_enough:
        fastest = min(measured, key=measured.get)
        raise UserError(
            f"no sub-network takes at most {_time(limits['latency'], latencies)} for {latencies.where}: the fastest, "
            f"op code {fastest}, takes {_time(measured[fastest], latencies)}"
        )
    found = min(fast_enough)
    while found > first and latencies.of(found - 1) <= limits["latency"]:
        found -= 1
    return found


def _time(seconds: float, latencies: Latencies) -> str:
    return f"{format_seconds(seconds)} ({format_amount(latencies.batch_size / seconds)} images/s)"


def _too_small(model: Backbone, table: MaskTable, limits: dict[str, float], convention: str) -> str:
    names = {"macs": ("", " MACs"), "params": ("", " parameters"), "memory": ("B", " of weights")}
    asked = [format_amount(limit, names[key][0]) + names[key][1] for key, limit in limits.items()]
    smallest = count_sizes(model, table.widths(-1), convention)
    has = [f"{format_amount(smallest['macs'])} MACs ({convention})", f"{format_amount(smallest['params'])} parameters"]
    has += [f"{format_amount(smallest['memory'], 'B')} of weights"] if "memory" in limits else []
    return (
        f"no sub-network has at most {' and '.join(asked)}: the smallest, op code {len(table) - 1}, "
        f"has {' and '.join(has)}"
    )


def evenly_spaced(model: Backbone, table: MaskTable, count: int, convention: str = "linear") -> list[int]:
    """At most `count` op codes, from 0 to the smallest, whose MACs lie as evenly as the table allows."""
    macs = [count_macs(model, row, convention) for row in table.rows]
    step = (macs[0] - macs[-1]) / max(count - 1, 1)
    wanted = [macs[0] - step * i for i in range(count)]
    return sorted({min(range(len(macs)), key=lambda code: (abs(macs[code] - w), code)) for w in wanted})
