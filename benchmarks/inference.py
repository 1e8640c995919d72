"""Benchmarks of extracted models, of extraction, and of the start of the programs. Run by benchmarks.speed."""

from __future__ import annotations

import argparse
import statistics as stats
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.common import (
    CLOCKS,
    ROOT,
    Row,
    give_memory_back,
    make_model,
    milliseconds,
    random_batch,
    ratio,
    timing_numbers,
)
from benchmarks.sizes import half_widths, tables, thinnest_widths
from models.extraction import extract
from models.macs import count_macs
from piad.mask_table import MaskTable
from supernet.timing import time_alternately

PLACES = (0, 0.25, 0.5, 0.75, 1)  # of the extracted op codes, as a share of the length of the table


# ---------------------------------------------------------------------------------------------------------------------
# The extracted model's forward


def measure_forward(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """How many times faster extracted models with half of the MACs are than the stock model, at each batch size."""
    stock = make_model(args, device).eval()
    # With one unit per module, nearly all of the time that is left does not depend on the widths.
    thin = extract(stock, thinnest_widths(stock))
    rows = []
    for kind, widths in half_widths(stock).items():
        small = extract(stock, widths)
        for batch_size in args.forward_batch_sizes:
            images, _ = random_batch(stock, batch_size, device)
            models = {"stock": stock, "extracted": small, "thinnest": thin}
            variants = {name: partial(forward, model, images) for name, model in models.items()}
            # Small batches take less time, and their times vary more.
            repeats = args.repeats * max(1, min(8, 64 // batch_size))
            seconds = time_alternately(variants, device, repeats=repeats, warmup=args.warmup, now=CLOCKS[args.clock])
            full, fixed = milliseconds(seconds["stock"]), milliseconds(seconds["thinnest"])
            share, thin_share = (count_macs(model) / count_macs(stock) for model in (small, thin))
            # On the line through (MACs share, time) of the thinnest and of the whole model.
            expected = fixed + (full - fixed) * (share - thin_share) / (1 - thin_share)
            rows.append(
                Row(
                    f"extracted at half the MACs, {kind}, {args.model}, batch {batch_size}",
                    "stock model, times faster",
                    ratio(seconds["stock"], seconds["extracted"]),
                    1.8,
                    at_least=True,
                    bound=f"at {thin_share:.1%} of the MACs a forward still takes {fixed:.1f} of {full:.1f} ms (norms, "
                    f"softmax, sums, patches); on a straight line from there, half would be {full / expected:.2f} x",
                    numbers=timing_numbers(seconds, "extracted")
                    | {"macs_share": share, "macs_share_thinnest": thin_share, "straight_line": full / expected},
                )
            )
    return rows


@torch.inference_mode()
def forward(model: VisionTransformer, images: Tensor) -> Tensor:
    return model(images)


# ---------------------------------------------------------------------------------------------------------------------
# Extraction


def measure_extraction(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time of an extraction at several op codes, and whether it depends on the number of op codes in the table."""
    torch.manual_seed(args.seed)
    args = argparse.Namespace(**{**vars(args), "model": args.extraction_model})
    model = make_model(args, device).eval()
    few, many = tables(model, (50, 400), args.seed)
    rows, size_ratios = [], []
    for place in PLACES:
        few_code = round(place * (len(few) - 1))
        many_code = many.rows.index(few.rows[few_code])  # the same widths
        variants = extraction_work(model, few, few_code, many, many_code)
        # As in a first extraction: reusing the memory of the previous one would avoid page faults.
        rounds = {"repeats": args.repeats, "warmup": args.warmup, "now": CLOCKS[args.clock]}
        seconds = time_alternately(variants, device, **rounds, before=give_memory_back)
        size_ratios += [ratio(seconds[f"{kind}_many"], seconds[f"{kind}_few"]) for kind in ("own", "shared")]
        for kind, name in (("own", "own memory"), ("shared", "shared memory")):
            clone = milliseconds(seconds[f"clone_{kind}"])
            rows.append(
                Row(
                    f"extraction, {args.model}, op code {many_code} of {len(many)}, {name}",
                    "-",
                    milliseconds(seconds[f"{kind}_many"]),
                    100,
                    unit="ms",
                    bound=f"a plain clone of the bytes that extraction copies takes {clone:.1f} ms",
                    numbers=timing_numbers({k: v for k, v in seconds.items() if kind in k})
                    | {
                        "op_code_few": few_code,
                        "op_code_many": many_code,
                        "macs": count_macs(model, many.rows[many_code]),
                    },
                )
            )
    rows.append(
        Row(
            f"extraction, {args.model}, same widths in a table of {len(many)} op codes",
            f"of {len(few)} op codes, median",
            stats.median(size_ratios),
            1.05,
            bound="both look up one row, so the rest is noise of the timing",
            numbers={"ratios": size_ratios},
        )
    )
    return rows


def extraction_work(
    model: VisionTransformer, few: MaskTable, few_code: int, many: MaskTable, many_code: int
) -> dict[str, Callable[[], Any]]:
    """Name -> function: extraction from either table into own or shared memory, and plain clones of what it copies."""
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own, shared = (list(extract(model, few.rows[few_code], share).parameters()) for share in (False, True))
    copied = [p for p in shared if p.untyped_storage().data_ptr() not in storages]
    return {
        "own_few": lambda: extract(model, few.widths(few_code)),
        "own_many": lambda: extract(model, many.widths(many_code)),
        "clone_own": lambda: [p.detach().clone() for p in own],
        "shared_few": lambda: extract(model, few.widths(few_code), share_memory=True),
        "shared_many": lambda: extract(model, many.widths(many_code), share_memory=True),
        "clone_shared": lambda: [p.detach().clone() for p in copied],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Start


def measure_start(args: argparse.Namespace, _device: torch.device) -> list[Row]:
    """Time of `main.py --help` and `reparam.py --help`, compared with an import of torch and timm."""
    cpu = torch.device("cpu")
    rows = []
    for program in ("main.py", "reparam.py"):
        variants = {"help": partial(run_python, program, "--help"), "import": partial(run_python, "-c", IMPORTS)}
        seconds = time_alternately(variants, cpu, repeats=args.repeats, warmup=1, now=CLOCKS[args.clock])
        slowest = ", ".join(f"{name} {ms:.0f}" for name, ms in slowest_imports(program))
        rows.append(
            Row(
                f"{program} --help",
                f'python -c "{IMPORTS}"',
                ratio(seconds["help"], seconds["import"]),
                1.2,
                bound=f"slowest imports other than torch and timm, in ms: {slowest}",
                numbers=timing_numbers(seconds, "import"),
            )
        )
    return rows


IMPORTS = "import torch, timm"


def run_python(*arguments: str) -> str:
    """Runs this Python interpreter in the repository root and returns its stderr."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True
    ).stderr


def slowest_imports(program: str, count: int = 5) -> list[tuple[str, float]]:
    """(package, ms) of the packages that take longest to import in `program --help`, without what they import."""
    totals: dict[str, float] = {}
    for line in run_python("-X", "importtime", program, "--help").splitlines():
        own, _, name = line.removeprefix("import time:").split("|") if line.count("|") == 2 else ("", "", "")
        if own.strip().isdecimal():
            package = name.strip().split(".")[0]
            totals[package] = totals.get(package, 0.0) + int(own) / 1e3
    others = ((name, ms) for name, ms in totals.items() if name not in ("torch", "timm"))
    return sorted(others, key=lambda item: -item[1])[:count]
