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
import time
from dataclasses import replace
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torch.nn import functional as F

import supernet
from arguments import Parser, share
from benchmarks.common import describe_machine
from datasets import TrainLoader, eval_loader, open_splits, proxy_set
from main_arguments import parse_main_arguments
from main_training import augmentation, start_training
from models.backbone import Backbone
from models.elastic import make_elastic, make_plain, set_widths
from piad.distillation import BlockTokens, divergence, mean_distance
from studies.choices import RECIPES, Codes, Recipe
from studies.common import (
    Results,
    facts_of,
    mean_and_range,
    model_and_data_flags,
    parse_training_arguments,
    refuse_flags,
    run_entry_point,
)
from supernet import Network
from supernet.contraction import contract_network
from training import Training
from utils import UserError, init_processes, progress_bar, run_program, seed_everything

# Flags of main.py that its training does not follow, and their defaults; a recipe stands for some of them.
NOT_FOLLOWED: dict[str, Any] = {"clip_grad": None, "grad_accum_steps": 1, "grad_checkpointing": False, "compile": None}
NOT_FOLLOWED |= {"sched_on_updates": False, "warmup_epochs": 0, "channels_last": False, "distillation_type": "none"}
NOT_FOLLOWED |= {"sizes_per_step": 1, "op_code_sampling": "uniform", "freeze_embedding": False, "regime": "piad"}


class Study:
    """Trains and measures recipes, one after another.

    settings: what the flags say to main.py, of which a recipe changes some.
    """

    def __init__(self, args: argparse.Namespace, flags: list[str]):
        self.args, self.device = args, init_processes(args)
        words = [*model_and_data_flags(args), "--epochs", args.epochs, *flags]
        self.settings = run_entry_point(parse_main_arguments, *words)
        refuse_flags(self.settings, NOT_FOLLOWED)
        if self.settings.amp == torch.float16:
            raise UserError("--amp float16 needs a gradient scaler, which this study does not have: give bfloat16")
        self.images, val = open_splits(args.data_set, args.data_path, index=args.index)
        self.start = self.open(compensated=False)
        self.teacher = self.start.model.eval().requires_grad_(False)
        self.teacher_blocks = BlockTokens(self.teacher)
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
        self.blocks = BlockTokens(model)
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
        if recipe.tokens:
            self.tokens(images)
            expected_blocks = self.teacher_blocks.take()
        training.optimizer.zero_grad()
        for widths in drawn:
            set_widths(training.model, widths)
            with training.autocast():
                loss = self.loss(training, recipe, images, targets, expected)
                if recipe.tokens:
                    loss = loss + recipe.tokens * mean_distance(self.blocks.take(), expected_blocks, expected_blocks)
            (loss / len(drawn)).backward()
        training.optimizer.step()

    def loss(self, training: Training, recipe: Recipe, images: Tensor, targets: Tensor, expected: Tensor) -> Tensor:
        """Of images (B, C, height, width) and targets (B,); expected: the teacher's tokens (B, N, D)."""
        tokens = training.model.forward_features(images)
        logits = training.model.forward_head(tokens)
        loss = recipe.alpha * distance(recipe, tokens, logits, expected, self.teacher.forward_head(expected))
        if recipe.alpha < 1:
            loss = loss + (1 - recipe.alpha) * training.loss_fn(logits, targets)
        return loss

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
    kl = divergence(logits, expected_logits, recipe.tau)
    return kl if recipe.distance == "kl" else kl + F.mse_loss(tokens, expected) / expected.var()


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
    cells = [mean_and_range([run["top1"][part] for run in runs]) for part in shares]
    return f"| {' | '.join([name, str(len(runs)) if seeds is None else seeds, *cells, f'{kl:.4f}'])} |"


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
