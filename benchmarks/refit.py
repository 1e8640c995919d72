"""Benchmark of refitting: seconds and peak memory for one size, all modules at half their width.

    python -m benchmarks.refit --threads 2 --images 64 128 256

Each number of images is measured in a new process, with random weights and images. Both figures grow by the same amount
with each image; the line through the first and the last measurement gives those for --scale-to images, and the others
say how far a measurement lies from that line. Time is in core seconds: with --clock wall, seconds times threads.
Memory is that beyond both networks and the images; with few images it does not show how it grows, so measure it with
more of them and --depth 2. --steps measures refitting by gradient descent instead of least squares.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from benchmarks.common import (
    CLOCKS,
    Row,
    describe_machine,
    in_new_process,
    make_parser,
    peak_bytes,
    positive,
    prepare,
    random_batch,
    report,
)
from models.backbone import create_backbone, full_widths
from models.extraction import extract
from wpac.refit import refit

MODELS = ("deit_small_patch16_224", "deit_base_patch16_224")
GOALS = {"deit_base_patch16_224": {"seconds": 1440, "bytes": 4e9}}  # for 1,024 images: 12 minutes on two cores


def measure(args: argparse.Namespace, model: str, images: int) -> dict[str, float]:
    """seconds and bytes of one refit."""
    device = prepare(args, argparse.ArgumentParser())
    network = create_backbone(model, **({"depth": args.depth} if args.depth else {})).to(device).eval()
    small = extract(network, {key: width // 2 for key, width in full_widths(network).items()})
    batches = random_batch(network, images, device)[0].split(args.batch_size)
    network(batches[0][:1])  # what PyTorch allocates at its first call
    start, seconds = CLOCKS[args.clock](), []

    def work() -> None:
        refit(network, small, batches, steps=args.steps)
        seconds.append(CLOCKS[args.clock]() - start)

    used = peak_bytes(work, device)
    return {
        "images": images,
        "seconds": seconds[0] * (1 if args.clock == "cpu" else torch.get_num_threads()),
        "bytes": used,
    }


def rows_of(model: str, measured: list[dict[str, float]], images: int, steps: int) -> list[Row]:
    """For seconds and bytes: the value at `images`, and how far the measurements lie from the line."""
    rows = []
    for name, unit, factor in (("seconds", "core s", 1), ("bytes", "GB", 1e-9)):
        (x0, y0), (x1, y1) = [(point["images"], point[name]) for point in (measured[0], measured[-1])]
        slope = (y1 - y0) / (x1 - x0)
        apart = [abs(p[name] / (y0 + slope * (p["images"] - x0)) - 1) for p in measured[1:-1]]
        goal = GOALS.get(model, {}).get(name) if images == 1024 and not steps else None
        numbers: dict[str, Any] = {"measured": measured, "per_image": slope, "largest_deviation": max(apart, default=0)}
        value = y0 + slope * (images - x0)
        how = f", {steps} steps per block" if steps else ""
        what = f"refit, {model}, {images} images{how}"
        rows.append(Row(what, "-", value * factor, goal and goal * factor, unit, numbers=numbers))
        if apart:
            rows.append(Row(f"  {name}: distance from the line", "-", 100 * statistics.median(apart), unit="%"))
    return rows


def main() -> None:
    parser = make_parser(__doc__, model="", batch_size=32, repeats=1)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm names")
    parser.add_argument("--images", type=positive, nargs="+", default=[32, 64, 128], metavar="N", help="two or more")
    parser.add_argument("--depth", type=positive, metavar="N", help="blocks: the time grows with them, not the memory")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="of gradient descent per block")
    parser.add_argument("--scale-to", type=positive, default=1024, metavar="N", help="images of the figures")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = []
    for model in args.models:
        measured = [in_new_process(measure, args, model, images) for images in args.images]
        rows += rows_of(model, measured, args.scale_to, args.steps)
    report(rows, vars(args), describe_machine(device, args.threads))


if __name__ == "__main__":
    main()
