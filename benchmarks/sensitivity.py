"""Module sensitivity with kept branch inputs compared with the plain way: time, branch forwards, and equal gammas.

The plain way extracts and runs, for each module, the network without it. The exit code is 1 if the gammas differ by
more than 1e-6.

Run from the repository root:  python -m benchmarks.sensitivity
A quick look, in seconds:      python -m benchmarks.sensitivity --images 1 --batch-size 1 --repeats 1 --warmup 1
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from benchmarks.common import (
    CLOCKS,
    Row,
    describe_machine,
    make_model,
    make_parser,
    milliseconds,
    positive,
    prepare,
    random_batch,
    ratio,
    report,
    timing_numbers,
)
from benchmarks.sizes import half_widths
from models.backbone import full_widths
from models.extraction import extract
from models.macs import count_macs
from piad.importance import Batches, module_sensitivity
from supernet.timing import time_alternately
from utils import run_program

TOLERANCE = 1e-6


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], model="deit_tiny_patch16_224", batch_size=4, repeats=3)
    parser.add_argument("--images", type=positive, default=4, help="number of proxy images")
    parser.add_argument("--half", action="store_true", help="at half of the MACs, with some branches bypassed")
    args = parser.parse_args()
    device = prepare(args, parser)
    whole = make_model(args, device).eval()
    images, targets = informative_batch(whole, args.images, device)
    widths = half_widths(whole)["mixed"] if args.half else full_widths(whole)
    model = extract(whole, widths)
    batches = list(zip(images.split(args.batch_size), targets.split(args.batch_size), strict=True))

    with BranchCount() as kept:
        found = module_sensitivity(model, batches)
    with BranchCount() as plainly:
        expected = plain_gammas(networks_without(whole, widths), batches)
    difference = max(abs(found.gamma[key] - expected[key]) for key in expected)
    extracted = list(networks_without(whole, widths))
    variants = {
        "kept": partial(module_sensitivity, model, batches),
        "plain": lambda: plain_gammas(networks_without(whole, widths), batches),
        "plain_forwards": partial(plain_gammas, extracted, batches),
    }
    seconds = time_alternately(variants, device, repeats=args.repeats, warmup=args.warmup, now=CLOCKS[args.clock])

    name = f"module sensitivity, {args.model}, {args.images} images"
    branches = sum(width > 0 for width in widths.values())
    counts = {
        "branches": branches,
        "branch_forwards_kept": kept.count // len(batches),
        "branch_forwards_plain": plainly.count // len(batches),
        "branches_run_reported": found.branches_run,
    }
    largest = max(expected.values())
    rows = [
        timed(name, "plainly, time", seconds, "plain"),
        timed(name, "plainly, time without the extractions", seconds, "plain_forwards"),
        Row(name, "plainly, branch forwards", kept.count / plainly.count, numbers=counts),
        Row(
            name,
            f"plainly, largest difference of gamma (largest gamma {largest:.2g})",
            difference,
            TOLERANCE,
            unit="",
            numbers={"largest_gamma": largest, "above_0": sum(value > 0 for value in expected.values())},
        ),
    ]
    print(f"branch forwards per batch: {counts['branch_forwards_kept']} with kept inputs, ", end="")
    print(f"{counts['branch_forwards_plain']} plainly, of a network of {branches} branches")
    print(f"ms: {milliseconds(seconds['kept']):.0f} with kept inputs, {milliseconds(seconds['plain']):.0f} plainly")
    settings = vars(args) | {"macs": count_macs(model), "widths": widths}
    report(rows, settings, describe_machine(device))
    if difference > TOLERANCE or found.branches_run * len(batches) != kept.count:
        sys.exit(1)


def timed(name: str, against: str, seconds: dict[str, list[float]], base: str) -> Row:
    """A row for the time with kept inputs compared with `base`."""
    pair = {key: seconds[key] for key in ("kept", base)}
    return Row(name, against, ratio(pair["kept"], pair[base]), numbers=timing_numbers(pair, base))


def informative_batch(model: VisionTransformer, images: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images with the model's own predictions as targets. Scales the head so that the model is confident.

    With random targets, bypassing a module of a random model does not raise the loss, and most gammas would be 0.
    """
    batch, _ = random_batch(model, images, device)
    with torch.no_grad():
        logits = model(batch)
        model.head.weight.mul_(4 / logits.std())
        return batch, model(batch).argmax(dim=1)


def networks_without(
    model: VisionTransformer, widths: dict[str, int]
) -> Iterator[tuple[str | None, VisionTransformer]]:
    """Yields (None, network at `widths`), then (key, network without that module) for each module not yet bypassed."""
    yield None, extract(model, widths, share_memory=True)
    for key in (key for key, width in widths.items() if width):
        yield key, extract(model, widths | {key: 0}, share_memory=True)


@torch.no_grad()
def plain_gammas(networks: Iterable[tuple[str | None, VisionTransformer]], batches: Batches) -> dict[str, float]:
    """Module key -> gamma, from the networks of networks_without()."""
    costs = {key: cross_entropy(network, batches) for key, network in networks}
    cost = costs.pop(None)
    return {key: max(0.0, (without - cost) / cost) for key, without in costs.items()}


def cross_entropy(model: VisionTransformer, batches: Batches) -> float:
    """Mean cross-entropy, computed in float64 from the logits."""
    total = sum(F.cross_entropy(model(images).double(), target, reduction="sum").item() for images, target in batches)
    return total / sum(len(images) for images, _ in batches)


class BranchCount:
    """Context manager that counts the forwards of all attention and MLP branches of all models."""

    def __enter__(self) -> BranchCount:
        self.count = 0
        self.handle = torch.nn.modules.module.register_module_forward_hook(self._hook)
        return self

    def __exit__(self, *_error: object) -> None:
        self.handle.remove()

    def _hook(self, module: torch.nn.Module, _inputs: object, _output: object) -> None:
        self.count += type(module).__name__ in ("Attention", "Mlp")


if __name__ == "__main__":
    run_program(main)
