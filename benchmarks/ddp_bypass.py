"""Two ways of training a super-network under DDP, where bypassed branches get no gradient, and a baseline.

zeros: this project's way (models.elastic): the parameters of a bypassed branch get a gradient of zero.
search: DDP(find_unused_parameters=True), which searches the autograd graph at every step.
stock: the baseline, timm's own model under plain DDP, which bypasses nothing.

Also two ways of drawing sub-networks, uniformly from a random mask table: each step the same one for all processes, or
one for each process (main.py --op-code-per-rank).

Run from the repository root:  python -m benchmarks.ddp_bypass
A quick look, in seconds:      python -m benchmarks.ddp_bypass --repeats 2 --warmup 1 --batch-size 1
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block, VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

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
from benchmarks.sizes import tables
from models.backbone import full_widths
from models.elastic import Switched, make_elastic, set_widths
from supernet.timing import time_alternately
from utils import run_program


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], model="deit_tiny_patch16_224", batch_size=8, repeats=20)
    parser.add_argument("--processes", type=positive, default=2, help="number of ranks, all on this machine (gloo)")
    parser.set_defaults(threads=1)
    args = parser.parse_args()
    device = prepare(args, parser)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides DDP's warning that the search found nothing
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "seconds.pt"
        torch.multiprocessing.spawn(rank_work, args=(args, results), nprocs=args.processes)
        seconds = torch.load(results)
    report(rows_of(seconds, f"{args.model}, batch {args.batch_size}"), vars(args), describe_machine(device))


def rows_of(seconds: dict[str, list[float]], name: str) -> list[Row]:
    """The rows of the report: both ways against the baseline and against each other, without and with bypassing."""
    for variant, values in seconds.items():
        print(f"{variant:>16}: {milliseconds(values):.1f} ms")

    def row(variant: str, base: str, steps: str, against: str, goal: float | None = None) -> Row:
        ratios = [a / b for a, b in zip(seconds[variant], seconds[base], strict=True)]
        return Row(
            f"{steps}, {name}",
            against,
            ratio(seconds[variant], seconds[base]),
            goal,
            bound=f"the ratios of the rounds lie between {min(ratios):.3f} and {max(ratios):.3f}",
            numbers=timing_numbers({variant: seconds[variant], base: seconds[base]}, base),
        )

    return [
        row("zeros_full", "stock", "DDP step that bypasses nothing, zeros", "stock model", 1.02),
        row("search_full", "stock", "DDP step that bypasses nothing, search", "stock model"),
        row("search_full", "zeros_full", "DDP step that bypasses nothing, search", "zeros"),
        row("zeros_bypass", "stock", "DDP step with bypassed branches, zeros", "stock model, whole"),
        row("search_bypass", "stock", "DDP step with bypassed branches, search", "stock model, whole"),
        row("search_bypass", "zeros_bypass", "DDP step with bypassed branches, search", "zeros"),
        *(_drawn_row(seconds, variant, "stock", name) for variant in ("shared_draws", "own_draws")),
        _drawn_row(seconds, "own_draws", "shared_draws", name),
    ]


def _drawn_row(seconds: dict[str, list[float]], variant: str, base: str, name: str) -> Row:
    """Compares means, since each round draws other sub-networks."""
    words = {"shared_draws": "the same size for all processes", "own_draws": "a size per process"}
    against = words.get(base, "stock model")
    numbers = timing_numbers({variant: seconds[variant], base: seconds[base]})
    measured = statistics.mean(seconds[variant]) / statistics.mean(seconds[base])
    return Row(f"DDP step of a drawn size, {words[variant]}, {name}", against, measured, numbers=numbers)


def rank_work(rank: int, args: argparse.Namespace, results: Path) -> None:
    """Runs in each process. Times all variants; the time of a step is that of the slowest rank."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store = f"file://{results.parent / 'store'}"
    timeout = datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.processes, timeout=timeout)
    try:
        rounds = {"repeats": args.repeats, "warmup": max(2, args.warmup), "now": CLOCKS[args.clock]}
        seconds = time_alternately(variants(args, rank, device), device, **rounds, before=dist.barrier)
        slowest = torch.tensor(list(seconds.values()), dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if rank == 0:
            torch.save(dict(zip(seconds, slowest.tolist(), strict=True)), results)
    finally:
        dist.destroy_process_group()


def variants(args: argparse.Namespace, rank: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """Name -> step to time, in the same order on every rank. Each way has its own model and optimizer."""
    stock, zeros = make_model(args, device), make_elastic(make_model(args, device))
    search = elastic_without_zeros(args, device)
    torch.manual_seed(args.seed + 1 + rank)
    batch = random_batch(stock, args.batch_size, device)
    full, bypass = full_widths(stock), bypassing_widths(stock, rank)
    step_stock = ddp_step(stock, batch, find_unused=False)
    step_zeros = ddp_step(zeros, batch, find_unused=False)
    step_search = ddp_step(search, batch, find_unused=True)
    table, _ = tables(stock, (50, 100), args.seed)
    shared, own = (np.random.default_rng([args.seed, number]) for number in (0, 1 + rank))
    return {
        "stock": partial(step_stock, None),
        "zeros_full": partial(step_zeros, full),
        "search_full": partial(step_search, full),
        "zeros_bypass": partial(step_zeros, bypass),
        "search_bypass": partial(step_search, bypass),
        "shared_draws": lambda: step_zeros(table.widths(int(shared.integers(len(table))))),
        "own_draws": lambda: step_zeros(table.widths(int(own.integers(len(table))))),
    }


class SwitchedBlock(Switched, Block):
    """As ElasticBlock, but without the gradients of zero."""


def elastic_without_zeros(args: argparse.Namespace, device: torch.device) -> VisionTransformer:
    """A super-network whose bypassed parameters get no gradient."""
    model = make_elastic(make_model(args, device))
    for block in model.blocks:
        block.__class__ = SwitchedBlock
    return model


def bypassing_widths(model: VisionTransformer, rank: int) -> dict[str, int]:
    """Full widths, except that every fourth branch is bypassed; which ones depends on the rank."""
    return {key: 0 if place % 4 == rank % 4 else width for place, (key, width) in enumerate(full_widths(model).items())}


def ddp_step(
    model: VisionTransformer, batch: tuple[Tensor, Tensor], find_unused: bool
) -> Callable[[dict[str, int] | None], None]:
    """Returns a function of widths (None for the stock model) that runs a training step under DDP with AdamW."""
    parallel = DistributedDataParallel(model.train(), find_unused_parameters=find_unused)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-5, weight_decay=0.05)
    images, targets = batch

    def step(widths: dict[str, int] | None) -> None:
        if widths is not None:
            set_widths(model, widths)
        loss = F.cross_entropy(parallel(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    run_program(main)
