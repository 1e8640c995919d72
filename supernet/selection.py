"""Choosing op codes of a mask table by size."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from models.backbone import Backbone
from models.macs import count_macs, count_params
from piad.mask_table import MaskTable
from utils import UserError, say

from .amounts import format_amount, format_seconds
from .latency import Latencies
from .latency_table import LatencyTable


def count_sizes(model: Backbone, widths: dict[str, int] | None = None, convention: str = "linear") -> dict[str, int]:
    """macs (per image), params and memory (bytes of the weights, in the model's dtype) of a sub-network of `model`."""
    params = count_params(model, widths)
    item = next(model.parameters()).element_size()
    return {"macs": count_macs(model, widths, convention), "params": params, "memory": params * item}


def largest_within(
    model: Backbone,
    table: MaskTable,
    limits: dict[str, float],
    convention: str = "linear",
    latencies: Latencies | LatencyTable | None = None,
    fidelity: Sequence[float] = (),
) -> int:
    """The op code of the largest sub-network that meets all limits: macs, params, memory (bytes), latency (seconds).

    MACs, parameters and memory never grow with the op code, so bisection finds the largest size exactly. Latency is
    measured on about log2(op codes) sizes, also by bisection, but does not fall with every op code: the answer is the
    largest of the measured sizes that is fast enough and whose next larger size is too slow. Where a smaller size has a
    better fidelity and is fast enough, too, it is that one. fidelity: of every op code, more is better, if it is known.
    Raises UserError where no size meets the limits, naming the smallest or the fastest one.
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
    better = sorted(range(found, len(table)), key=lambda code: (-fidelity[code], code)) if fidelity else [found]
    chosen = next(code for code in better if latencies.of(code) <= limits["latency"])
    if chosen != found:
        say(
            f"op code {chosen} is chosen, not the larger op code {found}: its fidelity is better, as the report beside "
            "the weights says"
        )
    return chosen


def _time(seconds: float, latencies: Latencies | LatencyTable) -> str:
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
    """At most `count` op codes, from 0 to the smallest network, whose MACs lie as evenly as the table allows."""
    macs = [count_macs(model, row, convention) for row in table.rows]
    step = (macs[0] - macs[-1]) / max(count - 1, 1)
    wanted = [macs[0] - step * i for i in range(count)]
    return sorted({min(range(len(macs)), key=lambda code: (abs(macs[code] - w), code)) for w in wanted})
