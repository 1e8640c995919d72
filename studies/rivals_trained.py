"""Compression with training: methods of other papers beside this project's, on the same checkpoint and images.

    python -m studies.rivals_trained --name digits --data-set digits --checkpoint FILE --epochs 100 \
        --lrs 0.004 0.008 0.016 -- FLAGS

Each of studies.rivals_trained_methods.METHODS gives networks at --shares of the MACs: one network that is trained for
all sizes, or one size at a time. All start from the same pre-trained checkpoint and train on the same images, each for
all of the epochs. Where a method has a teacher, it is the whole network before training, and the divergence from its
prediction has the weight --alpha in the loss. A step of Scala trains four sizes on its images, a step of most others
one.
First, each method trains with seed 0 at each of --lrs on nine tenths of the training images; the learning rate with the
best mean top-1 on the others is taken, for sizes that train alone for each size. If it is the highest or the lowest of
all, its double or its half is tried as well, and so on. (The checkpoint has been trained on all of these images, so
this choice favours rates that change it little.) Then each method trains on all of them with each seed of --draws, and
top-1 (percent) of the averaged weights is measured on val/. FLAGS are those of main.py (augmentation, averaging).
Writes docs/results/rivals_trained_NAME.json after each training, skips those that are already there, and draws a .png
beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from typing import Any

from torch import nn

from arguments import Parser, decimal, open_network, share
from benchmarks.common import describe_machine
from datasets import Images, eval_loader, open_splits
from engine import evaluate
from main_arguments import parse_main_arguments
from studies.budget import Budget
from studies.common import (
    Results,
    facts_of,
    mean_and_range,
    model_and_data_flags,
    parse_training_arguments,
    refuse_flags,
    run_entry_point,
)
from studies.plots import plot_rivals_trained
from studies.rivals import off_size
from studies.rivals_cut import check_plain
from studies.rivals_task import macs_of
from studies.rivals_trained_methods import METHODS
from utils import UserError, init_processes, progress_bar, run_program

# Flags of main.py that some of the methods cannot follow, and their defaults.
NOT_FOR_ALL = {"freeze_embedding": False, "distillation_tokens": 0.0, "grad_checkpointing": False, "drop_path": 0.0}
NOT_FOR_ALL |= {"grad_accum_steps": 1, "sizes_per_step": 1, "compile": None}
TEACHER = "--teacher-model self --distillation-type soft --distillation-alpha"
SIZES = 12  # the number of sizes whose training is counted
MORE_RATES = 4  # learning rates tried beyond --lrs, at most
HELD_OUT = 10  # one image in so many is not trained on while learning rates are compared


class Study:
    """Trains and measures the methods one after another."""

    def __init__(self, args: argparse.Namespace, flags: list[str]):
        self.args, self.device = args, init_processes(args)
        self.images, self.val = open_splits(args.data_set, args.data_path, index=args.index)
        self.network = open_network(args, self.images.num_classes, plain_weights=True)
        check_plain(self.network.model)
        self.network.model.to(self.device).eval()
        self.settings = settings_of(args, flags)
        path = args.output_dir / f"rivals_trained_{args.name}.json"
        self.results = Results(path, **facts_of(self.network), machine=describe_machine(self.device))
        self.whole = macs_of(self.network.model)
        self.results.content["whole"] = {"macs": self.whole, "top1": self.top1(self.network.model)}
        self.setup = {"epochs": args.epochs, "alpha": args.alpha, "dropout_ratio": args.dropout_ratio, "flags": flags}

    def top1(self, model: nn.Module, images: Images | None = None) -> float:
        loader = eval_loader(images or self.val, self.network.preprocessing, batch_size=256, workers=0)
        return evaluate(model.to(self.device).eval(), loader, self.device)["top1"]

    def rates(self, method: str) -> dict[float, float]:
        """Share of the MACs -> the learning rate with the best top-1 on held-out training images.

        Where one network is trained for all sizes, it is the one with the best mean top-1.
        """
        if not METHODS[method].trains:
            return dict.fromkeys(self.args.shares, 0.0)
        shares, untried, found = self.args.shares, list(self.args.lrs), {}
        if len(untried) == 1:
            return dict.fromkeys(shares, untried[0])
        rest = self.images.subset([index for index in range(len(self.images)) if index % HELD_OUT])
        held_out_images = self.images.subset(range(0, len(self.images), HELD_OUT))
        while untried:
            for lr in untried:
                row = self.run(method, 0, dict.fromkeys(shares, lr), rest, held_out_images)
                top1 = {part: row["top1"][f"{part:.3g}"] or 0.0 for part in shares}
                found[lr] = top1 if METHODS[method].one_size else dict.fromkeys(shares, sum(top1.values()))
            untried = beyond(found) if len(found) < len(self.args.lrs) + MORE_RATES else []
        return {part: max(found, key=lambda lr, part=part: (found[lr][part], -lr)) for part in shares}

    def run(
        self, method: str, seed: int, rates: dict[float, float], images: Images, val: Images | None = None
    ) -> dict[str, Any]:
        """Returns the result of a training. If the results file has it already, nothing is trained.

        rates: share -> learning rate.  images: to train on.  val: the images to measure on, None for those of val/.
        """
        measured_on = "val" if val is None else "held-out training images"
        named = {f"{part:.3g}": lr for part, lr in rates.items()}
        key = {"method": method, "seed": seed, "lr": named, "measured on": measured_on, **self.setup}
        known = self.results.rows("rows", **key)
        if known:
            return known[0]
        row, seconds, trained = {"top1": {}, "macs_share": {}}, 0.0, 0
        for lr in dict.fromkeys(rates.values()):
            settings = argparse.Namespace(**{**vars(self.settings), "seed": seed, "lr": lr})
            budget, start = Budget(self.network, images, settings, self.device), time.perf_counter()
            parts = [part for part in rates if rates[part] == lr]
            found = METHODS[method].run(budget, parts)
            seconds += time.perf_counter() - start
            trained = budget.images_for_all_sizes + SIZES * budget.images_for_each_size
            for part in parts:
                model, name = found.get(part), f"{part:.3g}"
                row["top1"][name] = None if model is None else self.top1(model, val)
                row["macs_share"][name] = None if model is None else macs_of(model) / self.whole
        self.results.add("rows", {**key, **row, "images": trained, "seconds": seconds})
        return self.results.content["rows"][-1]


def beyond(found: dict[float, dict[float, float]]) -> list[float]:
    """Twice the highest learning rate, if it is better than all others for a share of the MACs; half of the lowest too.

    found: learning rate -> share -> top-1.
    """
    low, high = min(found), max(found)

    def leads(rate: float) -> bool:
        others = [top1 for lr, top1 in found.items() if lr != rate]
        return any(all(value > top1[part] for top1 in others) for part, value in found[rate].items())

    return [2 * high] * leads(high) + [low / 2] * leads(low)


def settings_of(args: argparse.Namespace, flags: list[str]) -> argparse.Namespace:
    """The arguments of main.py for a training. Raises UserError for flags that some of the methods cannot follow."""
    words = [*model_and_data_flags(args), "--epochs", args.epochs, "--dropout-ratio", args.dropout_ratio]
    words += [*shlex.split(TEACHER), args.alpha, *flags]
    settings = run_entry_point(parse_main_arguments, *words)
    refuse_flags(settings, NOT_FOR_ALL)
    if args.epochs < 2:
        raise UserError("--epochs 1: some methods train in two parts, so give 2 or more")
    if args.alpha >= 1:
        raise UserError(f"--alpha {args.alpha:g}: some methods learn from labels alone, so give less than 1")
    return settings


def final_rows(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Method -> its rows, one per seed: measured on val/, with the flags and learning rates of the newest row."""
    rows = [row for row in results["rows"] if row["measured on"] == "val"]
    setup = {name: rows[-1][name] for name in ("epochs", "alpha", "dropout_ratio", "flags")} if rows else {}
    rows = [row for row in rows if all(row[name] == value for name, value in setup.items())]
    last = {row["method"]: row["lr"] for row in rows}
    return {
        method: [row for row in rows if row["method"] == method and row["lr"] == last[method]]
        for method in METHODS
        if method in last
    }


def markdown(results: dict[str, Any]) -> str:
    """A table: mean top-1 over the seeds with its range, and the images that SIZES sizes are trained on."""
    methods = final_rows(results)
    first = next(iter(methods.values()))[0]
    parts = list(first["top1"])
    head = [f"{first['epochs']} epochs", "seeds", "learning rate", *(f"{part} of the MACs" for part in parts)]
    head.append(f"images trained on for {SIZES} sizes")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method, rows in methods.items():
        made = [lr for part, lr in rows[0]["lr"].items() if lr and rows[0]["top1"][part] is not None]
        rates = [f"{lr:g}" for lr in dict.fromkeys(made)]
        cells = [method, str(len(rows)), ", ".join(rates), *(_cell(rows, part) for part in parts)]
        lines.append(f"| {' | '.join(cells)} | {rows[0]['images']:,} |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]], part: str) -> str:
    """Mean top-1 and its range; and the share of the MACs, where it is more than 5 % off what was asked for."""
    values, macs_share = [row["top1"][part] for row in rows], rows[0]["macs_share"][part]
    if None in values:
        return ""
    return mean_and_range(values) + off_size(part, macs_share)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = list(METHODS)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=everything, metavar="NAME", help="default: all"
    )
    shares = [1 / 8, 1 / 4, 1 / 2, 1.0]
    parser.add_argument("--shares", nargs="+", type=share, default=shares, metavar="X", help="of the MACs")
    help_text = "learning rates per 512 images, of which each method gets the best"
    parser.add_argument("--lrs", nargs="+", type=decimal, required=True, metavar="X", help=help_text)
    parser.add_argument("--alpha", type=share, default=0.5, metavar="X", help="the teacher's share of the loss")
    return parse_training_arguments(parser)


def main() -> None:
    args, flags = parse_arguments()
    study = Study(args, flags)
    for method in progress_bar(args.methods, "methods"):
        rates = study.rates(method)
        for seed in args.draws if METHODS[method].trains else args.draws[:1]:
            study.run(method, seed, rates, study.images)
    results = study.results
    results.log()
    print(markdown(results.content))
    lines = [(method, METHODS[method].one_size, rows) for method, rows in final_rows(results.content).items()]
    plot_rivals_trained(lines, results.content["whole"], results.path.with_suffix(".png"), args.name.replace("_", " "))
    print(json.dumps({"file": results.path.name, "rows": len(results.rows("rows"))}))


if __name__ == "__main__":
    run_program(main)
