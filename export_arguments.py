"""The flags of export.py, and which of them go together."""

from __future__ import annotations

import argparse
from pathlib import Path

from arguments import (
    Parser,
    add_amp,
    add_data_set,
    add_mask_table,
    add_model,
    add_preprocessing,
    add_proxy_samples,
    add_refit,
    count,
    positive,
)
from files import check_output_dir
from size_arguments import add_size_arguments
from supernet.formats import FORMATS, NEEDS, ONNX, REDUCED
from supernet.graphs import check_packages
from supernet.latency_table import MEASURE, is_filled_in
from utils import UserError, say


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = Parser(
        description="Export sub-networks, each checked against the model it was made from.",
    )
    group = parser.add_argument_group("what to export")
    group.add_argument(
        "checkpoint",
        type=Path,
        metavar="NETWORK",
        help="folder or weights of a super-network, or the folder of a sub-network",
    )
    add_model(group)
    add_mask_table(group)
    add_preprocessing(group)
    add_refit(group)
    add_proxy_samples(group)
    add_size_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--all",
        type=positive,
        dest="frontier",
        metavar="N",
        help="N sizes evenly spaced in MACs, besides those of the other flags",
    )
    group.add_argument(
        "--format",
        nargs="+",
        default=["folder"],
        metavar="FORMAT",
        help=f"one or more of {', '.join(FORMATS)} (default: folder)",
    )
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    group.add_argument(
        "--replace",
        action="store_true",
        help="replace what an earlier export wrote to --output, and files of the same names",
    )
    group.add_argument(
        "--force", action="store_true", help="write a file in float16 or int8 although its fidelity is below the limit"
    )
    group.add_argument(
        "--static-batch",
        type=positive,
        metavar="N",
        help="for files that take exactly N images, as converters for phones want them (default: any number)",
    )
    group = parser.add_argument_group("checks and measurements")
    add_data_set(group, default=None)
    group.add_argument(
        "--measure",
        nargs="+",
        choices=("latency", "top1", "fidelity"),
        default=[],
        help="for index.json: latency as --latency measures it; on --data-set (val/, or the images that are held back) "
        "top-1, and fidelity to the whole network, which needs no labels (default: what is known)",
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="images per batch, for latency (default: %(default)s)",
    )
    add_amp(group)
    group.add_argument("--device", default="auto", help="for measurements: cpu, cuda, cuda:1, or auto")
    group.add_argument(
        "--seed", type=count, default=0, help="of the random images, and of the images held back (default: %(default)s)"
    )
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError, before any work is done, for flags that do not go together."""
    for name in args.format:
        if name not in FORMATS:
            raise UserError(f"--format {name} is not known: {', '.join(FORMATS)}")
        check_packages(NEEDS.get(name, ()), f"--format {name}")
        if name in REDUCED and not args.data_set:
            raise UserError(f"--format {name} needs images to be checked on: give --data-set and --data-path")
    for name in ("top1", "fidelity"):
        if name in args.measure and not args.data_set:
            raise UserError(f"--measure {name} needs --data-set")
    if args.refit is not False and not args.data_set:
        raise UserError("--refit needs images: give --data-set and --data-path")
    if args.static_batch and set(args.format) == {"folder"}:
        raise UserError("--static-batch is for torch-export and ONNX files: a folder takes any batch; leave it out")
    if args.latency_table and (args.runtime != "eager" or args.amp):
        raise UserError("--latency-table holds times that were measured elsewhere: leave --runtime and --amp out")
    check_output_dir(args.output, "--output")
    if args.output.exists() and any(args.output.iterdir()) and not args.replace:
        raise UserError(f"--output {args.output} exists and is not empty: give another folder, or --replace")
    if is_filled_in(args.output / MEASURE):
        raise UserError(f"{args.output / MEASURE} holds times that would be lost: move it elsewhere, or remove it")


def say_what_is_timed(args: argparse.Namespace) -> None:
    """Prints a line where the times that choose a size, or are written down, are not those of the files."""
    timed = args.latency or args.throughput or "latency" in args.measure
    if not timed or args.latency_table:
        return
    if set(args.format) <= set(ONNX) and args.runtime != "onnxruntime":
        say(f"times are those of --runtime {args.runtime}, not of the ONNX files: give --runtime onnxruntime")
    reduced = [name for name in args.format if name in REDUCED]
    if reduced:
        say(f"times are those of float32: to choose by those of {' and '.join(reduced)}, see --latency-table")
