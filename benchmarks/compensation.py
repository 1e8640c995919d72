"""Benchmarks of reparam.py --method best: contraction, compensated extraction, sizes without training.

Run by benchmarks.speed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

import supernet
from benchmarks.common import CLOCKS, Row, make_model, milliseconds, random_batch, ratio, timing_numbers
from benchmarks.sizes import half_widths
from benchmarks.training import Step, compared_steps, statistics_work
from models.backbone import full_widths
from models.elastic import make_elastic
from models.extraction import extract
from supernet.contraction import contract_network, save_contracted
from supernet.timing import time_alternately
from wpac.compensation import COMPENSATION, compensate, save_compensation
from wpac.statistics import Statistics, collect_statistics
from wpac.transform import contract

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8)
SIZES = 12


def make_network(args: argparse.Namespace, device: torch.device) -> supernet.Network:
    """The backbone of --model with random weights from --seed, as a network."""
    network = supernet.create(args.model)
    return dataclasses.replace(network, model=make_model(args, device).eval())


def contract_and_compensate(model: VisionTransformer, statistics: Statistics) -> None:
    """The part of reparam.py --method best that follows the statistics."""
    contract(model, statistics, "fisher", "fisher")
    compensate(model, statistics.outputs)


def measure_compensation(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time of contraction and compensation, of extraction from the result, and of loading a saved sub-network."""
    name = args.extraction_model
    network = make_network(argparse.Namespace(**{**vars(args), "model": name}), device)
    statistics = collect_statistics(network.model, [random_batch(network.model, 8, device)], outputs=True)
    factorise = {"factorise": partial(contract_and_compensate, network.model, statistics)}
    seconds = time_alternately(factorise, device, repeats=1, warmup=0, now=CLOCKS[args.clock])["factorise"]
    rows = [Row(f"bases, orders, factors, {name}", "-", milliseconds(seconds) / 1e3, 60, unit="s")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = save_compensation(folder / COMPENSATION, network.model, network.stamp)
        rows.append(Row(f"{COMPENSATION}, {name}", "-", size / 1e6, unit="MB"))
        for share in SHARES:
            rows += _measure_extraction(args, device, network, share, folder)
    return rows


def measure_compensated_step(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time of a PIAD step with compensation at half of the MACs, compared with the same step without it."""
    rows = []
    batch = random_batch(make_model(args, device), args.batch_size, device)
    for kind, widths in half_widths(make_model(args, device)).items():
        plain = make_elastic(make_model(args, device))
        model = make_model(args, device).eval()
        contract_and_compensate(model, collect_statistics(model, [batch], outputs=True))
        step, base = Step(make_elastic(model.to(device)), batch, device, widths), Step(plain, batch, device, widths)
        name = f"compensated PIAD step, half the MACs, {kind}, {args.model}, batch {args.batch_size}"
        rows.append(compared_steps(args, device, name, "the step without compensation", step, base, goal=1.25))
    return rows


def _measure_extraction(
    args: argparse.Namespace, device: torch.device, network: supernet.Network, share: float, folder: Path
) -> list[Row]:
    widths = {key: int(width * share) for key, width in full_widths(network.model).items()}
    network.save(folder / "sub", extract(network.model, widths))
    functions = {
        "compensated extraction": partial(extract, network.model, widths),
        "the same, read from its folder": partial(supernet.load, folder / "sub"),
    }
    goals = dict(zip(functions, (2000, 100), strict=True))
    seconds = time_alternately(functions, device, repeats=3, warmup=1, now=CLOCKS[args.clock])
    return [
        Row(
            f"{what}, {args.extraction_model}, {share:g} of the dims",
            "-",
            milliseconds(seconds[what]),
            goals[what],
            unit="ms",
            numbers=timing_numbers({"extraction": seconds[what]}),
        )
        for what in functions
    ]


def measure_sizes(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time from weights and images to the saved folders of twelve sizes, compared with a pass over the images."""
    network = make_network(args, device)
    images, targets = random_batch(network.model, args.images, device)
    batches = list(zip(images.split(args.batch_size), targets.split(args.batch_size), strict=True))

    def sizes(folder: Path) -> None:
        contracted = dataclasses.replace(network, model=copy.deepcopy(network.model))
        contract_network(contracted, batches, cost="logit", method="best", dropout_ratio=0.875)
        save_contracted(contracted, folder, {}, with_table=True)
        for code in contracted.evenly_spaced(SIZES):
            contracted.save(folder / f"op_{code}", contracted.cut(code), op_code=code)

    with tempfile.TemporaryDirectory() as folder:
        variants = {"plain": statistics_work(args, device)["plain"], "sizes": partial(sizes, Path(folder))}
        seconds = time_alternately(variants, device, repeats=min(args.repeats, 3), warmup=0, now=CLOCKS[args.clock])
    what = f"from weights to {SIZES} folders, none trained, {args.model}, {args.images} images"
    time = ratio(seconds["sizes"], seconds["plain"])
    return [Row(what, "forward + backward, time", time, 2, numbers=timing_numbers(seconds, "plain"))]
