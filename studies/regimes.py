"""Compares PIAD with other dropout regimes, and with variants of itself: same backbone, same number of steps.

    python -m studies.regimes --name vit_cifar10 --data-path DIR --checkpoint FILE --epochs N ...

Each run is the PIAD stage of main.py under a --regime, from the original weights or from those that reparam.py
contracted; or PIAD with one of CHOICES changed. Measures top-1 (percent) of the averaged weights at SHARES of the MACs,
without fine-tuning. Further flags for main.py (augmentation, learning rate) follow a `--`. Writes
docs/results/regimes_NAME.json after each run, skips runs that are already there, and draws a .png beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import main as program
import reparam
import supernet
from arguments import Parser, open_network
from benchmarks.common import describe_machine
from datasets import eval_loader, open_splits
from engine import evaluate
from models.backbone import modules_of
from piad import dropout_list, importance
from studies.common import (
    Results,
    facts_of,
    mean_and_range,
    model_and_data_flags,
    parse_training_arguments,
    run_entry_point,
)
from studies.plots import plot_regimes
from utils import init_processes, progress_bar, run_program

SHARES = {"2:12": 2 / 12, "4:12": 4 / 12, "6:12": 6 / 12, "8:12": 8 / 12, "12:12": 1.0}
# Results of the paper for DeiT-S on ImageNet: top-1 in % at 4:12 and at 8:12.
PAPER = {
    "none": (1.2, 39.1),
    "channel": (7.3, 34.4),
    "weighted-channel": (34.2, 64.7),
    "layer": (39.7, 68.6),
    "piad": (70.6, 78.2),
}


@dataclass(frozen=True)
class Row:
    """One run.

    regime: a --regime of main.py.  weights: "original" or "contracted".  choice: the change to PIAD, a key of CHOICES.
    """

    regime: str
    weights: str = "contracted"
    choice: str = ""


@contextlib.contextmanager
def all_at_once() -> Iterator[list[str]]:
    """The dropout list is complete at the start of the first epoch."""
    yield ["--progressive-epochs", "1"]


@contextlib.contextmanager
def by_accuracy() -> Iterator[list[str]]:
    """Module sensitivity is the loss of accuracy, as in the authors' code, instead of the rise of the cross-entropy.

    The rise of the number of errors equals the loss of correct answers, and the divisor is the same for all modules.
    """

    def errors(model: Any, x: Any, targets: Any) -> Any:
        return (importance.classify(model, x).argmax(1) != targets).sum().double()

    with mock.patch.object(importance, "_cross_entropy", errors):
        yield []


@contextlib.contextmanager
def without_sensitivity() -> Iterator[list[str]]:
    """All modules have the same sensitivity."""

    def equal(model: Any, _batches: Any) -> importance.Sensitivity:
        return importance.Sensitivity(0.0, dict.fromkeys(modules_of(model), 1.0), 0)

    with mock.patch.object(importance, "module_sensitivity", equal):
        yield []


@contextlib.contextmanager
def number_of_units(attn: int, mlp: int) -> Iterator[list[str]]:
    """Other numbers of units per module than 8 and 32."""
    with mock.patch.dict(dropout_list.UNITS, {"attn": attn, "mlp": mlp}):
        yield []


UNIT_NUMBERS = ((4, 16), (16, 64))
# name -> context manager that makes the change and yields further flags for main.py.
CHOICES: dict[str, Any] = {
    "": contextlib.nullcontext,
    "all at once": all_at_once,
    "sensitivity by accuracy": by_accuracy,
    "without gamma": without_sensitivity,
    **{f"{attn} and {mlp} units": functools.partial(number_of_units, attn, mlp) for attn, mlp in UNIT_NUMBERS},
}
ROWS = [
    *(Row(regime, weights) for weights in ("contracted", "original") for regime in PAPER),
    *(Row("piad", choice=choice) for choice in CHOICES if choice),
]


class Study:
    """Runs and measures the rows one after another, in temporary folders."""

    def __init__(self, args: argparse.Namespace, flags: list[str]):
        self.args, self.flags, self.device = args, flags, init_processes(args)
        path = args.output_dir / f"regimes_{args.name}.json"
        images, self.val = open_splits(args.data_set, args.data_path, index=args.index)
        network = open_network(args, images.num_classes, plain_weights=True)
        self.base, self.config = network.model, network.preprocessing
        self.results = Results(path, **facts_of(network), flags=flags, machine=describe_machine(self.device))
        self.common = model_and_data_flags(args)

    def measure(self, row: Row, seed: int) -> None:
        """Trains and measures a row, unless it has a result or its units do not divide the widths."""
        args = self.args
        key = {**vars(row), "seed": seed, "epochs": args.epochs}
        if self.results.rows("rows", **key) or not self.divides(row.choice):
            return
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, CHOICES[row.choice]() as flags:
            weights, output = args.checkpoint, Path(folder) / "trained"
            if row.weights == "contracted":
                run_entry_point(reparam.main, *self.common, "--seed", seed, "--no-eval", "--checkpoint", weights,
                                "--output-dir", folder)  # fmt: skip
                weights = Path(folder) / "contracted.safetensors"
            run_entry_point(
                program.main, *self.common, "--stage", "piad", "--regime", row.regime, "--epochs", args.epochs,
                "--progressive-epochs", max(1, args.epochs // 2), "--eval-every", args.epochs, "--seed", seed,
                "--dropout-ratio", args.dropout_ratio, *self.flags, *(flags or []),
                "--checkpoint", weights, "--output-dir", output,
            )  # fmt: skip
            top1 = self.accuracies(supernet.load(output / f"checkpoint_{args.epochs - 1}.pth", use_ema=True))
        self.results.add("rows", {**key, "top1": top1, "seconds": time.perf_counter() - start})

    def divides(self, choice: str) -> bool:
        """Whether the number of units of the choice divides the width of every module."""
        numbers = {f"{attn} and {mlp} units": {"attn": attn, "mlp": mlp} for attn, mlp in UNIT_NUMBERS}
        modules = modules_of(self.base).values()
        return choice not in numbers or all(m.width % numbers[choice][m.kind] == 0 for m in modules)

    def accuracies(self, network: supernet.Network) -> dict[str, float]:
        """Top-1 (percent) at SHARES of the MACs; the smallest size is used for a share that it exceeds."""
        val, found = eval_loader(self.val, self.config, batch_size=256, workers=self.args.workers), {}
        for name, part in SHARES.items():
            code = network.select(max_macs=max(part * network.macs(), network.macs(-1)))
            found[name] = evaluate(network.cut(code).to(self.device), val, self.device)["top1"]
        return found


def markdown(results: dict[str, Any]) -> str:
    """Tables of the regimes and of the choices: mean top-1 over the seeds (with its range) at each of SHARES."""
    lines, rows = [], results["rows"]
    for head, chosen in (("regime", False), ("PIAD, but", True)):
        own = [row for row in rows if bool(row["choice"]) == chosen or (chosen and row_of(row) == Row("piad"))]
        if not own:
            continue
        names = [head, *([] if chosen else ["weights"]), "seeds", "epochs", *SHARES]
        names += [] if chosen else ["the paper's 4:12 / 8:12"]
        lines += ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
        order = [Row("piad"), *ROWS] if chosen else ROWS
        for epochs, row in sorted({(r["epochs"], row_of(r)) for r in own}, key=lambda g: (g[0], order.index(g[1]))):
            same = [r for r in own if row_of(r) == row and r["epochs"] == epochs]
            label = [row.choice or "as it is"] if chosen else [row.regime, row.weights]
            values = [[r["top1"][name] for r in same] for name in SHARES]
            cells = [*label, str(len(same)), str(epochs), *map(mean_and_range, values)]
            cells += [] if chosen else ["{} / {}".format(*PAPER[row.regime]) if row.weights == "contracted" else ""]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).strip()


def row_of(result: dict[str, Any]) -> Row:
    """The Row that a result is of."""
    return Row(result["regime"], result["weights"], result["choice"])


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("regimes", "choices")
    parser.add_argument(
        "--parts", nargs="+", choices=parts, default=parts, metavar="NAME", help="what to run (default: both)"
    )
    parser.add_argument(
        "--regimes", nargs="+", choices=PAPER, default=list(PAPER), metavar="NAME", help="regimes to run (default: all)"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["contracted", "original"],
        metavar="NAME",
        help="weights to start from (default: both)",
    )
    return parse_training_arguments(parser)


def main() -> None:
    args, flags = parse_arguments()
    study = Study(args, flags)
    for seed in progress_bar(args.draws, "seeds"):
        for row in ROWS:
            wanted = row.regime in args.regimes and row.weights in args.weights
            if wanted and ("choices" if row.choice else "regimes") in args.parts:
                study.measure(row, seed)
    study.results.log()
    print(markdown(study.results.content))
    means = {}
    for row in ROWS:
        own = [r["top1"] for r in study.results.rows("rows", **vars(row), epochs=args.epochs)]
        if own and not row.choice:
            means[row.regime, row.weights] = {s: statistics.mean(top1[s] for top1 in own) for s in SHARES}
    plot_regimes(means, PAPER, study.results.path.with_suffix(".png"), args.name.replace("_", " "))
    print(json.dumps({"file": study.results.path.name, "rows": len(study.results.rows("rows"))}))


if __name__ == "__main__":
    run_program(main)
