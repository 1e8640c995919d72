"""Compensated and refitted sub-networks compared on other images, with and without a classifier head.

    python -m studies.refitting --model NAME --checkpoint FILE --fit FOLDER --report FOLDER --widths mlp 0.25

Contracts and compensates the model on --samples images of --fit, cuts it, and refits it on the same images. Prints, on
images of --report: with a head, the mean KL divergence from the whole network and the agreement of the top-1 in %;
without one, the mean cosine of the pooled output and of all tokens. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import supernet
from arguments import Parser, add_model, add_preprocessing, data_overrides, positive
from benchmarks.common import describe_machine
from image_folders import image_files
from models.backbone import Backbone, blocks_of, full_widths, value_bias, value_layer
from models.extraction import extract
from models.targets import default_cost
from utils import run_program
from wpac.branches import Branch
from wpac.compensation import compensate
from wpac.refit import refit
from wpac.statistics import collect_statistics
from wpac.transform import contract

OUTLIER = 100.0
STREAMS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class RoundedBatch:
    """A wpac.streams.Batch that rounds both streams to `dtype` whenever they are set, as if they were stored so."""

    def __init__(self, whole: Tensor, cut: Tensor, held_out: bool, dtype: torch.dtype):
        self.dtype, self.held_out = dtype, held_out
        self.whole, self.cut = whole, cut

    def __setattr__(self, name: str, value: object) -> None:
        rounded = isinstance(value, Tensor) and self.dtype != value.dtype
        super().__setattr__(name, value.to(self.dtype).to(value.dtype) if rounded else value)


@torch.no_grad()
def add_outliers(model: Backbone, count: int) -> None:
    """Scales the first `count` inputs of all first layers, and dims of v in each head; the output does not change."""
    for key in full_widths(model):
        branch = Branch(model, key, blocks_of(model)[int(key.split(".")[0])])
        for parameter in branch.norm.parameters():
            parameter[:count] *= OUTLIER
        for layer in {rows.layer for rows in branch.first()}:
            layer.weight[:, :count] /= OUTLIER
        if branch.kind == "attn":
            attn = branch.module
            shape = (attn.num_heads, attn.proj.in_features // attn.num_heads)
            bias = value_bias(attn)
            for parameter in (value_layer(attn).weight, *([] if bias is None else [bias])):
                parameter[-shape[0] * shape[1] :].unflatten(0, shape)[:, :count] *= OUTLIER
            attn.proj.weight.unflatten(1, shape)[:, :, :count] /= OUTLIER


def read(network: supernet.Network, folder: Path, count: int) -> Tensor:
    """`count` images of a folder, evenly chosen: (count, C, height, width)."""
    files = image_files(folder)
    places = torch.linspace(0, len(files) - 1, min(count, len(files))).round().long()
    return torch.stack([network.read(Image.open(files[place])) for place in places])


@torch.inference_mode()
def outputs(model: Backbone, images: Tensor, batch_size: int) -> Tensor:
    """Logits (images, classes); of a model without a head, the tokens after the last norm (images, N, D)."""
    run = model if model.num_classes else model.forward_features
    return torch.cat([run(batch) for batch in images.split(batch_size)])


def scores(whole: Tensor, found: Tensor) -> dict[str, float]:
    """How near outputs() of a sub-network are to those of the whole network."""
    if whole.ndim == 2:
        p, q = whole.double().log_softmax(1), found.double().log_softmax(1)
        kl = F.kl_div(q, p, log_target=True, reduction="batchmean").item()
        return {"kl": kl, "agreement": 100 * (whole.argmax(1) == found.argmax(1)).double().mean().item()}
    cosine = F.cosine_similarity(whole, found, -1)
    return {"cosine_first": cosine[:, 0].mean().item(), "cosine_tokens": cosine.mean().item()}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("study")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights (default: random ones)")
    add_model(group)
    add_preprocessing(group)
    group.add_argument("--fit", type=Path, required=True, metavar="DIR", help="folder of images to contract and fit on")
    group.add_argument("--report", type=Path, required=True, metavar="DIR", help="folder of images to compare on")
    group.add_argument("--samples", type=positive, default=1024, metavar="N", help="images of --fit")
    group.add_argument("--report-samples", type=positive, default=1000, metavar="N", help="images of --report")
    group.add_argument("--widths", nargs="+", default=["mlp", "0.25"], help="mlp: MLPs halved; or a share of all dims")
    group.add_argument("--streams", nargs="+", choices=STREAMS, default=["float32"], help="round the streams to this")
    group.add_argument("--outliers", type=positive, metavar="N", help=f"scale N inputs of first layers by {OUTLIER:g}")
    group.add_argument("--stream-outliers", type=positive, metavar="N", help="scale N dims of the embedding likewise")
    group.add_argument("--batch-size", type=positive, default=32, metavar="N")
    group.add_argument("--threads", type=positive, metavar="N")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    more = {"model_kwargs": args.model_kwargs, "preprocessing": data_overrides(args)}
    if args.checkpoint:
        network = supernet.load(args.checkpoint, name=args.model, plain_weights=True, **more)
    else:
        network = supernet.create(args.model, **more)
    model = network.model.eval()
    if args.stream_outliers:
        model.patch_embed.proj.weight.data[: args.stream_outliers] *= OUTLIER
    if args.outliers:
        add_outliers(model, args.outliers)
    fitted, others = read(network, args.fit, args.samples), read(network, args.report, args.report_samples)
    whole = outputs(model, others, args.batch_size)
    target = "logits" if model.num_classes else "features"
    batches = fitted.split(args.batch_size)
    pairs = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in batches]
    statistics = collect_statistics(model, pairs, default_cost(target), outputs=True, target=target)
    contract(model, statistics, "fisher", "fisher")
    compensate(model, statistics.outputs)
    rows = []
    for name in args.widths:
        share = 0.5 if name == "mlp" else float(name)
        full = full_widths(model)
        widths = {key: width if name == "mlp" and "attn" in key else int(width * share) for key, width in full.items()}
        for streams in args.streams:
            small = extract(model, widths)
            row = {"widths": name, "streams": streams}
            row |= {"compensated": scores(whole, outputs(small, others, args.batch_size))}
            start = time.process_time()
            with patch("wpac.streams.Batch", partial(RoundedBatch, dtype=STREAMS[streams])):
                result = refit(model, small, batches, target)
            row |= {"cpu_seconds": round(time.process_time() - start), "held_out": [result.before, result.after]}
            rows.append(row | {"refitted": scores(whole, outputs(small, others, args.batch_size))})
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"rows": rows, "machine": describe_machine(torch.device("cpu"), args.threads)}))


if __name__ == "__main__":
    run_program(main)
