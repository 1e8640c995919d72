"""Compares ways to get models of several sizes from one, with the same data, checkpoint, sizes and training budget.

    python -m studies.alternatives --name vit_cifar10 --data-path DIR --checkpoint FILE --epochs N ...

Measures top-1 (percent) at SHARES of the MACs for each of WAYS:
    skd             sub-networks of a super-network that was trained for N epochs
    best            sub-networks contracted by reparam.py --method best, without training
    alone           a narrower model of each size, trained from scratch for N epochs
    Torch-Pruning   its recipe for ViTs: Taylor importance, the same pruning ratio in every layer
All but `alone` are also measured after fine-tuning each size for N/10 epochs. Further flags for main.py follow a `--`.
Writes docs/results/alternatives_NAME.json after each result, skips results that are already there, and draws a .png
beside it. Needs torch-pruning (requirements-studies.txt).
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from timm.models.vision_transformer import VisionTransformer

import main as program
import reparam
import supernet
from arguments import Parser, decimal, open_network
from benchmarks.common import describe_machine
from datasets import eval_loader, open_splits, proxy_set
from engine import evaluate
from files import load_checkpoint
from models.backbone import create_backbone, full_widths
from models.macs import count_macs
from piad.mask_table import MaskTable
from studies.common import (
    Results,
    facts_of,
    mean_and_range,
    model_and_data_flags,
    parse_training_arguments,
    run_entry_point,
)
from studies.dependency_pruning import prune
from studies.plots import plot_alternatives
from supernet import Network
from utils import UserError, init_processes, progress_bar, run_program

SHARES = {"4:12": 4 / 12, "6:12": 6 / 12, "8:12": 8 / 12}
FINETUNED = ", fine-tuned"
WAYS = ("skd", "skd" + FINETUNED, "best", "best" + FINETUNED, "alone", "Torch-Pruning", "Torch-Pruning" + FINETUNED)
SIZES = 12  # the number of sizes whose total training cost is reported


class Study:
    """Measures the ways one after another; main.py does the training."""

    def __init__(self, args: argparse.Namespace, flags: list[str]):
        self.args, self.flags, self.device = args, flags, init_processes(args)
        path = args.output_dir / f"alternatives_{args.name}.json"
        self.images, self.val = open_splits(args.data_set, args.data_path, index=args.index)
        self.network = open_network(args, self.images.num_classes, plain_weights=True)
        self.base, self.config = self.network.model, self.network.preprocessing
        self.results = Results(path, **facts_of(self.network), flags=flags, machine=describe_machine(self.device))
        self.common = model_and_data_flags(args)
        self.finetune_epochs = max(1, args.epochs // 10)
        self.folder = Path(tempfile.mkdtemp(prefix="alternatives"))

    def run_seed(self, seed: int) -> None:
        """Measures all ways that have no results for this seed."""
        missing = [way for way in WAYS if not self.known(way, seed)]
        if {"skd", "skd" + FINETUNED} & set(missing):
            self.super_network(seed)
        for way, cut in (("best", self.best), ("Torch-Pruning", self.torch_pruning)):
            if {way, way + FINETUNED} & set(missing):
                self.cut_and_finetune(way, cut(seed), seed)
        if "alone" in missing:
            for size in SHARES:
                model = narrower(self.network, SHARES[size])
                trained = self.train(model, seed, self.args.epochs, "pretrain", self.args.lr)
                self.add("alone", size, seed, trained, each=self.args.epochs)

    def known(self, way: str, seed: int) -> bool:
        """Whether all sizes of the way have results."""
        return len(self.results.rows("rows", way=way, seed=seed, epochs=self.args.epochs)) == len(SHARES)

    def add(self, way: str, size: str, seed: int, model: VisionTransformer, once: int = 0, each: int = 0) -> None:
        """Measures a model and adds its row, unless there is one.

        once: epochs of training that all sizes share.  each: further epochs for this size.
        """
        key = {"way": way, "size": size, "seed": seed, "epochs": self.args.epochs}
        if not self.results.rows("rows", **key):
            macs, cost = count_macs(model), {"once": once * len(self.images), "each": each * len(self.images)}
            self.results.add("rows", {**key, "macs": macs, "top1": self.top1(model), **cost})

    def top1(self, model: VisionTransformer) -> float:
        val = eval_loader(self.val, self.config, batch_size=256, workers=self.args.workers)
        return evaluate(model.to(self.device).eval(), val, self.device)["top1"]

    # -----------------------------------------------------------------------------------------------------------------
    # One method for each way

    def super_network(self, seed: int) -> None:
        """The way "skd", and fine-tuned."""
        output, epochs = self.folder / f"piad{seed}", self.args.epochs
        contracted = self.contract("paper", seed)
        run_entry_point(
            program.main, *self.common, "--stage", "piad", "--epochs", epochs, "--seed", seed, "--lr", self.args.lr,
            "--progressive-epochs", max(1, epochs // 2), "--eval-every", epochs, *self.flags,
            "--dropout-ratio", self.args.dropout_ratio, "--checkpoint", contracted / "contracted.safetensors",
            "--resume", "auto", "--output-dir", output,
        )  # fmt: skip
        checkpoint = output / f"checkpoint_{epochs - 1}.pth"
        network = supernet.load(checkpoint, use_ema="model_ema" in load_checkpoint(checkpoint))
        self.cut_and_finetune("skd", sizes_of(network), seed, once=epochs)

    def contract(self, method: str, seed: int) -> Path:
        """Runs reparam.py and returns its output folder; with "best", it writes a mask table as well."""
        output = self.folder / f"{method}{seed}"
        more = ["--mask-table", "--dropout-ratio", self.args.dropout_ratio] if method == "best" else []
        run_entry_point(
            reparam.main, *self.common, "--method", method, *more, "--seed", seed, "--no-eval",
            "--checkpoint", self.args.checkpoint, "--output-dir", output,
        )  # fmt: skip
        return output

    def best(self, seed: int) -> dict[str, VisionTransformer]:
        """size -> sub-network, contracted and compensated without training."""
        return sizes_of(supernet.load(self.contract("best", seed)))

    def torch_pruning(self, seed: int) -> dict[str, VisionTransformer]:
        """size -> model pruned by Torch-Pruning; seed: of the proxy set."""
        loader = eval_loader(
            proxy_set(self.images, self.args.proxy_samples, seed),
            self.config,
            batch_size=self.args.batch_size,
            workers=self.args.workers,
        )
        cut = partial(prune, self.base.to(self.device), [(x.to(self.device), y.to(self.device)) for x, y in loader])
        return {size: cut(part * count_macs(self.base)) for size, part in SHARES.items()}

    def cut_and_finetune(self, way: str, sizes: dict[str, VisionTransformer], seed: int, once: int = 0) -> None:
        """Measures the sizes of a way as they are, then fine-tuned."""
        for size, model in sizes.items():
            self.add(way, size, seed, model, once=once)
            if not self.results.rows("rows", way=way + FINETUNED, size=size, seed=seed, epochs=self.args.epochs):
                trained = self.train(model, seed, self.finetune_epochs, "finetune", self.args.lr / 10)
                self.add(way + FINETUNED, size, seed, trained, once=once, each=self.finetune_epochs)

    def train(self, model: VisionTransformer, seed: int, epochs: int, recipe: str, lr: float) -> VisionTransformer:
        """A copy of the model, trained by main.py as a plain model.

        recipe: "pretrain", with warm-up epochs, or "finetune", without warm-up and averaging of weights.
        """
        model = copy.deepcopy(model).cpu()
        start = replace(self.network, model=model, table=MaskTable([full_widths(model)]))
        warmup = ["--warmup-epochs", epochs // 10 if recipe == "pretrain" else 0]
        with (
            tempfile.TemporaryDirectory() as output,
            mock.patch.object(program, "open_start", lambda *_: start),
        ):
            run_entry_point(
                program.main, *self.common, "--stage", "pretrain", "--epochs", epochs, "--seed", seed, "--lr", lr,
                *warmup, "--eval-every", epochs, *self.flags, *(["--ema-decay", 0] if recipe == "finetune" else []),
                "--output-dir", output,
            )  # fmt: skip
            state = load_checkpoint(Path(output) / f"checkpoint_{epochs - 1}.pth")
        model.load_state_dict(state["model_ema"] if "model_ema" in state else state["model"])
        return model


def sizes_of(network: Network) -> dict[str, VisionTransformer]:
    """size -> the largest sub-network within that share of the MACs."""
    return {size: network.cut(network.select(max_macs=part * network.macs())) for size, part in SHARES.items()}


def narrower(network: Network, part: float) -> VisionTransformer:
    """A new model with the same depth and number of heads, and the largest embedding within a share of the MACs."""
    base, kwargs = network.model, {**network.model_kwargs, "num_classes": network.model.num_classes}
    heads, limit = base.blocks[0].attn.num_heads, part * count_macs(base)
    for width in range(base.embed_dim, 0, -heads):
        model = create_backbone(network.name, **{**kwargs, "embed_dim": width})
        if count_macs(model) <= limit:
            return model
    raise UserError(f"no narrower model has {limit:g} MACs")


def markdown(results: dict[str, Any]) -> str:
    """A table with one line per way: mean top-1 over the seeds (with its range), and training cost of SIZES sizes."""
    head = ["way", "seeds", "epochs", *SHARES, f"images trained on for {SIZES} sizes"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for epochs in sorted({row["epochs"] for row in results["rows"]}):
        for way in WAYS:
            own = [row for row in results["rows"] if (row["way"], row["epochs"]) == (way, epochs)]
            if own:
                values = [[row["top1"] for row in own if row["size"] == size] for size in SHARES]
                cells = [way, str(len({row["seed"] for row in own})), str(epochs), *map(mean_and_range, values)]
                cells.append(f"{cost_of(own):,}")
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost_of(rows: list[dict[str, Any]]) -> int:
    """Number of images trained on to get SIZES sizes; rows: of one way."""
    return max((row["once"] + SIZES * row["each"] for row in rows), default=0)


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws the top-1 and the training cost of all ways."""
    costs = {way: cost_of([row for row in rows if row["way"] == way]) for way in WAYS}
    plot_alternatives(rows, WAYS, costs, path, title)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lr",
        type=decimal,
        required=True,
        metavar="X",
        help="learning rate of training; fine-tuning uses a tenth of it",
    )
    return parse_training_arguments(parser)


def main() -> None:
    args, flags = parse_arguments()
    study = Study(args, flags)
    for seed in progress_bar(args.draws, "seeds"):
        study.run_seed(seed)
    study.results.log()
    print(markdown(study.results.content))
    draw(
        study.results.rows("rows"),
        study.results.path.with_suffix(".png"),
        f"{args.name.replace('_', ' ')}: ways to sizes",
    )
    print(json.dumps({"file": study.results.path.name, "rows": len(study.results.rows("rows"))}))


if __name__ == "__main__":
    run_program(main)
