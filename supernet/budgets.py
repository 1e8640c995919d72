"""Which sizes the flags ask for: op codes, budgets, or sizes evenly spaced."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from files import shown
from utils import UserError, say

from .amounts import format_amount, format_seconds, format_sizes
from .latency import Latencies
from .latency_table import LatencyTable
from .network import Network

# The flags that limit a size, and the arguments of Network.select() that they set.
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


def latencies_of(args: argparse.Namespace, network: Network) -> Latencies | LatencyTable:
    """The latencies of the network's sizes: of --latency-table, or measured as the flags say.

    Those are kept beside --mask-table or the weights. Raises UserError for a table that no flag asks to be used.
    """
    if args.latency_table:
        if not (args.latency or args.throughput):
            raise UserError("--latency-table is for --latency or --throughput: give one of them, such as --latency 5ms")
        return LatencyTable(args.latency_table, network.table, network.macs)
    folder = (args.mask_table or network.source).parent
    return network.latencies(args.batch_size, args.amp, torch.device(args.device), folder, args.runtime)


def chosen_op_codes(
    args: argparse.Namespace, network: Network, latencies: Latencies | LatencyTable | None = None
) -> list[int]:
    """The op codes that the size flags ask for, in their order; without any, the whole network and the smallest.

    latencies: None, or latencies_of(), where the caller has them.
    For each budget, prints what was asked and found, and the next larger and smaller sizes.
    """
    last, codes = len(network.table) - 1, []
    for code in args.op_code:
        network.table.widths(code)  # raises UserError for an op code that the table does not have
        codes.append(code if code >= 0 else last)
    budgets = budgets_of(args)
    if latencies is None and (args.latency or args.throughput or args.latency_table):
        latencies = latencies_of(args, network)
    if args.latency or args.throughput:
        say_what_table_is_for(network, latencies)
    for budget in budgets:
        codes.append(select(network, budget, args.macs_convention, latencies))
    if args.frontier:
        codes += network.evenly_spaced(args.frontier, args.macs_convention)
    return list(dict.fromkeys(codes or [0, last]))


def say_what_table_is_for(network: Network, latencies: Latencies | LatencyTable) -> None:
    """Prints a line where the mask table was made for the time under other conditions than those of the latencies.

    Such a table can be used, since the latencies are measured; but another one may have better sizes.
    """
    made_for = network.table.meta.get("made_for")
    asked: dict[str, Any] = {"batch_size": latencies.batch_size}
    if isinstance(latencies, Latencies):
        asked |= {"device": latencies.key["device"], "dtype": latencies.key["dtype"], "runtime": latencies.runtime}
    odd = [
        f"{key.replace('_', ' ')} {shown(str(made_for[key]))}, not for {value}"
        for key, value in asked.items()
        if isinstance(made_for, dict) and made_for.get(key, value) != value
    ]
    if odd:
        say(
            f"the mask table was made for {', and for '.join(odd)}: python -m supernet.profile and "
            "python -m supernet.retable make one for it"
        )


def budgets_of(args: argparse.Namespace) -> list[dict[str, float]]:
    """The budgets that the flags set, flag -> limit: one per value of a single flag, or one of several flags together.

    Raises UserError for several flags of which one has several values, and for a share outside 0..1.
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
    network: Network, budget: dict[str, float], convention: str, latencies: Latencies | LatencyTable | None
) -> int:
    """The op code of the largest size within a budget; prints what was asked and found, and the sizes beside it."""
    limits: dict[str, float] = {}
    for name, value in budget.items():
        limit = value * network.macs(0, convention) if name == "macs_ratio" else value
        limits[BUDGETS[name]] = min(limit, limits.get(BUDGETS[name], limit))
    found = network.select(**limits, convention=convention, latencies=latencies)
    timed = "latency" in budget or "throughput" in budget
    asked = {
        "max_macs": lambda value: f"at most {format_amount(value)} MACs ({convention})",
        "max_params": lambda value: f"at most {format_amount(value)} parameters",
        "max_memory": lambda value: f"at most {format_amount(value, 'B')} of weights",
        "max_latency": lambda value: f"at most {format_seconds(value)}",
        "min_throughput": lambda value: f"at least {format_amount(value)} images/s",
    }
    where = f", for {latencies.where}" if timed else ""
    say(f"requested: {' and '.join(asked[name](value) for name, value in limits.items())}{where}")
    for name, code in (("found", found), ("next larger", found - 1), ("next smaller", found + 1)):
        if 0 <= code < len(network.table):
            sizes: dict[str, float] = network.sizes(code, convention)
            sizes |= {"latency": latencies.of(code)} if timed else {}
            say(f"  {name}: op code {code}, {format_sizes(sizes)}")
        else:
            say(f"  {name}: none (op code {found} is the {'whole network' if code < 0 else 'smallest'})")
    return found
