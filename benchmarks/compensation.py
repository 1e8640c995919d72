"""Measurements of contraction by effect, compensated extraction, sizes without training. See benchmarks.speed."""

from __future__ import annotations

import argparse
import copy
import tempfile
from functools import partial
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks.common import Row, alternate, make_model, milliseconds, random_batch, ratio, timing_numbers
from benchmarks.training import statistics_work
from models.backbone import full_widths
from models.extraction import extract
from reparam import table_without_training
from supernet.folder import load_subnetwork, save_subnetwork
from supernet.selection import evenly_spaced
from wpac.allocation import dim_errors
from wpac.compensation import COMPENSATION, compensate, save_compensation
from wpac.statistics import Statistics, collect_statistics
from wpac.transform import contract

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8)
SIZES = 12
PREPROCESSING = {
    "input_size": [3, 224, 224],
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "crop_pct": 0.9,
    "crop_mode": "center",
    "interpolation": "bicubic",
}


def contract_and_compensate(model: VisionTransformer, statistics: Statistics) -> VisionTransformer:
    """What --method best does once it has its statistics."""
    contract(model, statistics, "fisher", "fisher")
    compensate(model, statistics.outputs)
    return model


def write_size(folder: Path, name: str, model: VisionTransformer, widths: dict[str, int]) -> None:
    save_subnetwork(folder, extract(model, widths), name=name, model_kwargs={}, preprocessing=PREPROCESSING)


def measure_compensation(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Bases, orders and factors of a backbone; then extraction of compensated sub-networks, and of written ones."""
    name = args.extraction_model
    model = make_model(argparse.Namespace(**{**vars(args), "model": name}), device).eval()
    statistics = collect_statistics(model, [random_batch(model, 8, device)], outputs=True)
    factorise = {"factorise": partial(contract_and_compensate, model, statistics)}
    seconds = alternate(factorise, device, repeats=1, warmup=0, clock=args.clock)["factorise"]
    rows = [Row(f"bases, orders, factors, {name}", "-", milliseconds(seconds) / 1e3, 60, unit="s")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = save_compensation(folder / COMPENSATION, model)
        rows.append(Row(f"{COMPENSATION}, {name}", "-", size / 1e6, unit="MB"))
        for share in SHARES:
            rows += _measure_extraction(args, device, model, share, folder)
    return rows


def _measure_extraction(
    args: argparse.Namespace, device: torch.device, model: VisionTransformer, share: float, folder: Path
) -> list[Row]:
    name = args.extraction_model
    widths = {key: int(width * share) for key, width in full_widths(model).items()}
    write_size(folder / "sub", name, model, widths)
    ways = {
        "compensated extraction": (partial(extract, model, widths), 2000),
        "the same, read from its folder": (partial(load_subnetwork, folder / "sub"), 100),
    }
    seconds = alternate({what: work for what, (work, _) in ways.items()}, device, repeats=3, warmup=1, clock=args.clock)
    return [
        Row(
            f"{what}, {name}, {share:g} of the dims",
            "-",
            milliseconds(seconds[what]),
            reach,
            unit="ms",
            numbers=timing_numbers({"extraction": seconds[what]}),
        )
        for what, (_, reach) in ways.items()
    ]


def measure_sizes(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """From weights and images to the folders of twelve sizes, nothing trained, against a pass over the images."""
    model = make_model(args, device).eval()
    work = statistics_work(args, device)

    def sizes(folder: Path) -> None:
        statistics = work["outputs"]()
        small = contract_and_compensate(copy.deepcopy(model), statistics)
        save_compensation(folder / COMPENSATION, small)
        settings = argparse.Namespace(model=args.model, dropout_ratio=0.875)
        table = table_without_training(small, dim_errors(small, statistics), settings)
        table.save(folder / "mask_table.json")
        for code in evenly_spaced(small, table, SIZES):
            write_size(folder / f"op_{code}", args.model, small, table.widths(code))

    with tempfile.TemporaryDirectory() as folder:
        variants = {"plain": work["plain"], "sizes": partial(sizes, Path(folder))}
        seconds = alternate(variants, device, repeats=min(args.repeats, 3), warmup=0, clock=args.clock)
    what = f"from weights to {SIZES} folders, none trained, {args.model}, {args.images} images"
    time = ratio(seconds["sizes"], seconds["plain"])
    return [Row(what, "forward + backward, time", time, 2, numbers=timing_numbers(seconds, "plain"))]
