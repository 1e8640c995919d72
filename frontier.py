"""Evaluating sub-networks of several sizes: which ones, how good they are, and the report."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from engine import evaluate
from files import write_text
from models.backbone import Backbone
from models.extraction import extract
from models.macs import count_macs, count_params
from piad.latency import LATENCY, Latencies
from piad.mask_table import MaskTable
from piad.selection import count_sizes, evenly_spaced, format_amount, format_seconds, format_sizes
from utils import UserError, is_main_process, progress_bar, say

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


def chosen_op_codes(args: argparse.Namespace, model: Backbone, table: MaskTable) -> list[int]:
    """The op codes that the size flags ask for, in their order; none given: the whole network and the smallest.

    For each budget, says what was asked and found, and the next sizes up and down.
    """
    codes = []
    for code in args.op_code:
        table.widths(code)  # a UserError where there is none
        codes.append(code if code >= 0 else len(table) - 1)
    budgets = budgets_of(args)
    latencies = None
    if args.latency or args.throughput:
        beside = args.mask_table or Path(args.checkpoint)
        latencies = Latencies(
            model,
            table,
            batch_size=args.batch_size,
            amp=getattr(torch, args.amp) if args.amp else None,
            device=torch.device(args.device),
            path=beside.parent / LATENCY,
        )
    for budget in budgets:
        codes.append(select(model, table, budget, args.macs_convention, latencies))
    if args.frontier:
        codes += evenly_spaced(model, table, args.frontier)
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


def describe(model: Backbone) -> dict[str, int]:
    """The size of a model as it stands: macs_linear and macs_full for one image, params."""
    return {
        "macs_linear": count_macs(model),
        "macs_full": count_macs(model, convention="full"),
        "params": count_params(model),
    }


def evaluate_sizes(
    model: Backbone,
    table: MaskTable,
    op_codes: list[int],
    batches: DataLoader,
    device: torch.device,
    *,
    amp: torch.dtype | None = None,
    baseline: Backbone | None = None,
    cut: Callable[[Backbone, dict[str, int]], Backbone] = extract,
    then: Callable[[Backbone, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """A row for each op code: its widths and size, counted on the extracted model, and its accuracy on the batches.

    baseline: other weights of the same backbone, cut to the same widths; their top-1 goes into baseline_top1.
    cut: makes a sub-network of widths.  then(sub-network, row): what else is done with each.
    """
    rows = []
    for code in progress_bar(op_codes, "sizes"):
        widths = table.widths(code)
        small = cut(model, widths).to(device)
        row = {"op_code": code, **describe(small), **evaluate(small, batches, device, amp), "widths": widths}
        if baseline is not None:
            row["baseline_top1"] = evaluate(extract(baseline, widths).to(device), batches, device, amp)["top1"]
        rows.append(row)
        if then:
            then(small, row)
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as text, with a line on what the columns mean."""
    columns = {
        "op code": lambda row: str(row["op_code"]),
        "MACs": lambda row: format_amount(row["macs_linear"]),
        "MACs full": lambda row: format_amount(row["macs_full"]),
        "params": lambda row: format_amount(row["params"]),
        "top-1": lambda row: f"{row['top1']:.2f}",
        "top-5": lambda row: f"{row['top5']:.2f}",
        "images/s": lambda row: f"{row['images_per_second']:.0f}",
    }
    notes = ["MACs: for one image, linear layers alone, as the paper counts; MACs full: attention products too."]
    if "baseline_top1" in rows[0]:
        columns["untrained"] = lambda row: f"{row['baseline_top1']:.2f}"
        notes.append("untrained: top-1 of the same widths cut from the contracted weights, without PIAD.")
    lines = ["  ".join(f"{name:>9}" for name in columns)]
    lines += ["  ".join(f"{cell(row):>9}" for cell in columns.values()) for row in rows]
    return "\n".join(lines + notes)


def write_report(rows: list[dict[str, Any]], folder: Path, facts: dict[str, Any]) -> None:
    """Prints the rows and writes frontier.txt, .csv, .json (with the facts) and .png, and widths.png.

    On the main process. facts: title, device and batch_size of the measurement, and full_widths, without which there
    is no widths.png.
    """
    if not is_main_process():
        return
    print(table_of(rows))
    write_text(folder / "frontier.txt", table_of(rows) + "\n")
    text = io.StringIO()
    columns = [name for name in rows[0] if name != "widths"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "frontier.csv", text.getvalue())
    write_text(folder / "frontier.json", json.dumps({**facts, "sizes": rows}, indent=1) + "\n")
    from plots import plot_frontier, plot_widths  # only here: matplotlib is slow to import

    measured = f"{facts['batch_size']} at a time, {facts['device']}"
    plot_frontier(rows, folder / "frontier.png", facts["title"], measured)
    names = ["frontier.txt", "frontier.csv", "frontier.json", "frontier.png"]
    if "full_widths" in facts:
        plot_widths(rows, facts["full_widths"], folder / "widths.png")
        names.append("widths.png")
    say(f"written: {folder}/{', '.join(names)}")
