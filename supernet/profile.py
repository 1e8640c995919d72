"""Measures the time of each kind of module of a network on this device, and writes device.json.

    python -m supernet.profile output/best --batch-size 1 --output device.json
    python -m supernet.profile deit_small_patch16_224 --batch-size 64 --amp --device cuda --output device.json

`reparam.py --mask-table --cost-of device.json` and `python -m supernet.retable output/best --cost-of device.json` make
a mask table for it. The values of the weights do not matter. On the CPU, OMP_NUM_THREADS sets the number of threads.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import supernet
from arguments import Parser, add_amp, add_model, positive
from files import check_output_dir
from models.backbone import full_widths
from utils import UserError, init_processes, run_program, say, seed_everything

from .amounts import format_seconds
from .device import DEVICE
from .profiling import measure_profile
from .runtimes import RUNTIMES


def main() -> None:
    args = parse_arguments()
    device = init_processes(args)
    seed_everything(0)
    check_output_dir(args.output.parent, "--output")
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder: give a file, such as {args.output / DEVICE}")
    network = opened(args)
    profile = measure_profile(
        network.model.to(device),
        network.name,
        batch_size=args.batch_size,
        amp=args.amp,
        runtime=args.runtime,
        repeats=args.repeats,
    )
    for shape, entry in profile.content["modules"].items():
        times = [f"{width}: {format_seconds(value)}" for width, value in entry["seconds"].items() if value]
        say(f"{entry['count']} x {shape}: {', '.join(times)}")
    whole = format_seconds(profile.of(full_widths(network.model)))
    say(f"the rest: {format_seconds(profile.content['rest'])}; the whole network: {whole}")
    errors = profile.content["errors"]
    say(
        f"{errors['networks']} networks were measured; the profile differs from their times by {errors['median']:.1%} "
        f"(median), at most by {errors['largest']:.1%}"
    )
    profile.save(args.output)
    say(f"written: {args.output}")


def opened(args: argparse.Namespace) -> supernet.Network:
    """The network whose weights are given, or a new one of a model's name."""
    path, kwargs = Path(args.network), args.model_kwargs
    if path.exists() or (":" not in args.network and os.sep in args.network):
        found = supernet.load(path, name=args.model, model_kwargs=kwargs, use_ema=args.use_ema, plain_weights=True)
        if found.is_subnetwork:
            raise UserError(f"{path} is a sub-network: give the whole network, which is measured at several widths")
        return found
    if args.use_ema:
        raise UserError(f"--eval-ema is for a checkpoint, and {args.network} is the name of a model: leave it out")
    if args.model not in (None, args.network):
        raise UserError(f"{path} does not exist, so it was taken for the name of a model, but --model is {args.model}")
    return supernet.create(args.network, kwargs)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what to measure")
    group.add_argument("network", metavar="NETWORK", help="weights, the folder of a super-network, or timm's name")
    add_model(group)
    group.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="images per batch (default: %(default)s)"
    )
    add_amp(group)
    group.add_argument("--runtime", choices=RUNTIMES, default="eager", help="what runs it (default: %(default)s)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto: CUDA if there is one")
    group.add_argument(
        "--repeats",
        type=positive,
        default=15,
        metavar="N",
        help="timed rounds, in each of which every network runs once (default: %(default)s)",
    )
    group.add_argument(
        "--output", type=Path, default=Path(DEVICE), metavar="FILE", help="where to write to (default: %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
