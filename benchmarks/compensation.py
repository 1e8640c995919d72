"""Measurements of contraction by effect and of compensated extraction. See benchmarks.speed."""

from __future__ import annotations

import argparse
import copy
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Row, alternate, make_model, milliseconds, random_batch, timing_numbers
from models.backbone import full_widths
from models.extraction import extract
from models.folder import load_subnetwork, save_subnetwork
from wpac.compensation import COMPENSATION, compensate, save_compensation
from wpac.statistics import collect_statistics
from wpac.transform import contract

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8)


def measure_compensation(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Bases, orders and factors of a backbone; then extraction of compensated sub-networks, and of written ones."""
    args = argparse.Namespace(**{**vars(args), "model": args.extraction_model})
    model = make_model(args, device).eval()
    statistics = collect_statistics(model, [random_batch(model, 8, device)], outputs=True)

    def factorise() -> None:
        nonlocal model
        model = copy.deepcopy(base)
        own = copy.copy(statistics)
        own.tokens, own.outputs = dict(statistics.tokens), dict(statistics.outputs)
        contract(model, own, "fisher", "fisher")
        compensate(model, own.outputs)

    base = model
    once = alternate({"factorise": factorise}, device, repeats=1, warmup=0, clock=args.clock)["factorise"]
    rows = [
        Row(f"bases, orders, factors, {args.model}", "-", milliseconds(once) / 1e3, 60, unit="s"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        size = save_compensation(Path(folder) / COMPENSATION, model)
        rows.append(Row(f"{COMPENSATION}, {args.model}", "-", size / 1e6, unit="MB"))
        for share in SHARES:
            widths = {key: int(width * share) for key, width in full_widths(model).items()}
            small = extract(model, widths)
            save_subnetwork(
                Path(folder) / "sub",
                small,
                name=args.model,
                model_kwargs={},
                preprocessing={
                    "input_size": [3, 224, 224],
                    "mean": [0.5] * 3,
                    "std": [0.5] * 3,
                    "crop_pct": 0.9,
                    "crop_mode": "center",
                    "interpolation": "bicubic",
                },
            )
            variants = {
                "compensated": partial(extract, model, widths),
                "written": partial(load_subnetwork, Path(folder) / "sub"),
            }
            seconds = alternate(variants, device, repeats=3, warmup=1, clock=args.clock)
            for name, reach in (("compensated", 2000), ("written", 100)):
                what = "compensated extraction" if name == "compensated" else "the same, read from its folder"
                rows.append(
                    Row(
                        f"{what}, {args.model}, {share:g} of the dims",
                        "-",
                        milliseconds(seconds[name]),
                        reach,
                        unit="ms",
                        numbers=timing_numbers({name: seconds[name]}),
                    )
                )
    return rows
