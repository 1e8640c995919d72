"""Study 2: what PIAD adds over other dropouts, and the choices inside it: the same backbone, the same number of steps.

    python -m studies.regimes --name vit_cifar10 --data-path DIR --checkpoint FILE --epochs N ...

A row is main.py's PIAD stage under a --regime, from the weights as they are or as reparam.py contracted them; or PIAD
with one choice made otherwise. Top-1 (percent) of the averaged weights at SHARES of the MACs, not fine-tuned. What
main.py is to have besides the study's own flags (augmentation, learning rate) follows a lone `--`. Writes
docs/results/regimes_NAME.json, a row as soon as it is there (what is there is not run again), and .png.
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
from arguments import data_overrides
from benchmarks.common import describe_machine
from datasets import eval_loader, open_splits, preprocessing
from engine import evaluate
from files import load_checkpoint
from models.backbone import modules_of
from models.extraction import extract
from models.loading import load_backbone
from models.macs import count_macs
from piad import dropout_list, importance
from piad.mask_table import MaskTable
from report.plots import plot_regimes
from studies.common import Results, call, model_and_data_flags, parse_training_arguments
from utils import init_processes, progress_bar, run_program

SHARES = {"2:12": 2 / 12, "4:12": 4 / 12, "6:12": 6 / 12, "8:12": 8 / 12, "12:12": 1.0}
# The paper's, of DeiT-S on ImageNet: top-1 in % at 4:12 and at 8:12.
PAPER = {
    "none": (1.2, 39.1),
    "channel": (7.3, 34.4),
    "weighted-channel": (34.2, 64.7),
    "layer": (39.7, 68.6),
    "piad": (70.6, 78.2),
}


@dataclass(frozen=True)
class Row:
    """weights: "original" or "contracted".  choice: what of PIAD is otherwise, a key of CHOICES."""

    regime: str
    weights: str = "contracted"
    choice: str = ""


@contextlib.contextmanager
def all_at_once() -> Iterator[list[str]]:
    """The whole list at the start of the first epoch."""
    yield ["--progressive-epochs", "1"]


@contextlib.contextmanager
def by_accuracy() -> Iterator[list[str]]:
    """Sensitivity is the loss of accuracy, as in the authors' code, not the rise of the cross-entropy.

    A module's rise of the number of errors is its loss of right answers, and what it is divided by is the same for all.
    """

    def errors(model: Any, x: Any, targets: Any) -> Any:
        return (importance.classify(model, x).argmax(1) != targets).sum().double()

    with mock.patch.object(importance, "_cross_entropy", errors):
        yield []


@contextlib.contextmanager
def without_gamma() -> Iterator[list[str]]:
    """All modules are as sensitive as each other."""

    def even(model: Any, _batches: Any) -> importance.Sensitivity:
        return importance.Sensitivity(0.0, dict.fromkeys(modules_of(model), 1.0), 0)

    with mock.patch.object(importance, "module_sensitivity", even):
        yield []


@contextlib.contextmanager
def units(attn: int, mlp: int) -> Iterator[list[str]]:
    """So many units in a module, for 8 and 32."""
    with mock.patch.dict(dropout_list.UNITS, {"attn": attn, "mlp": mlp}):
        yield []


UNIT_NUMBERS = ((4, 16), (16, 64))
CHOICES: dict[str, Any] = {
    "": contextlib.nullcontext,
    "all at once": all_at_once,
    "sensitivity by accuracy": by_accuracy,
    "without gamma": without_gamma,
    **{f"{attn} and {mlp} units": functools.partial(units, attn, mlp) for attn, mlp in UNIT_NUMBERS},
}
ROWS = [
    *(Row(regime, weights) for weights in ("contracted", "original") for regime in PAPER),
    *(Row("piad", choice=choice) for choice in CHOICES if choice),
]


class Study:
    """The rows, one after another, in a temporary folder."""

    def __init__(self, args: argparse.Namespace, flags: list[str]):
        self.args, self.flags, self.device = args, flags, init_processes(args)
        path = args.output_dir / f"regimes_{args.name}.json"
        facts = {"model": args.model, "model_kwargs": args.model_kwargs, "checkpoint": args.checkpoint.name}
        self.results = Results(path, **facts, flags=flags, machine=describe_machine(self.device))
        images, self.val = open_splits(args.data_set, args.data_path)
        self.base = load_backbone(
            args.model, args.model_kwargs, num_classes=images.num_classes, checkpoint=args.checkpoint
        )
        self.common = model_and_data_flags(args)

    def measure(self, row: Row, seed: int) -> None:
        args = self.args
        key = {**vars(row), "seed": seed, "epochs": args.epochs}
        if self.results.rows("rows", **key) or not self.divides(row.choice):
            return
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, CHOICES[row.choice]() as flags:
            weights, output = args.checkpoint, Path(folder) / "trained"
            if row.weights == "contracted":
                call(reparam.main, *self.common, "--seed", seed, "--no-eval", "--checkpoint", weights,
                     "--output-dir", folder)  # fmt: skip
                weights = Path(folder) / "contracted.safetensors"
            call(program.main, *self.common, "--stage", "piad", "--regime", row.regime, "--epochs", args.epochs,
                 "--progressive-epochs", max(1, args.epochs // 2), "--eval-every", args.epochs, "--seed", seed,
                 "--dropout-ratio", args.dropout_ratio, *self.flags, *(flags or []),
                 "--checkpoint", weights, "--output-dir", output)  # fmt: skip
            top1 = self.accuracies(load_checkpoint(output / f"checkpoint_{args.epochs - 1}.pth"))
        self.results.add("rows", {**key, "top1": top1, "seconds": time.perf_counter() - start})

    def divides(self, choice: str) -> bool:
        """Whether the modules divide into the units that the choice has."""
        units_of = {f"{attn} and {mlp} units": {"attn": attn, "mlp": mlp} for attn, mlp in UNIT_NUMBERS}
        modules = modules_of(self.base).values()
        return choice not in units_of or all(m.width % units_of[choice][m.kind] == 0 for m in modules)

    def accuracies(self, state: dict[str, Any]) -> dict[str, float]:
        """Top-1, percent, of the averaged weights at SHARES; of the smallest network where the table ends before."""
        self.base.load_state_dict(state["model_ema"])
        table, whole = MaskTable.from_json(state["mask_table"]), count_macs(self.base)
        config = preprocessing(self.base, data_overrides(self.args))
        val = eval_loader(self.val, config, batch_size=256, workers=self.args.workers)
        smallest, found = count_macs(self.base, table.widths(-1)), {}
        for name, part in SHARES.items():
            code = table.select(self.base, max_macs=max(part * whole, smallest))
            small = extract(self.base, table.widths(code)).to(self.device)
            found[name] = evaluate(small, val, self.device)["top1"]
        return found


def markdown(results: dict[str, Any]) -> str:
    """Regimes, then PIAD's choices: mean top-1 over the seeds (least to most) at each of SHARES."""
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
            cells = [*label, str(len(same)), str(epochs), *(_cell([r["top1"][name] for r in same]) for name in SHARES)]
            cells += [] if chosen else ["{} / {}".format(*PAPER[row.regime]) if row.weights == "contracted" else ""]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).strip()


def row_of(result: dict[str, Any]) -> Row:
    return Row(result["regime"], result["weights"], result["choice"])


def _cell(values: list[float]) -> str:
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("regimes", "choices")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, metavar="NAME", help="(default: both)")
    parser.add_argument(
        "--regimes", nargs="+", choices=PAPER, default=list(PAPER), metavar="NAME", help="(default: all)"
    )
    parser.add_argument(
        "--weights", nargs="+", default=["contracted", "original"], metavar="NAME", help="(default: both)"
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
