"""Running a function in several real processes (gloo), and the functions that the tests run there."""

from __future__ import annotations

import contextlib
import datetime
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from tiny import batches, random_backbone, random_data, some_widths
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fidelity import Evaluator
from models.backbone import full_widths
from models.elastic import make_elastic, set_widths
from models.extraction import extract
from models.targets import TARGETS
from piad.importance import dimension_importance, module_sensitivity
from utils import UserError, check_ranks_agree, gather_over_ranks, mean_over_ranks, reduce_sum, say, world
from wpac.compensation import compensate
from wpac.refit import refit
from wpac.statistics import collect_statistics
from wpac.transform import contract

SHARDS = (slice(0, 5), slice(5, 8))  # of 8 images: three batches on one rank and two on the other
BATCH_SIZE = 2


def run_in_ranks(function: Callable[[int], Any], ranks: int, folder: Path) -> list[Any]:
    """What `function(rank)` gives in each of `ranks` new processes; `function` stands at the top of a module."""
    torch.multiprocessing.spawn(_worker, args=(function, ranks, folder), nprocs=ranks)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def _worker(rank: int, function: Callable[[int], Any], ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        torch.save(function(rank), folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def all_statistics(shard: slice) -> dict[str, Any]:
    """WPAC's and PIAD's sums over one part of the data: the same data altogether, whatever the processes."""
    images, targets = random_data(8)
    data = batches(images[shard], targets[shard], BATCH_SIZE)
    model = random_backbone()
    small = extract(model, some_widths(model))
    statistics = collect_statistics(model, data, "ce")
    sensitivity = module_sensitivity(small, data)
    return {
        "covariance": statistics.covariance,
        "importance": statistics.importance,
        "cost": sensitivity.cost,
        "gamma": sensitivity.gamma,
        "alpha": dimension_importance(small, data),
    }


def ddp_widths(rank: int) -> dict[str, int]:
    """Rank 0 bypasses branches that rank 1 runs."""
    model = random_backbone()
    return some_widths(model) if rank == 0 else full_widths(model) | {"0.mlp": 64}


def ddp_gradients(rank: int) -> dict[str, torch.Tensor]:
    """The gradients after one step in which each rank runs its own sub-network on its own images."""
    model = make_elastic(random_backbone())
    parallel = DistributedDataParallel(model)
    images, targets = random_data(8)
    for widths in (full_widths(model), ddp_widths(rank)):  # a step at full width first: DDP settles its buckets there
        model.zero_grad()
        set_widths(model, widths)
        F.cross_entropy(parallel(images[rank::2]), targets[rank::2]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def process_helpers(rank: int) -> dict[str, Any]:
    """utils' words between processes, as this rank hears them."""
    sums = torch.tensor([float(rank), rank + 1.0])
    reduce_sum(sums)
    try:
        check_ranks_agree("weights", 7)
        check_ranks_agree("weights", rank)
        odd = None
    except UserError as error:
        odd = str(error)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        say("hello")
    return {
        "world": world(),
        "sums": sums.tolist(),
        "gathered": gather_over_ranks([float(rank), rank + 0.5]),
        "means": mean_over_ranks({"a": float(rank), "b": rank + 0.5}),
        "odd": odd,
        "said": said.getvalue(),
    }


def measured(shard: slice) -> dict[str, dict[str, float]]:
    """What a sub-network is found to be on one part of the data, for each target."""
    images, targets = random_data(8)
    data = batches(images[shard], targets[shard], BATCH_SIZE)
    whole = random_backbone()
    small, device = extract(whole, some_widths(whole)), torch.device("cpu")
    return {
        target: Evaluator(target, data, device, labels=True, training=data, whole=whole)(small) for target in TARGETS
    }


def rank_work(rank: int) -> dict[str, Any]:
    """Everything that the tests ask of a rank, in one start of the processes."""
    return {
        "statistics": all_statistics(SHARDS[rank]),
        "gradients": ddp_gradients(rank),
        "processes": process_helpers(rank),
        "measured": measured(SHARDS[rank]),
    }


def last_layer_moments(shard: slice) -> dict[str, torch.Tensor]:
    """What compensation and a refit make of one part of the data."""
    images, targets = random_data(8)
    data = batches(images[shard], targets[shard], BATCH_SIZE)
    model = random_backbone()
    statistics = collect_statistics(model, data, "ce", outputs=True)
    contract(model, statistics, "fisher", "fisher")
    compensate(model, statistics.outputs)
    small = extract(model, some_widths(model))
    refit(model, small, [batch for batch, _ in data])
    return {key: value.detach() for key, value in small.state_dict().items()}
