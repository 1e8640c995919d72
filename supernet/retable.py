"""Makes another mask table for a super-network of reparam.py --method best, without images, in seconds.

    python -m supernet.retable output/best --cost-of device.json
    python -m supernet.retable output/best --dropout-ratio 0.95 --output other/mask_table.json

The second line makes one for MACs, as reparam.py does. `--mask-table FILE` of the other programs opens a table that is
not beside the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import supernet
from arguments import Parser, add_cost_of, add_dropout_ratio
from piad.mask_table import MASK_TABLE
from utils import run_program, say

from .amounts import format_amount, format_seconds
from .tables import DROPOUT_RATIO


def main() -> None:
    args = parse_arguments()
    network = supernet.load(args.network, plain_weights=True)
    profile = network.profile(args.cost_of) if args.cost_of else None
    network.retable(profile, args.dropout_ratio)
    path = args.output or network.source.with_name(MASK_TABLE)
    network.table.save(path)
    if profile is None:
        ends = [f"{format_amount(network.macs(code))} MACs" for code in (0, -1)]
    else:
        ends = [format_seconds(profile.of(network.table.widths(code))) for code in (0, -1)]
    say(f"written: {path}, {len(network.table)} sizes, from {' to '.join(ends)}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("mask table")
    group.add_argument("network", type=Path, metavar="NETWORK", help="folder of reparam.py --method best")
    add_cost_of(group)
    add_dropout_ratio(group, DROPOUT_RATIO, "MACs, or with --cost-of of the time,")
    group.add_argument(
        "--output", type=Path, metavar="FILE", help=f"where to write to (default: {MASK_TABLE} beside the weights)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
