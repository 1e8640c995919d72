"""The speed of each part of the project, compared with its baseline.

Run from the repository root:  python -m benchmarks.speed            (about ten minutes on two cores)
A quick look, in seconds:      python -m benchmarks.speed --only step --repeats 1 --warmup 1 --batch-size 2
The proxy set of the paper:    python -m benchmarks.speed --only statistics sizes --images 1024
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.common import Row, describe_machine, make_parser, positive, prepare, report
from benchmarks.compensation import measure_compensated_step, measure_compensation, measure_sizes
from benchmarks.inference import measure_extraction, measure_forward, measure_start
from benchmarks.training import measure_half_step, measure_statistics, measure_step, measure_teacher
from utils import run_program

PARTS: dict[str, Callable[[argparse.Namespace, torch.device], list[Row]]] = {
    "statistics": measure_statistics,
    "step": measure_step,
    "half-step": measure_half_step,
    "compensated-step": measure_compensated_step,
    "teacher": measure_teacher,
    "forward": measure_forward,
    "extraction": measure_extraction,
    "compensation": measure_compensation,
    "sizes": measure_sizes,
    "start": measure_start,
}


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], model="deit_tiny_patch16_224", batch_size=32, repeats=10)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to measure")
    parser.add_argument("--images", type=positive, default=128, help="number of proxy images for the statistics")
    parser.add_argument(
        "--forward-batch-sizes", type=positive, nargs="+", default=[1, 8, 64], help="batch sizes of the forward part"
    )
    parser.add_argument(
        "--extraction-model", default="deit_base_patch16_224", help="backbone of the extraction and compensation parts"
    )
    args = parser.parse_args()
    device = prepare(args, parser)
    rows = [row for name in args.only for row in PARTS[name](args, device)]
    report(rows, vars(args), describe_machine(device))


if __name__ == "__main__":
    run_program(main)
