"""The flags that choose sizes, which main.py and export.py share, and amounts with their units."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from models.macs import CONVENTIONS
from supernet.amounts import parse_amount
from supernet.runtimes import RUNTIMES


def quantity(kind: str, example: str) -> Callable[[str], float]:
    """An argparse type: a positive amount with a unit of this kind (supernet.amounts.UNITS)."""

    def parse(text: str) -> float:
        try:
            return parse_amount(text, kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {example}") from error

    return parse


amount = quantity("amount", "an amount such as 2.4G or 12M")
memory = quantity("bytes", "an amount of memory such as 40MB or 12MiB")
duration = quantity("seconds", "a time such as 5ms or 0.2s")


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """--op-code and the budgets."""
    group = parser.add_argument_group(
        "sizes",
        "One budget with several values asks for several sizes; several budgets, with one value each, ask for the one "
        "largest size that meets them all.",
    )
    group.add_argument(
        "--op-code",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="sizes by op code: 0 is the whole network, -1 the smallest",
    )
    for flag, kind, default, example, what in (
        ("--macs-ratio", float, [], "X", "at most this share of the MACs of the whole network, 0..1"),
        ("--macs", amount, [], "2.4G", "at most this many MACs per image"),
        ("--params", amount, [], "12M", "at most this many parameters"),
        ("--memory", memory, [], "40MB", "at most this much memory for the weights; B, KB, MB, GB, or MiB for 2^20"),
        (
            "--latency",
            duration,
            [],
            "5ms",
            "at most this time for a batch of --batch-size on --device under --amp in --runtime; sizes are measured "
            "by bisection, and the figures kept in latency.json beside the weights; a smaller size is chosen where its "
            "fidelity is known to be better; us, ms or s",
        ),
        ("--throughput", amount, [], "2000", "at least this many images per second, measured as --latency is"),
    ):
        group.add_argument(flag, type=kind, nargs="+", default=default, metavar=example, help=what)
    group.add_argument(
        "--macs-convention",
        choices=CONVENTIONS,
        default="linear",
        help="linear: linear layers alone, as the paper counts; full: with attention products (default: %(default)s)",
    )
    group.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default="eager",
        help="what runs the sizes where time is measured: PyTorch as it is, torch.compile, or ONNX Runtime on the CPU, "
        "with as many threads as PyTorch uses (default: %(default)s)",
    )
    group.add_argument(
        "--latency-table",
        type=Path,
        metavar="CSV",
        help="for --latency and --throughput: milliseconds of a batch that were measured elsewhere, as in the "
        "measure.csv that export.py writes; sizes between its rows are interpolated",
    )
