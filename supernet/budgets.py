"""Which sizes the flags ask for: op codes, budgets, or sizes evenly spaced."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from models.backbone import Backbone
from models.macs import count_macs
from piad.mask_table import MaskTable
from supernet.latency import LATENCY, Latencies
from supernet.selection import count_sizes, evenly_spaced, format_amount, format_seconds, format_sizes
from utils import UserError, say

# The flags that limit a size, and the limits of MaskTable.select() that they set.
BUDGETS = {
    "macs_ratio": "max_macs",
    "macs": "max_macs",
    "params": "max_params",
    "memory": "max_memory",
    "latency": "max_latency",
    "throughput": "min_throughput",
}


def asks_for_size(args: argparse.Namespace) -> bool:
    """Whether a flag names an op code or a budget."""
    return any(getattr(args, name) for name in ("op_code", *BUDGETS))


def latencies_of(args: argparse.Namespace, model: Backbone, table: MaskTable, weights: Path) -> Latencies:
    """The latencies of the sizes as the flags have them measured, kept beside the file of the weights or the table."""
    return Latencies(
        model,
        table,
        batch_size=args.batch_size,
        amp=getattr(torch, args.amp) if args.amp else None,
        device=torch.device(args.device),
        path=weights.parent / LATENCY,
    )


def chosen_op_codes(
    args: argparse.Namespace, model: Backbone, table: MaskTable, latencies: Latencies | None = None
) -> list[int]:
    """The op codes that the size flags ask for, in their order; none given: the whole network and the smallest.

    latencies: None, or latencies_of(), where the caller has them.
    For each budget, says what was asked and found, and the next sizes up and down.
    """
    codes = []
    for code in args.op_code:
        table.widths(code)  # a UserError where there is none
        codes.append(code if code >= 0 else len(table) - 1)
    budgets = budgets_of(args)
    if latencies is None and (args.latency or args.throughput):
        latencies = latencies_of(args, model, table, args.mask_table or args.checkpoint)
    for budget in budgets:
        codes.append(select(model, table, budget, args.macs_convention, latencies))
    if args.frontier:
        codes += evenly_spaced(model, table, args.frontier, args.macs_convention)
    return list(dict.fromkeys(codes)) or [0, len(table) - 1]


def budgets_of(args: argparse.Namespace) -> list[dict[str, float]]:
    """The budgets that the flags set, flag -> limit: one for each value of a single flag, or one of several flags.

    Raises UserError for several flags of which one has several values, and for a share that is none.
    """
    given = {name: getattr(args, name) for name in BUDGETS if getattr(args, name)}
    for ratio in given.get("macs_ratio", []):
        if not 0 < ratio <= 1:
            raise UserError(f"--macs-ratio {ratio} is not a share of the network: give a number above 0, at most 1")
    if len(given) < 2:
        return [{name: value} for name, values in given.items() for value in values]
    for name, values in given.items():
        if len(values) > 1:
            flag, other = (f"--{key.replace('_', '-')}" for key in (name, next(key for key in given if key != name)))
            raise UserError(
                f"{flag} has {len(values)} values beside {other}: several budgets ask for one size that meets them "
                f"all; give {flag} one value, or leave {other} out"
            )
    return [{name: values[0] for name, values in given.items()}]


def select(
    model: Backbone,
    table: MaskTable,
    budget: dict[str, float],
    convention: str,
    latencies: Latencies | None,
) -> int:
    """The op code of the largest size within a budget; says what was asked, what was found, and what lies beside it."""
    limits: dict[str, float] = {}
    for name, value in budget.items():
        limit = value * count_macs(model, convention=convention) if name == "macs_ratio" else value
        limits[BUDGETS[name]] = min(limit, limits.get(BUDGETS[name], limit))
    found = table.select(model, **limits, convention=convention, latencies=latencies)
    timed = "latency" in budget or "throughput" in budget
    asked = {
        "max_macs": lambda value: f"at most {format_amount(value)} MACs ({convention})",
        "max_params": lambda value: f"at most {format_amount(value)} parameters",
        "max_memory": lambda value: f"at most {format_amount(value, 'B')} of weights",
        "max_latency": lambda value: f"at most {format_seconds(value)}",
        "min_throughput": lambda value: f"at least {format_amount(value)} images/s",
    }
    where = f", for {latencies.where}" if timed else ""
    say(f"asked: {' and '.join(asked[name](value) for name, value in limits.items())}{where}")
    for name, code in (("found", found), ("next up", found - 1), ("next down", found + 1)):
        if 0 <= code < len(table):
            sizes: dict[str, float] = count_sizes(model, table.widths(code), convention)
            sizes |= {"latency": latencies.of(code)} if timed else {}
            say(f"  {name}: op code {code}, {format_sizes(sizes)}")
        else:
            say(f"  {name}: none, op code {found} is the {'whole network' if code < 0 else 'smallest'}")
    return found
