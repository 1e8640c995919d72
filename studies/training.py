"""Compares ways to spend a training budget: the paper's super-network, ours with a teacher, and one size at a time.

    python -m studies.training --name digits --data-set digits --checkpoint FILE --epochs 100 --lr 0.016 -- FLAGS

All start from the same pre-trained checkpoint. WAYS:
    untrained              cut from what reparam.py --method best writes, with compensation
    refitted               the same, refitted by least squares on the proxy images, one size at a time
    paper                  PIAD on the paper's contraction, for all of the epochs
    best                   RECIPE=best, as for the digits: the whole network teaches, with labels, for all of the epochs
    best, no labels        the same without labels
    one size               each size alone, refitted, then trained like `best` for all of the epochs
    one size, no labels    the same without labels
Measures top-1 (percent) of the averaged weights at --shares of the MACs, for super-networks at --points points of the
training. FLAGS are those of main.py (augmentation, averaging). Writes docs/results/training_NAME.json after each way
and skips ways that are already there; draws the curves beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import tempfile
from pathlib import Path
from typing import Any

import main as program
import reparam
import supernet
from arguments import Parser, decimal, open_network, positive, share
from benchmarks.common import describe_machine
from datasets import eval_loader, open_splits, proxy_set
from engine import evaluate
from models.backbone import Backbone
from studies.common import (
    Results,
    facts_of,
    mean_and_range,
    model_and_data_flags,
    parse_training_arguments,
    run_entry_point,
)
from studies.plots import plot_curves
from supernet import Network
from utils import init_processes, progress_bar, run_program

TEACHER = shlex.split("--sched-on-updates --teacher-model self --distillation-type soft --distillation-alpha")
SUPER_NETWORK = shlex.split("--stage piad --progressive-epochs 0 --op-code-sampling inverse-macs")
WAYS = ("untrained", "refitted", "paper", "best", "best, no labels", "one size", "one size, no labels")
SIZES = 12  # the number of sizes whose training is counted


class Study:
    """Runs the ways of a seed one after another; reparam.py and main.py do the work."""

    def __init__(self, args: argparse.Namespace, flags: list[str]):
        self.args, self.flags, self.device = args, flags, init_processes(args)
        self.images, val = open_splits(args.data_set, args.data_path, index=args.index)
        self.start = open_network(args, self.images.num_classes, plain_weights=True)
        loading = {"batch_size": args.batch_size, "workers": args.workers}
        self.val = eval_loader(val, self.start.preprocessing, **loading)
        path = args.output_dir / f"training_{args.name}.json"
        rates = {key: getattr(args, key) for key in ("lr", "teacher_lr", "alpha", "tokens")}
        self.results = Results(
            path, **facts_of(self.start), **rates, flags=flags, machine=describe_machine(self.device)
        )
        self.results.content["images"] = len(self.images)

    def run(self, way: str, seed: int) -> None:
        """Measures a way, unless it has results."""
        key = {"way": way, "seed": seed, "epochs": self.args.epochs}
        if self.results.rows("rows", **key):
            return
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            contracted = self.contract(folder / "contracted", "paper" if way == "paper" else "best", seed)
            if way in ("untrained", "refitted"):
                found = {0: self.sizes(supernet.load(contracted), seed if way == "refitted" else None)}
            elif way.startswith("one size"):
                found = {self.args.epochs: self.one_at_a_time(contracted, folder, way, seed)}
            else:
                found = self.super_network(contracted, folder / "trained", way, seed)
        for epoch, top1 in found.items():
            self.results.add("rows", {**key, "epoch": epoch, "top1": top1})

    def contract(self, output: Path, method: str, seed: int) -> Path:
        table = ["--mask-table", "--dropout-ratio", self.args.dropout_ratio] if method == "best" else []
        run_entry_point(
            reparam.main, *model_and_data_flags(self.args), "--method", method, *table, "--seed", seed, "--no-eval",
            "--checkpoint", self.args.checkpoint, "--output-dir", output,
        )  # fmt: skip
        return output

    def sizes(self, network: Network, refit_seed: int | None = None) -> dict[str, float]:
        """share -> top-1 of the size that is cut, and refitted on the proxy set of a seed.

        Without the shares that the mask table, which PIAD still extends, does not reach.
        """
        found, smallest = {}, network.macs(-1) / network.macs()
        for part in (part for part in self.args.shares if part >= smallest):
            refit = None
            if refit_seed is not None:
                proxy = proxy_set(self.images, self.args.proxy_samples, refit_seed)
                loading = {"batch_size": self.args.batch_size, "workers": self.args.workers}
                refit = (images for images, _ in eval_loader(proxy, network.preprocessing, **loading))
            code = network.select(max_macs=part * network.macs())
            found[f"{part:.3g}"] = self.top1(network.cut(code, refit=refit))
        return found

    def top1(self, model: Backbone) -> float:
        return evaluate(model.to(self.device).eval(), self.val, self.device)["top1"]

    def super_network(self, contracted: Path, output: Path, way: str, seed: int) -> dict[int, dict[str, float]]:
        """epoch -> sizes of the averaged weights after that many epochs."""
        epochs = self.args.epochs
        every = max(1, epochs // self.args.points)
        if way == "paper":
            start = contracted / "contracted.safetensors"
            recipe = ["--stage", "piad", "--progressive-epochs", max(1, epochs // 2), "--op-code-per-rank"]
            recipe += ["--dropout-ratio", self.args.dropout_ratio, "--lr", self.args.lr]
        else:
            start, recipe = contracted, [*SUPER_NETWORK, *self.teacher(way)]
        self.train(recipe, seed, start, output, "--keep-every", every)
        found = {}
        for last in range(every, epochs + 1, every):
            found[last] = self.sizes(supernet.load(output / f"checkpoint_{last - 1}.pth", use_ema=True))
        return found

    def one_at_a_time(self, contracted: Path, folder: Path, way: str, seed: int) -> dict[str, float]:
        """share -> top-1 of a sub-network that was trained alone; main.py keeps the better of raw and averaged."""
        found = {}
        for part in self.args.shares:
            output = folder / f"{part:.3g}"
            recipe = ["--stage", "finetune", "--macs-ratio", part, "--refit", *self.teacher(way)]
            self.train(recipe, seed, contracted, output)
            found[f"{part:.3g}"] = self.top1(supernet.load(output).model)
        return found

    def teacher(self, way: str) -> list[object]:
        alpha = 1 if way.endswith("no labels") else self.args.alpha
        return [*TEACHER, alpha, "--distillation-tokens", self.args.tokens, "--lr", self.args.teacher_lr]

    def train(self, recipe: list[object], seed: int, start: Path, output: Path, *more: object) -> None:
        run_entry_point(
            program.main, *model_and_data_flags(self.args), *recipe, "--epochs", self.args.epochs, "--seed", seed,
            "--eval-every", self.args.epochs, *self.flags, *more, "--checkpoint", start, "--output-dir", output,
        )  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """Tables: top-1 after training, mean and range over the seeds; and when `best` first is where `paper` ends."""
    lines = []
    for epochs in sorted({row["epochs"] for row in results["rows"]}):
        rows = [row for row in results["rows"] if row["epochs"] == epochs]
        shares = shares_of(rows)
        head = [f"{epochs} epochs", "seeds", *(f"{part} of the MACs" for part in shares)]
        lines += [f"| {' | '.join([*head, f'images trained on for {SIZES} sizes'])} |", "|---" * (len(head) + 1) + "|"]
        for way in WAYS:
            own = [row for row in rows if row["way"] == way and row["epoch"] in (0, epochs)]
            if own:
                trained = own[0]["epoch"] * results["images"] * (SIZES if way.startswith("one size") else 1)
                cells = [mean_and_range([row["top1"][part] for row in own]) for part in shares]
                lines.append(f"| {' | '.join([way, str(len(own)), *cells, f'{trained:,}'])} |")
        lines += ["", "| epochs until the mean is what `paper` ends with | " + " | ".join(shares) + " |"]
        lines.append("|---" * (len(shares) + 1) + "|")
        for way in sorted({row["way"] for row in rows} & {"best", "best, no labels"}):
            cells = [_reached(rows, way, part, epochs) for part in shares]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).strip()


def shares_of(rows: list[dict[str, Any]]) -> list[str]:
    """The shares of the MACs; rows of `paper` have fewer while its table grows."""
    return max((list(row["top1"]) for row in rows), key=len)


def curve(rows: list[dict[str, Any]], way: str, part: str) -> dict[int, float]:
    """epoch -> mean top-1 over the seeds."""
    own = [row for row in rows if row["way"] == way and part in row["top1"]]
    return {
        epoch: statistics.mean(row["top1"][part] for row in own if row["epoch"] == epoch)
        for epoch in sorted({row["epoch"] for row in own})
    }


def _reached(rows: list[dict[str, Any]], way: str, part: str, epochs: int) -> str:
    """The first measured epoch at which a way is as good as `paper` at the end."""
    paper = curve(rows, "paper", part).get(epochs, float("inf"))
    points = curve(rows, "untrained", part) | curve(rows, way, part)
    return str(next((epoch for epoch, top1 in points.items() if top1 >= paper), "never"))


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME", help="default: all")
    shares = [1 / 12, 1 / 8, 1 / 4, 1.0]
    parser.add_argument("--shares", nargs="+", type=share, default=shares, metavar="X", help="of the MACs")
    parser.add_argument("--points", type=positive, default=10, metavar="N", help="of a curve (default: %(default)s)")
    parser.add_argument("--lr", type=decimal, required=True, metavar="X", help="learning rate of the paper's recipe")
    parser.add_argument("--teacher-lr", type=decimal, metavar="X", help="learning rate with a teacher (default: --lr)")
    parser.add_argument("--alpha", type=decimal, default=0.75, metavar="X", help="the teacher's share of the loss")
    parser.add_argument("--tokens", type=decimal, default=0.0, metavar="X", help="weight of the teacher's tokens")
    args, flags = parse_training_arguments(parser)
    args.teacher_lr = args.teacher_lr or args.lr
    return args, flags


def main() -> None:
    args, flags = parse_arguments()
    study = Study(args, flags)
    for seed in progress_bar(args.draws, "seeds"):
        for way in args.ways:
            study.run(way, seed)
    study.results.log()
    print(markdown(study.results.content))
    rows = study.results.rows("rows", epochs=args.epochs)
    lines = {part: {way: curve(rows, way, part) for way in WAYS if curve(rows, way, part)} for part in shares_of(rows)}
    plot_curves(lines, len(study.images), study.results.path.with_suffix(".png"))
    print(json.dumps({"file": study.results.path.name, "rows": len(study.results.rows("rows"))}))


if __name__ == "__main__":
    run_program(main)
