"""MACs and parameters of twelve sizes of full-size models of every supported family, with random weights.

    python -m benchmarks.backbones

The mask table comes from random importance. Twelve op codes, evenly spaced in MACs, are counted without extracting
them. The largest, the middle and the smallest are extracted and run on one image. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import supernet
from arguments import count
from benchmarks.common import describe_machine
from benchmarks.sizes import tables
from files import write_text
from models.macs import count_macs, count_params
from supernet.amounts import format_amount
from utils import run_program

SIZES = 12
MODELS = {
    "deit_tiny_patch16_224": {},
    "deit_small_patch16_224": {},
    "deit_base_patch16_224": {},
    "deit_small_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_dinov2": {"img_size": 224},
    "vit_small_patch16_224": {"img_size": 98, "patch_size": 14},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch16_224": {"qk_norm": True},
    "vit_small_patch16_rope_224": {},
    "vit_small_plus_patch16_dinov3": {},
    "eva02_tiny_patch14_224": {},
    "swin_tiny_patch4_window7_224": {},
    "swinv2_tiny_window8_256": {},
}


def measure(name: str, model_kwargs: dict, seed: int) -> list[dict]:
    """One row per size: op code, MACs per image in both conventions, and parameters."""
    torch.manual_seed(seed)
    network = supernet.create(name, model_kwargs)
    model = network.model
    _, network.table = tables(model, (SIZES, 400), seed)
    rows = []
    for code in network.evenly_spaced(SIZES):
        sizes = network.sizes(code)
        rows.append({"op_code": code, "macs": sizes["macs"], "macs_full": network.macs(code, "full")})
        rows[-1]["params"] = sizes["params"]
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        small = network.cut(row["op_code"])
        with torch.inference_mode():
            logits = small(torch.randn(1, 3, *model.patch_embed.img_size))
        assert logits.isfinite().all() and count_params(small) == row["params"] and count_macs(small) == row["macs"]
    return rows


def markdown(results: dict[str, Any]) -> str:
    """A table with one line per model: the MACs of its sizes, and the parameters of the largest and the smallest."""
    lines = [f"| model | MACs of {SIZES} sizes | parameters |", "|---|---|---|"]
    for name, rows in results["models"].items():
        words = " ".join([name, *(f"{key}={value}" for key, value in MODELS[name].items())])
        macs = ", ".join(format_amount(row["macs"]) for row in rows)
        params = " to ".join(format_amount(row["params"]) for row in (rows[0], rows[-1]))
        lines.append(f"| {words} | {macs} | {params} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help="default: all"
    )
    parser.add_argument(
        "--seed", type=count, default=0, help="seed of the weights and the importance (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to this file")
    args = parser.parse_args()
    found = {}
    for name in args.models:
        found[name] = measure(name, MODELS[name], args.seed)
        print(f"{name} {MODELS[name] or ''}".strip())
        for title, key in (("MACs", "macs"), ("MACs, full", "macs_full"), ("parameters", "params")):
            print(f"  {title:>11}  " + "  ".join(f"{format_amount(row[key]):>6}" for row in found[name]), flush=True)
    results = {"machine": describe_machine(torch.device("cpu")), "seed": args.seed, "models": found}
    if args.output:
        write_text(args.output, json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    run_program(main)
