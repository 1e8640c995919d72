"""Benchmark of the memory of reparam.py --method best: bytes beyond the model and the images, random weights.

    python -m benchmarks.memory --threads 1 --images 8 --depths 1 3

It has two parts: the passes over the images (one batch of all --images: more batches of this size take no more), and
what follows them: bases, orders, factors, the mask table and the files. Each number of blocks in --depths is measured
in a new process. The peak of each part grows by the same amount with each block, so the line through the first and the
last measurement gives that of the whole model, unless --depths holds its own number of blocks. On the CPU it is the
resident memory of the process, on CUDA the memory of the allocator.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import supernet
from benchmarks.common import (
    Row,
    describe_machine,
    in_new_process,
    make_parser,
    peak_so_far,
    positive,
    prepare,
    report,
    reset_peak,
)
from models.backbone import create_backbone
from supernet.contraction import contract_network, save_contracted

MODELS = ("vit_huge_patch14_224", "vit_so400m_patch14_siglip_224")
PARTS = ("passes over the images", "bases, orders, factors, files")
GOAL = 16e9
DROPOUT_RATIO = 0.92


def measure(args: argparse.Namespace, model: str, depth: int) -> dict[str, Any]:
    """The bytes of each of PARTS with so many blocks, those of the model, and seconds."""
    device = prepare(args, argparse.ArgumentParser())
    network = supernet.create(model, {"depth": depth}, num_classes=0)
    network.model.to(device).eval()
    images = torch.randn(args.images, network.model.in_chans, *network.model.patch_embed.img_size, device=device)
    with torch.no_grad():
        network.model(images[:1])  # what PyTorch allocates at its first call
    start, held, peaks = time.perf_counter(), reset_peak(device), []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield images, torch.zeros(len(images), dtype=torch.long)
        peaks.append(peak_so_far(device) - held)  # the next batch is asked for when the pass over this one is over
        reset_peak(device)

    contract_network(network, batches(), method="best", dropout_ratio=DROPOUT_RATIO)
    with tempfile.TemporaryDirectory() as folder:
        save_contracted(network, Path(folder), {}, with_table=True)
    peaks.append(peak_so_far(device) - held)
    weights = sum(parameter.nbytes for parameter in network.model.parameters())
    return {"depth": depth, "bytes": peaks, "weights": weights, "seconds": time.perf_counter() - start}


def rows_of(model: str, measured: list[dict[str, Any]], images: int) -> list[Row]:
    """The bytes of each part at the depth of the model: on the line through the first and the last measurement."""
    with torch.device("meta"):
        depth = len(create_backbone(model).blocks)
    first, last = measured[0], measured[-1]
    rows = []
    for number, part in enumerate(PARTS):
        (x0, y0), (x1, y1) = [(point["depth"], point["bytes"][number]) for point in (first, last)]
        slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0
        own = [point["bytes"][number] for point in measured if point["depth"] == depth]
        value, how = (own[0], "measured") if own else (y0 + slope * (depth - x0), "by the line")
        numbers = {"measured": measured, "per_block": slope}
        what = f"{model}, {images} images in a batch, {depth} blocks, {how}: {part}"
        rows.append(Row(what, "-", value * 1e-9, GOAL * 1e-9, "GB", numbers=numbers))
    return rows


def main() -> None:
    parser = make_parser(__doc__, model="", batch_size=0, repeats=1)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm names of plain ViTs")
    parser.add_argument("--images", type=positive, default=8, metavar="N", help="of the batch")
    parser.add_argument("--depths", type=positive, nargs="+", default=[1, 3], metavar="N", help="blocks")
    args = parser.parse_args()
    rows = []
    for model in args.models:
        measured = [in_new_process(measure, args, model, depth) for depth in sorted({*args.depths})]
        rows += rows_of(model, measured, args.images)
    report(rows, vars(args), describe_machine(torch.device(args.device), args.threads))


if __name__ == "__main__":
    main()
