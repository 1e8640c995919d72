"""Time of extracted models compared with their MACs: sizes of one mask table, at each batch size, eager and compiled.

With --steps: whether widths that are no multiple of 8 are slower: w - 4 dims per head or hidden units against w.

Run from the repository root:  python -m benchmarks.latency
On a GPU:                      python -m benchmarks.latency --device cuda --model deit_small_patch16_224 --amp
A quick look, in seconds:      python -m benchmarks.latency --sizes 3 --batch-sizes 1 --modes eager --repeats 2
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

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
from files import write_text
from models.backbone import full_widths
from models.extraction import extract
from models.macs import count_macs
from piad.mask_table import MaskTable
from report.plots import plot_latency
from supernet.contraction import network_of
from supernet.runtimes import compiled
from supernet.timing import time_alternately
from utils import run_program

MODES = ("eager", "compile")
OP_CODES = 400  # in the random table that is used without --mask-table


@torch.inference_mode()
def forward(model: nn.Module, images: Tensor, amp: torch.dtype | None) -> Tensor:
    with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
        return model(images)


def measure_sizes(
    args: argparse.Namespace, device: torch.device, models: dict[int, VisionTransformer], mode: str, batch_size: int
) -> list[Row]:
    """One row per op code: its time divided by the ideal one, which is proportional to the MACs."""
    images, _ = random_batch(models[0], batch_size, device)
    amp = torch.bfloat16 if args.amp else None
    variants = {
        str(code): partial(forward, compiled(model) if mode == "compile" else model, images, amp)
        for code, model in models.items()
    }
    seconds = time_alternately(variants, device, repeats=args.repeats, warmup=args.warmup, now=CLOCKS[args.clock])
    rows, larger = [], None
    for code, model in models.items():
        own, whole = seconds[str(code)], seconds["0"]
        share = count_macs(model) / count_macs(models[0])
        slower = larger is not None and ratio(own, larger) > 1
        rows.append(
            Row(
                f"{mode}, batch {batch_size}, op code {code}, {share:.1%} of the MACs, {milliseconds(own):.4g} ms"
                + (", slower than the size before" if slower else ""),
                "the ideal line, time",
                ratio(own, whole) / share,
                numbers=facts_of(model)
                | {"mode": mode, "batch_size": batch_size, "op_code": code, "macs_share": share}
                | {"slower_than_larger": slower}
                | timing_numbers({"size": own, "whole": whole}, "whole"),
            )
        )
        larger = own
    slower = [row.numbers["op_code"] for row in rows if row.numbers["slower_than_larger"]]
    what = f"{mode}, batch {batch_size}: sizes slower than the next larger one"
    rows.append(Row(what, "-", len(slower), 0, unit="", bound=f"op codes {slower}", numbers={"op_codes": slower}))
    return rows


def measure_steps(
    args: argparse.Namespace, device: torch.device, model: VisionTransformer, batch_size: int
) -> list[Row]:
    """One row per multiple of 8 dims per head or hidden units (of the latter a selection): the time with 4 fewer."""
    full, amp = full_widths(model), torch.bfloat16 if args.amp else None
    images, _ = random_batch(model, batch_size, device)
    rows = []
    for kind, what in (("attn", "dims per head"), ("mlp", "hidden units")):
        least = min(width for key, width in full.items() if key.endswith(kind))
        every = max(least // 64, 1) * 8
        for width in range(every, least + 1, every):
            variants = {}
            for name, kept in (("multiple", width), ("fewer", width - 4)):
                # In a Swin, only the stages of the smallest width are cut.
                cut = {key: kept for key, most in full.items() if key.endswith(kind) and most == least}
                variants[name] = partial(forward, extract(model, full | cut), images, amp)
            seconds = time_alternately(
                variants, device, repeats=args.repeats, warmup=args.warmup, now=CLOCKS[args.clock]
            )
            rows.append(
                Row(
                    f"batch {batch_size}, {width - 4} {what}",
                    f"{width} {what}, time",
                    ratio(seconds["fewer"], seconds["multiple"]),
                    numbers={"batch_size": batch_size, "kind": kind, "width": width} | timing_numbers(seconds),
                )
            )
    return rows


def facts_of(model: VisionTransformer) -> dict[str, Any]:
    """What the time of a size may depend on: its MACs, and the distinct widths of its modules."""
    widths = full_widths(model)
    return {
        "macs": count_macs(model),
        "macs_full": count_macs(model, convention="full"),
        "head_dims": sorted({width for key, width in widths.items() if key.endswith(".attn")}),
        "hidden_units": sorted({width for key, width in widths.items() if key.endswith(".mlp")}),
        "bypassed": sum(width == 0 for width in widths.values()),
    }


def save(results: dict[str, Any], path: Path) -> None:
    """Writes the results as JSON and, unless they are of --steps, a picture next to it."""
    write_text(path, json.dumps(results, indent=1) + "\n")
    sizes = [row["numbers"] for row in results["rows"] if "macs_share" in row["numbers"]]
    if sizes:
        machine, model = results["machine"], results["settings"]["model"]
        place = f"{machine['cpu']}, {machine['threads']} threads" if machine["device"] == "cpu" else machine["device"]
        plot_latency(sizes, path.with_suffix(".png"), f"{model}, {place}")


def markdown(results: dict[str, Any]) -> str:
    """A table with one line per size: ms and, in brackets, the ratio to the ideal time. Or one line per step."""
    rows = [row for row in results["rows"] if "macs_share" in row["numbers"]]
    if not rows:
        lines = ["| kept | time, against 4 more |", "|---|---|"]
        lines += [f"| {row['what'].split(', ')[1]} | {row['measured']:.3f} x |" for row in results["rows"]]
        return "\n".join(lines)
    columns = list(dict.fromkeys((row["numbers"]["mode"], row["numbers"]["batch_size"]) for row in rows))
    head = ["MACs", "dims per head", "hidden units", *(f"{mode}, batch {images}" for mode, images in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for code in dict.fromkeys(row["numbers"]["op_code"] for row in rows):
        own = [row for row in rows if row["numbers"]["op_code"] == code]
        numbers = own[0]["numbers"]
        cells = [f"{numbers['macs_share']:.1%}", _range(numbers["head_dims"]), _range(numbers["hidden_units"])]
        for row in own:
            slow = ", slower" if row["numbers"]["slower_than_larger"] else ""
            median = row["numbers"]["ms_size"]["median"]
            time = f"{median:,.0f}" if median >= 100 else f"{median:.3g}"
            cells.append(f"{time} ms ({row['measured']:.2f}{slow})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _range(values: list[int]) -> str:
    return f"{values[0]} to {values[-1]}" if len(values) > 1 else str(values[0])


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], model="deit_tiny_patch16_224", batch_size=1, repeats=20)
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 64], help="replaces --batch-size")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="how the models are run")
    parser.add_argument("--sizes", type=positive, default=12, help="number of sizes, evenly spaced in MACs")
    parser.add_argument("--mask-table", type=Path, help="table of --model; None: from random importance")
    parser.add_argument("--steps", action="store_true", help="measure 4 dims fewer than a multiple of 8, not sizes")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file, and a picture next to it")
    parser.add_argument("--amp", action="store_true", help="use bfloat16 autocast")
    args = parser.parse_args()
    device = prepare(args, parser)
    model = make_model(args, device).eval()
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    pairs = [(mode, batch_size) for mode in args.modes for batch_size in args.batch_sizes]
    if args.steps:
        rows = [row for batch_size in args.batch_sizes for row in measure_steps(args, device, model, batch_size)]
    else:
        table = MaskTable.load(args.mask_table) if args.mask_table else tables(model, (2, OP_CODES), args.seed)[1]
        table.check(full_widths(model), args.model)
        network = replace(network_of(model), table=table)
        models = {code: network.cut(code) for code in network.evenly_spaced(args.sizes)}
        rows = [row for pair in pairs for row in measure_sizes(args, device, models, *pair)]
    results = report(rows, settings, describe_machine(device))
    if args.output:
        save(results, args.output)


if __name__ == "__main__":
    run_program(main)
