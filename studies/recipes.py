"""Compares recipes for training a super-network: same start, same compute, one thing changed at a time.

    python -m studies.recipes --name digits --checkpoint FOLDER --epochs N ... -- FLAGS

FOLDER is what reparam.py --method best --mask-table wrote. The whole network as it is there, frozen, is the teacher.
Each run trains it by one of RECIPES and measures top-1 (percent) and the KL divergence from the whole network (nats),
of the raw and of the averaged weights, at --shares of the MACs, without fine-tuning. With --no-labels the teacher alone
trains. FLAGS are those of main.py (augmentation, learning rate). Writes docs/results/recipes_NAME.json after each run
and skips runs that are already there.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torch.nn import functional as F

import supernet
from arguments import Parser, share
from benchmarks.common import describe_machine
from datasets import TrainLoader, eval_loader, open_splits, proxy_set
from main import augmentation, start_training
from main_arguments import parse_main_arguments
from models.backbone import Backbone
from models.elastic import make_elastic, make_plain, set_widths
from models.macs import count_macs
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout
from piad.sampling import generator_of
from studies.common import Results, facts_of, model_and_data_flags, parse_training_arguments
from supernet import Network
from supernet.contraction import contract_network
from training import Training
from utils import init_processes, progress_bar, run_program, seed_everything


@dataclass(frozen=True)
class Recipe:
    """How a super-network is trained.

    alpha: share of the teacher in the loss, the rest is that of the labels.  tau: temperature of the teacher.
    distance: from the teacher, "kl", "squared" (error of the logits), or "features" (KL divergence, and the squared
    error of the tokens after the last norm).  compensated: sub-networks are compensated in training.
    law: of the op codes, "log" (uniform in the logarithm of the MACs) or "uniform".
    sandwich: each step trains the whole network, the smallest, and one between; there are fewer steps, so that the MACs
    are the same.  table: "best", the one of the start, or "piad", made from its importance.  growing: the first half of
    the epochs opens the table bit by bit.  lr: times that of the flags.  passes: the network is contracted and
    compensated again between them.  freeze: parameters whose names contain one of these words do not move.
    weight_decay, ema_decay, mixup, smoothing: as in main.py; None is what the flags say.
    """

    alpha: float = 0.5
    tau: float = 1.0
    distance: str = "kl"
    compensated: bool = True
    law: str = "log"
    sandwich: bool = False
    table: str = "best"
    growing: bool = False
    lr: float = 1.0
    passes: int = 1
    freeze: tuple[str, ...] = ()
    weight_decay: float | None = None
    ema_decay: float | None = None
    mixup: float | None = None
    smoothing: float | None = None


ENDS = ("patch_embed", "pos_embed", "cls_token", "norm", "head")
BASE = Recipe()
RECIPES = {
    "base": BASE,
    "labels alone": replace(BASE, alpha=0.0),
    "alpha 0.75": replace(BASE, alpha=0.75),
    "alpha 0.9": replace(BASE, alpha=0.9),
    "tau 2": replace(BASE, tau=2.0),
    "squared error of the logits": replace(BASE, distance="squared"),
    "with the features": replace(BASE, distance="features"),
    "cut": replace(BASE, compensated=False),
    "uniform op codes": replace(BASE, law="uniform"),
    "three sizes per step": replace(BASE, sandwich=True),
    "growing table": replace(BASE, growing=True),
    "PIAD's table": replace(BASE, table="piad"),
    "PIAD's table, growing": replace(BASE, table="piad", growing=True),
    "learning rate / 4": replace(BASE, lr=0.25),
    "learning rate / 2": replace(BASE, lr=0.5),
    "learning rate * 2": replace(BASE, lr=2.0),
    "learning rate * 4": replace(BASE, lr=4.0),
    "weight decay 0": replace(BASE, weight_decay=0.0),
    "averaging 0.9": replace(BASE, ema_decay=0.9),
    "averaging 0.998": replace(BASE, ema_decay=0.998),
    "ends frozen": replace(BASE, freeze=ENDS),
    "Mixup 0.2": replace(BASE, mixup=0.2),
    "no smoothing": replace(BASE, smoothing=0.0),
    "two passes": replace(BASE, passes=2),
    "learning rate * 2, Mixup 0.2": replace(BASE, lr=2.0, mixup=0.2),
    "learning rate * 2, alpha 0.75": replace(BASE, lr=2.0, alpha=0.75),
    "learning rate * 2, features": replace(BASE, lr=2.0, distance="features"),
}


class Study:
    """Trains and measures recipes, one after another.

    settings: what the flags say to main.py, of which a recipe changes some.
    """

    def __init__(self, args: argparse.Namespace, flags: list[str]):
        self.args, self.device = args, init_processes(args)
        words = [*model_and_data_flags(args), "--epochs", args.epochs, *flags]
        with mock.patch.object(sys, "argv", [sys.argv[0], *map(str, words)]):
            self.settings = parse_main_arguments()
        self.images, val = open_splits(args.data_set, args.data_path, index=args.index)
        self.start = self.open(compensated=False)
        self.teacher = self.start.model.eval().requires_grad_(False)
        loader = eval_loader(val, self.start.preprocessing, batch_size=500, workers=args.workers)
        self.val = [(x.to(self.device), y.to(self.device)) for x, y in loader]
        self.expected = [logits_of(self.teacher, images) for images, _ in self.val]
        path = args.output_dir / f"recipes_{args.name}.json"
        self.results = Results(path, **facts_of(self.start), flags=flags, machine=describe_machine(self.device))
        self.kept: dict[int, list[list[tuple[Tensor, ...]]]] = {}

    def open(self, compensated: bool) -> Network:
        """The network that training starts from."""
        network = supernet.load(self.args.checkpoint, compensate=compensated)
        network.model.to(self.device)
        return network

    def untrained(self) -> None:
        """Measures the start, unless it is there."""
        if not self.results.rows("untrained"):
            network = self.open(compensated=True)
            self.results.add("untrained", self.measure(network, make_elastic(network.model)))

    def run(self, name: str, recipe: Recipe, seed: int) -> None:
        """Trains and measures a recipe, unless it has a result."""
        key = {"recipe": name, "labels": recipe.alpha < 1, "seed": seed, "epochs": self.args.epochs}
        if self.results.rows("rows", **key):
            return
        start, network, settings = time.perf_counter(), self.open(recipe.compensated), self.settings_of(recipe)
        step, averaged, last = 0, network.model, self.args.epochs * (len(self.epoch(seed, 0)) or 1)
        for part in range(recipe.passes):
            if part:
                network.model = averaged.eval()
                make_plain(averaged)
                contract_network(network, self.proxy(seed), method="best", dropout_ratio=self.args.dropout_ratio)
            averaged = self.train(network, recipe, settings, seed, range(step, last * (part + 1) // recipe.passes))
            step = last * (part + 1) // recipe.passes
        found = {"raw": self.measure(network, network.model), "averaged": self.measure(network, averaged)}
        self.results.add("rows", {**key, **found, "seconds": round(time.perf_counter() - start)})

    def settings_of(self, recipe: Recipe) -> argparse.Namespace:
        changes = {key: getattr(recipe, key) for key in ("weight_decay", "ema_decay", "mixup", "smoothing")}
        changes = {key: value for key, value in changes.items() if value is not None}
        return argparse.Namespace(**{**vars(self.settings), **changes, "lr": recipe.lr * self.settings.lr})

    def proxy(self, seed: int) -> Any:
        images = proxy_set(self.images, self.args.proxy_samples, seed)
        loading = {"batch_size": self.args.batch_size, "workers": self.args.workers}
        return eval_loader(images, self.start.preprocessing, **loading)

    def epoch(self, seed: int, epoch: int) -> list[tuple[Tensor, ...]]:
        """Images, targets and the teacher's tokens of an epoch, the same for every recipe, kept for one seed."""
        if seed not in self.kept:
            loading = {"batch_size": self.args.batch_size, "workers": self.args.workers, "seed": seed}
            self.loader = TrainLoader(self.images, self.start.preprocessing, augmentation(self.settings), **loading)
            self.kept = {seed: []}
        while len(self.kept[seed]) <= epoch:
            batches = self.loader.batches(len(self.kept[seed]))
            self.kept[seed].append([(x.to(self.device), y.to(self.device), self.tokens(x)) for x, y in batches])
        return self.kept[seed][epoch]

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The teacher's tokens (B, N, D) after the last norm."""
        return self.teacher.forward_features(images.to(self.device))

    def train(
        self, network: Network, recipe: Recipe, settings: argparse.Namespace, seed: int, steps: range
    ) -> Backbone:
        """Trains the model of the network for these steps of the data, in place, and returns the averaged model."""
        model = make_elastic(network.model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(word in name for word in recipe.freeze))
        training = start_training(settings, model, self.images.num_classes, self.device)
        per_epoch, updates = len(self.epoch(seed, 0)), 0
        epochs = len(steps) / per_epoch
        scheduler, _ = create_scheduler_v2(
            training.optimizer, num_epochs=max(1, round(epochs)), min_lr=settings.min_lr, warmup_epochs=0
        )
        codes = Codes(network, recipe, self.proxy(seed), epochs, self.args.dropout_ratio, seed)
        model.train()
        for step in progress_bar(steps, "training"):
            epoch, done = (step - steps.start) // per_epoch, step - steps.start
            if done % per_epoch == 0:
                scheduler.step(epoch)
                codes.begin_epoch(epoch)
            drawn = codes.draw(step)
            if not drawn:  # the MACs of this step have been used already
                continue
            seed_everything(seed, step)
            self.update(training, recipe, self.epoch(seed, step // per_epoch)[step % per_epoch], drawn)
            updates += 1
            if training.ema is not None:
                training.ema.update(model, updates)
        network.table = codes.table
        return training.ema.module if training.ema is not None else copy.deepcopy(model)

    def update(
        self, training: Training, recipe: Recipe, batch: tuple[Tensor, ...], drawn: list[dict[str, int]]
    ) -> None:
        """One step of the optimizer, on the mean loss of the sub-networks of these widths."""
        images, targets, expected = batch
        if training.mixup is not None:
            images, targets = training.mixup(images.clone(), targets)  # it mixes in place
            expected = self.tokens(images)
        training.optimizer.zero_grad()
        for widths in drawn:
            set_widths(training.model, widths)
            tokens = training.model.forward_features(images)
            logits = training.model.forward_head(tokens)
            loss = recipe.alpha * distance(recipe, tokens, logits, expected, self.teacher.forward_head(expected))
            if recipe.alpha < 1:
                loss = loss + (1 - recipe.alpha) * training.loss_fn(logits, targets)
            (loss / len(drawn)).backward()
        training.optimizer.step()

    def measure(self, network: Network, model: Backbone) -> dict[str, dict[str, float]]:
        """top1 (percent) and kl (nats) of an elastic model, by share of the MACs."""
        found: dict[str, dict[str, float]] = {"top1": {}, "kl": {}}
        model.eval()
        for part in self.args.shares:
            set_widths(model, network.table.widths(network.select(max_macs=part * network.macs())))
            correct = kl = 0.0
            for (images, targets), expected in zip(self.val, self.expected, strict=True):
                logits = logits_of(model, images)
                correct += (logits.argmax(1) == targets).sum().item()
                kl += F.kl_div(logits.log_softmax(1), expected.log_softmax(1), reduction="sum", log_target=True).item()
            number = sum(len(targets) for _, targets in self.val)
            found["top1"][f"{part:.3g}"], found["kl"][f"{part:.3g}"] = 100 * correct / number, kl / number
        return found


@torch.inference_mode()
def logits_of(model: Backbone, images: Tensor) -> Tensor:
    """images (B, C, height, width) to logits (B, classes) in float64."""
    return model(images).double()


def distance(recipe: Recipe, tokens: Tensor, logits: Tensor, expected: Tensor, expected_logits: Tensor) -> Tensor:
    """From the teacher: tokens (B, N, D) after the last norm, and logits (B, classes)."""
    if recipe.distance == "squared":
        return F.mse_loss(logits, expected_logits) / expected_logits.var()
    soft, found = ((x / recipe.tau).log_softmax(1) for x in (expected_logits, logits))
    kl = recipe.tau**2 * F.kl_div(found, soft, reduction="batchmean", log_target=True)
    return kl if recipe.distance == "kl" else kl + F.mse_loss(tokens, expected) / expected.var()


class Codes:
    """The mask table of a run, and the sub-networks of each of its steps."""

    def __init__(self, network: Network, recipe: Recipe, proxy: Any, epochs: float, ratio: float, seed: int):
        self.network, self.recipe, self.seed, self.used = network, recipe, seed, 0.0
        self.opening = epochs / 2 if recipe.growing else 0
        self.piad = None
        self.set_table(network.table)
        if recipe.table == "piad":
            self.piad = ProgressiveDropout(
                network.model, proxy, ratio=ratio, epochs=max(1, int(self.opening)), seed=seed, table=None
            )
        self.smallest = self.shares[-1]

    def set_table(self, table: MaskTable) -> None:
        self.table = table
        full = count_macs(self.network.model)
        self.shares = np.array([count_macs(self.network.model, row) / full for row in table.rows])

    def begin_epoch(self, epoch: int) -> None:
        if self.piad is not None:
            self.piad.begin_epoch(epoch)
            if self.piad.table is not self.table:
                self.set_table(self.piad.table)
        opened = 0 if self.opening == 0 or self.piad else max(0, 1 - (epoch + 1) / self.opening)
        self.open = np.flatnonzero(self.shares >= self.smallest + opened * (1 - self.smallest))

    def draw(self, step: int) -> list[dict[str, int]]:
        """The widths that the step trains; none where a sandwich has used the MACs of the steps so far."""
        generator, shares = generator_of(self.seed, step, 0, 0), self.shares[self.open]
        code = int(generator.integers(len(shares)))
        if self.recipe.law == "log":
            share = np.exp(generator.uniform(np.log(shares[-1]), 0.0))
            code = int(np.abs(np.log(shares / share)).argmin())
        chosen = [code]
        if self.recipe.sandwich:
            self.used -= shares[code]  # what a step of one sub-network costs
            if self.used > 0:
                return []
            chosen = [0, code, len(shares) - 1]
            self.used += shares[chosen].sum()
        return [self.table.widths(code) for code in chosen]


def markdown(results: dict[str, Any]) -> str:
    """Tables with and without labels, by epochs: mean top-1 of the averaged weights, with its range over the seeds."""
    lines, start = [], results["untrained"][0]
    shares, order = list(start["top1"]), list(RECIPES)
    for labels, epochs in sorted({(row["labels"], row["epochs"]) for row in results["rows"]}, reverse=True):
        own = [row for row in results["rows"] if (row["labels"], row["epochs"]) == (labels, epochs)]
        head = f"{'labels and teacher' if labels else 'teacher alone'}, {epochs} epochs"
        lines.append(f"| {head} | seeds | {' | '.join(f'{part} of the MACs' for part in shares)} | mean KL, nats |")
        lines.append("|---" * (len(shares) + 3) + "|")
        lines.append(line("untrained", [start], shares, seeds=""))
        for name in sorted({row["recipe"] for row in own}, key=order.index):
            lines.append(line(name, [row["averaged"] for row in own if row["recipe"] == name], shares))
        lines.append("")
    return "\n".join(lines).strip()


def line(name: str, runs: list[dict[str, Any]], shares: list[str], seeds: str | None = None) -> str:
    """A line of a table; runs: what measure() returned of each seed."""
    kl = statistics.mean(value for run in runs for value in run["kl"].values())
    cells = [cell([run["top1"][part] for run in runs]) for part in shares]
    return f"| {' | '.join([name, str(len(runs)) if seeds is None else seeds, *cells, f'{kl:.4f}'])} |"


def cell(values: list[float]) -> str:
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME", help="default: all"
    )
    parser.add_argument("--no-labels", action="store_true", help="train with the teacher alone")
    parser.add_argument(
        "--shares", nargs="+", type=share, default=[1 / 12, 1 / 8, 1 / 4, 1.0], metavar="X", help="of the MACs"
    )
    return parse_training_arguments(parser)


def main() -> None:
    args, flags = parse_arguments()
    study = Study(args, flags)
    study.untrained()
    for seed in progress_bar(args.draws, "seeds"):
        for name in args.recipes:
            recipe = replace(RECIPES[name], alpha=1.0) if args.no_labels else RECIPES[name]
            study.run(name, recipe, seed)
    study.results.log()
    print(markdown(study.results.content))
    print(json.dumps({"file": study.results.path.name, "rows": len(study.results.rows("rows"))}))


if __name__ == "__main__":
    run_program(main)
