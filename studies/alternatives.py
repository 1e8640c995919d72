"""Study 3: would a user be better off otherwise? The same data, checkpoint, sizes and training budget for every way.

    python -m studies.alternatives --name vit_cifar10 --data-path DIR --checkpoint FILE --epochs N ...

At SHARES of the MACs, top-1 (percent) of: sub-networks of a super-network that was trained N epochs (`skd`), and after
N/10 epochs of fine-tuning each; sizes cut by reparam.py --method best, which trains nothing, and fine-tuned likewise;
a narrower model of that size trained alone from scratch for N epochs; Torch-Pruning's ViT recipe (Taylor importance,
all dims alike), before and after the same fine-tuning. What main.py is to have besides the study's own flags follows a
lone `--`. Writes docs/results/alternatives_NAME.json, a row as soon as it is there (what is there is not run again),
and .png. Needs torch-pruning (requirements-studies.txt).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from timm.models.vision_transformer import VisionTransformer

import main as program
import reparam
from arguments import data_overrides, decimal
from benchmarks.common import describe_machine
from datasets import eval_loader, open_splits, preprocessing, proxy_set
from engine import evaluate
from files import load_checkpoint
from models.backbone import create_backbone
from models.extraction import extract
from models.loading import load_backbone
from models.macs import count_macs
from models.taylor import COSTS
from piad.mask_table import MaskTable
from report.plots import plot_alternatives
from studies.common import Results, call, model_and_data_flags, parse_training_arguments
from utils import UserError, init_processes, progress_bar, run_program
from wpac.compensation import COMPENSATION, load_compensation

SHARES = {"4:12": 4 / 12, "6:12": 6 / 12, "8:12": 8 / 12}
FINETUNED = ", fine-tuned"
WAYS = ("skd", "skd" + FINETUNED, "best", "best" + FINETUNED, "alone", "Torch-Pruning", "Torch-Pruning" + FINETUNED)
SIZES = 12  # of which the total cost is shown


class Study:
    """The ways, one after another; what is trained is main.py's to train."""

    def __init__(self, args: argparse.Namespace, flags: list[str]):
        self.args, self.flags, self.device = args, flags, init_processes(args)
        path = args.output_dir / f"alternatives_{args.name}.json"
        facts = {"model": args.model, "model_kwargs": args.model_kwargs, "checkpoint": args.checkpoint.name}
        self.results = Results(path, **facts, flags=flags, machine=describe_machine(self.device))
        self.images, self.val = open_splits(args.data_set, args.data_path)
        self.base = load_backbone(
            args.model, args.model_kwargs, num_classes=self.images.num_classes, checkpoint=args.checkpoint
        )
        self.common = model_and_data_flags(args)
        self.short = max(1, args.epochs // 10)  # epochs of a fine-tuning
        self.folder = Path(tempfile.mkdtemp(prefix="alternatives"))

    def rows_of_seed(self, seed: int) -> None:
        missing = [way for way in WAYS if not self.known(way, seed)]
        if {"skd", "skd" + FINETUNED} & set(missing):
            self.super_network(seed)
        for way, cut in (("best", self.best), ("Torch-Pruning", self.torch_pruning)):
            if {way, way + FINETUNED} & set(missing):
                self.cut_and_finetune(way, cut(seed), seed)
        if "alone" in missing:
            for size in SHARES:
                model = narrower(self.base, self.args, SHARES[size])
                trained = self.train(model, seed, self.args.epochs, "pretrain", self.args.lr)
                self.add("alone", size, seed, trained, each=self.args.epochs)

    def known(self, way: str, seed: int) -> bool:
        return len(self.results.rows("rows", way=way, seed=seed, epochs=self.args.epochs)) == len(SHARES)

    def add(self, way: str, size: str, seed: int, model: VisionTransformer, once: int = 0, each: int = 0) -> None:
        """once, each: epochs of training for all sizes together, and for each size."""
        key = {"way": way, "size": size, "seed": seed, "epochs": self.args.epochs}
        if not self.results.rows("rows", **key):
            macs, cost = count_macs(model), {"once": once * len(self.images), "each": each * len(self.images)}
            self.results.add("rows", {**key, "macs": macs, "top1": self.top1(model), **cost})

    def top1(self, model: VisionTransformer) -> float:
        config = preprocessing(model, data_overrides(self.args))
        val = eval_loader(self.val, config, batch_size=256, workers=self.args.workers)
        return evaluate(model.to(self.device).eval(), val, self.device)["top1"]

    # -----------------------------------------------------------------------------------------------------------------
    # The ways

    def super_network(self, seed: int) -> None:
        output, epochs = self.folder / f"piad{seed}", self.args.epochs
        contracted = self.contract("paper", seed)
        call(program.main, *self.common, "--stage", "piad", "--epochs", epochs, "--seed", seed, "--lr", self.args.lr,
             "--progressive-epochs", max(1, epochs // 2), "--eval-every", epochs, *self.flags,
             "--dropout-ratio", self.args.dropout_ratio, "--checkpoint", contracted / "contracted.safetensors",
             "--resume", "auto", "--output-dir", output)  # fmt: skip
        state = load_checkpoint(output / f"checkpoint_{epochs - 1}.pth")
        model = copy.deepcopy(self.base)
        model.load_state_dict(state["model_ema"] if "model_ema" in state else state["model"])
        self.cut_and_finetune("skd", sizes_of(model, MaskTable.from_json(state["mask_table"])), seed, once=epochs)

    def contract(self, method: str, seed: int) -> Path:
        output = self.folder / f"{method}{seed}"
        more = ["--mask-table", "--dropout-ratio", self.args.dropout_ratio] if method == "best" else []
        call(reparam.main, *self.common, "--method", method, *more, "--seed", seed, "--no-eval",
             "--checkpoint", self.args.checkpoint, "--output-dir", output)  # fmt: skip
        return output

    def best(self, seed: int) -> dict[str, VisionTransformer]:
        folder, model = self.contract("best", seed), copy.deepcopy(self.base).cpu()
        model.load_state_dict(load_checkpoint(folder / "contracted.safetensors"))
        load_compensation(folder / COMPENSATION, model)
        return sizes_of(model, MaskTable.load(folder / "mask_table.json"))

    def torch_pruning(self, seed: int) -> dict[str, VisionTransformer]:
        loader = eval_loader(
            proxy_set(self.images, self.args.proxy_samples, seed),
            preprocessing(self.base, data_overrides(self.args)),
            batch_size=self.args.batch_size,
            workers=self.args.workers,
        )
        cut = partial(prune, self.base.to(self.device), [(x.to(self.device), y.to(self.device)) for x, y in loader])
        return {size: cut(part * count_macs(self.base)) for size, part in SHARES.items()}

    def cut_and_finetune(self, way: str, sizes: dict[str, VisionTransformer], seed: int, once: int = 0) -> None:
        for size, model in sizes.items():
            self.add(way, size, seed, model, once=once)
            if not self.results.rows("rows", way=way + FINETUNED, size=size, seed=seed, epochs=self.args.epochs):
                trained = self.train(model, seed, self.short, "finetune", self.args.lr / 10)
                self.add(way + FINETUNED, size, seed, trained, once=once, each=self.short)

    def train(self, model: VisionTransformer, seed: int, epochs: int, recipe: str, lr: float) -> VisionTransformer:
        """A copy trained by main.py as a plain model; recipe: "pretrain", with a warm-up, or "finetune"."""
        model = copy.deepcopy(model).cpu()
        warmup = ["--warmup-epochs", epochs // 10 if recipe == "pretrain" else 0]
        with (
            tempfile.TemporaryDirectory() as output,
            mock.patch.object(program, "start_model", lambda *_: program.Start(model)),
        ):
            call(program.main, *self.common, "--stage", "pretrain", "--epochs", epochs, "--seed", seed, "--lr", lr,
                 *warmup, "--eval-every", epochs, *self.flags, *(["--ema-decay", 0] if recipe == "finetune" else []),
                 "--output-dir", output)  # fmt: skip
            state = load_checkpoint(Path(output) / f"checkpoint_{epochs - 1}.pth")
        model.load_state_dict(state["model_ema"] if "model_ema" in state else state["model"])
        return model


def sizes_of(model: VisionTransformer, table: MaskTable) -> dict[str, VisionTransformer]:
    whole = count_macs(model)
    codes = {size: table.select(model, max_macs=part * whole) for size, part in SHARES.items()}
    return {size: extract(model, table.widths(code)) for size, code in codes.items()}


def narrower(base: VisionTransformer, args: argparse.Namespace, part: float) -> VisionTransformer:
    """A new model of the same depth and heads, as wide as its share of the MACs allows."""
    heads, limit = base.blocks[0].attn.num_heads, part * count_macs(base)
    for width in range(base.embed_dim, 0, -heads):
        model = create_backbone(
            args.model, **{**args.model_kwargs, "num_classes": base.num_classes, "embed_dim": width}
        )
        if count_macs(model) <= limit:
            return model
    raise UserError(f"no narrower model has {limit:g} MACs")


def prune(base: VisionTransformer, batches: list[Any], max_macs: float) -> VisionTransformer:
    """Torch-Pruning's ViT recipe at the smallest ratio that is within the MACs: bisection, in steps of 1/64."""
    low, high = 0, 63
    while low < high:
        middle = (low + high) // 2
        if count_macs(_pruned(base, batches[:1], middle / 64)) <= max_macs:
            high = middle
        else:
            low = middle + 1
    return _pruned(base, batches, high / 64)


def _pruned(base: VisionTransformer, batches: list[Any], ratio: float) -> VisionTransformer:
    """By group Taylor importance on the batches, every layer but the head at one ratio, head dims and not heads."""
    try:
        import torch_pruning
    except ImportError as error:
        raise UserError("torch-pruning is missing: pip install -r requirements-studies.txt") from error
    model = copy.deepcopy(base).eval()
    pruner = torch_pruning.pruner.MetaPruner(
        model,
        batches[0][0][:1],
        importance=torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=ratio,
        ignored_layers=[model.head],
        num_heads={block.attn.qkv: block.attn.num_heads for block in model.blocks},
    )
    for images, targets in batches:
        (-COSTS["ce"](model(images), targets)).backward()
    for group in pruner.step(interactive=True):
        group.prune()
    for block in model.blocks:
        attn = block.attn
        attn.head_dim = attn.qkv.out_features // (3 * attn.num_heads)
        attn.attn_dim = attn.num_heads * attn.head_dim
    model.embed_dim = model.num_features = model.pos_embed.shape[-1]
    model.zero_grad(set_to_none=True)
    return model


def markdown(results: dict[str, Any]) -> str:
    """A line a way: mean top-1 over the seeds (least to most) at each size, and the images trained on for 12 sizes."""
    head = ["way", "seeds", "epochs", *SHARES, f"images trained on for {SIZES} sizes"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for epochs in sorted({row["epochs"] for row in results["rows"]}):
        for way in WAYS:
            own = [row for row in results["rows"] if (row["way"], row["epochs"]) == (way, epochs)]
            if own:
                values = [[row["top1"] for row in own if row["size"] == size] for size in SHARES]
                cells = [way, str(len({row["seed"] for row in own})), str(epochs), *map(_cell, values)]
                cells.append(f"{cost_of(own):,}")
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost_of(rows: list[dict[str, Any]]) -> int:
    """Images trained on for SIZES sizes by a way, whose rows these are."""
    return max((row["once"] + SIZES * row["each"] for row in rows), default=0)


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    costs = {way: cost_of([row for row in rows if row["way"] == way]) for way in WAYS}
    plot_alternatives(rows, WAYS, costs, path, title)


def _cell(values: list[float]) -> str:
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else ""


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=decimal, required=True, metavar="X", help="of training; a tenth for fine-tuning")
    return parse_training_arguments(parser)


def main() -> None:
    args, flags = parse_arguments()
    study = Study(args, flags)
    for seed in progress_bar(args.draws, "seeds"):
        study.rows_of_seed(seed)
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
