"""Compression with training: ways of other papers beside this project's, on the same checkpoint and images.

    python -m studies.rivals_trained --name digits --data-set digits --checkpoint FILE --epochs 100 \
        --lrs 0.004 0.008 0.016 -- FLAGS

Each of studies.rivals_ways.WAYS gives networks at --shares of the MACs: one network that is trained for all sizes, or
one size at a time. All start from the same pre-trained checkpoint and train on the same images, each for all of the
epochs. Where a way is taught, the whole network before training gives --alpha of the loss, by its prediction.
First, each way trains with seed 0 at each of --lrs on nine tenths of the training images; the learning rate with the
best mean top-1 on the others is taken (a way without training has none). Then it trains on all of them with each seed
of --draws, and top-1 (percent) of the averaged weights is measured on val/. FLAGS are those of main.py (augmentation,
averaging). Writes docs/results/rivals_trained_NAME.json after each training, skips those that are already there, and
draws a .png beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from typing import Any
from unittest import mock

from torch import nn

from arguments import Parser, decimal, open_network, share
from benchmarks.common import describe_machine
from datasets import Images, eval_loader, open_splits
from engine import evaluate
from main_arguments import parse_main_arguments
from studies.budget import Budget
from studies.common import Results, facts_of, model_and_data_flags, parse_training_arguments
from studies.plots import plot_rivals_trained
from studies.rivals_task import macs_of
from studies.rivals_ways import WAYS
from utils import init_processes, progress_bar, run_program

TEACHER = "--teacher-model self --distillation-type soft --distillation-alpha"
SIZES = 12  # the number of sizes whose training is counted
HELD_OUT = 10  # one image in so many is not trained on while learning rates are compared


class Study:
    """Trains and measures the ways one after another."""

    def __init__(self, args: argparse.Namespace, flags: list[str]):
        self.args, self.device = args, init_processes(args)
        self.images, self.val = open_splits(args.data_set, args.data_path, index=args.index)
        self.network = open_network(args, self.images.num_classes, plain_weights=True)
        self.network.model.to(self.device).eval()
        words = [*model_and_data_flags(args), "--epochs", args.epochs, "--dropout-ratio", args.dropout_ratio]
        words += [*shlex.split(TEACHER), args.alpha, *flags]
        with mock.patch.object(sys, "argv", [sys.argv[0], *map(str, words)]):
            self.settings = parse_main_arguments()
        path = args.output_dir / f"rivals_trained_{args.name}.json"
        self.results = Results(path, **facts_of(self.network), flags=flags, machine=describe_machine(self.device))
        self.results.content["whole"] = {"macs": macs_of(self.network.model), "top1": self.top1(self.network.model)}

    def top1(self, model: nn.Module, images: Images | None = None) -> float:
        loader = eval_loader(images or self.val, self.network.preprocessing, batch_size=256, workers=0)
        return evaluate(model.to(self.device).eval(), loader, self.device)["top1"]

    def rate(self, way: str) -> float:
        """The best learning rate of a way, by the images that are held out."""
        if len(self.args.lrs) == 1:
            return self.args.lrs[0]
        held_out = range(0, len(self.images), HELD_OUT)
        rest = [index for index in range(len(self.images)) if index % HELD_OUT]
        found = {}
        for lr in self.args.lrs:
            row = self.run(way, 0, lr, self.images.subset(rest), self.images.subset(held_out))
            found[lr] = statistics.mean(top1 for top1 in row["top1"].values() if top1 is not None)
        return max(found, key=found.get)

    def run(self, way: str, seed: int, lr: float, images: Images, val: Images | None = None) -> dict[str, Any]:
        """The row of a training, which is only run if there is none.  val: what is measured on, None for val/."""
        key = {"way": way, "seed": seed, "epochs": self.args.epochs, "lr": lr}
        key["measured on"] = "val" if val is None else "held-out training images"
        known = self.results.rows("rows", **key)
        if known:
            return known[0]
        settings = argparse.Namespace(**{**vars(self.settings), "seed": seed, "lr": lr})
        budget, start = Budget(self.network, images, settings, self.device), time.perf_counter()
        found = WAYS[way](budget, self.args.shares)
        seconds, row = time.perf_counter() - start, {"top1": {}, "macs_share": {}}
        for part in self.args.shares:
            model, name = found.get(part), f"{part:.3g}"
            row["top1"][name] = None if model is None else self.top1(model, val)
            share_of_macs = None if model is None else macs_of(model) / self.results.content["whole"]["macs"]
            row["macs_share"][name] = share_of_macs
        row["one size at a time"] = not budget.once and budget.each > 0
        row["images"] = budget.once + SIZES * budget.each
        self.results.add("rows", {**key, **row, "seconds": seconds})
        return row


def markdown(results: dict[str, Any]) -> str:
    """A table for each number of epochs: mean top-1 over the seeds with its range, and the images of SIZES sizes."""
    lines, whole = [], results["whole"]
    rows = [row for row in results["rows"] if row["measured on"] == "val"]
    for epochs in sorted({row["epochs"] for row in rows}):
        own = [row for row in rows if row["epochs"] == epochs]
        parts = list(own[0]["top1"])
        head = [f"{epochs} epochs", "seeds", "learning rate", *(f"{part} of the MACs" for part in parts)]
        head.append(f"images trained on for {SIZES} sizes")
        lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines.append(f"| whole network, not trained further | | | {' | '.join([''] * (len(parts) - 1))} "
                     f"| {whole['top1']:.1f} | 0 |")  # fmt: skip
        for way in WAYS:
            same = [row for row in own if row["way"] == way]
            if same:
                cells = [_cell(same, part) for part in parts]
                rate = f"{same[0]['lr']:g}" if same[0]["lr"] else ""
                lines.append(f"| {' | '.join([way, str(len(same)), rate, *cells])} | {same[0]['images']:,} |")
    return "\n".join(lines).strip()


def _cell(rows: list[dict[str, Any]], part: str) -> str:
    """Mean top-1 and its range; and the share of the MACs, where it is more than 5 % above what was asked for."""
    values, macs_share = [row["top1"][part] for row in rows], rows[0]["macs_share"][part]
    if None in values:
        return ""
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    more = f" at {macs_share:.3f}" if macs_share > 1.05 * float(part) else ""
    return f"{statistics.mean(values):.1f}{spread}{more}"


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME", help="default: all")
    shares = [1 / 8, 1 / 4, 1 / 2, 1.0]
    parser.add_argument("--shares", nargs="+", type=share, default=shares, metavar="X", help="of the MACs")
    help_text = "learning rates per 512 images, of which each way gets the best"
    parser.add_argument("--lrs", nargs="+", type=decimal, required=True, metavar="X", help=help_text)
    parser.add_argument("--alpha", type=decimal, default=0.5, metavar="X", help="the teacher's share of the loss")
    return parse_training_arguments(parser)


def main() -> None:
    args, flags = parse_arguments()
    study = Study(args, flags)
    for way in progress_bar(args.ways, "ways"):
        lr = 0.0 if way == "best, untrained" else study.rate(way)
        for seed in args.draws:
            study.run(way, seed, lr, study.images)
    results = study.results
    results.log()
    print(markdown(results.content))
    plot_rivals_trained(results.content, results.path.with_suffix(".png"), args.name.replace("_", " "))
    print(json.dumps({"file": results.path.name, "rows": len(results.rows("rows"))}))


if __name__ == "__main__":
    run_program(main)
