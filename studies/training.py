"""Measures whether training compensated sub-networks improves PIAD: same budget, three seeds, on the digits.

    python -m studies.training --checkpoint output/demo/pretrained/digits/checkpoint_79.pth

Each run is the PIAD stage of main.py from weights that reparam.py contracted: `paper` (WPAC), `best` (--method best),
and `best, compensated`, where every step compensates the current weights with the mean and Cholesky factor that were
taken before training (see wpac.compensation). Measures top-1 of the averaged weights at SHARES of the MACs, after half
of the epochs and after all. Writes docs/results/training.json after each run and skips runs that are already there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timm.models.vision_transformer import VisionTransformer

import main as program
import reparam
import supernet
from arguments import Parser, positive
from benchmarks.common import describe_machine
from datasets import eval_loader, open_images
from engine import evaluate
from files import write_text
from models.elastic import make_elastic
from studies.common import RESULTS, run_entry_point
from supernet.facts import stamp_of
from utils import run_program
from wpac.compensation import COMPENSATION, load_compensation

VARIANTS = ("paper", "best", "best, compensated")
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
MODEL_KWARGS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 8, "num_heads": 2}
MODEL = [
    "--model",
    "vit_tiny_patch16_224",
    "--model-kwargs",
    *(f"{key}={value}" for key, value in MODEL_KWARGS.items()),
]
DATA = ["--data-set", "digits", "--batch-size", "64", "--workers", "0", "--crop-pct", "1", "--device", "cpu"]
# The settings of common.sh and run_train.sh for the digits.
RECIPE = shlex.split(
    "--stage piad --aa none --color-jitter 0 --hflip 0 --scale 0.7 1 --reprob 0 --mixup 0 --cutmix 0 --repeated-aug 0 "
    "--dropout-ratio 0.94 --lr 1.6e-2 --ema-decay 0.99"
)


def train(variant: str, seed: int, epochs: int, contracted: Path, output: Path) -> None:
    """Runs the PIAD stage of main.py; a compensated variant trains with the compensation of the contracted weights."""

    def compensated(model: VisionTransformer) -> VisionTransformer:
        load_compensation(contracted / COMPENSATION, model, stamp_of(model.parameters()))
        return make_elastic(model)

    make = compensated if variant == "best, compensated" else make_elastic
    flags = ["--epochs", epochs, "--progressive-epochs", epochs // 2, "--eval-every", epochs, "--seed", seed]
    with mock.patch.object(program, "make_elastic", make):
        run_entry_point(
            program.main, *MODEL, *DATA, *RECIPE, *flags, "--keep-every", epochs // 2,
            "--checkpoint", contracted / "contracted.safetensors", "--output-dir", output,
        )  # fmt: skip


def accuracies(variant: str, contracted: Path, checkpoint: Path) -> dict[str, float]:
    """Top-1 (percent) of the averaged weights of a checkpoint at SHARES of the MACs.

    The smallest size is used for a share that it exceeds.
    """
    network = supernet.load(checkpoint, use_ema=True)
    if variant == "best, compensated":
        load_compensation(contracted / COMPENSATION, network.model, supernet.load(contracted, plain_weights=True).stamp)
    val = eval_loader(open_images("digits", None, "val"), network.preprocessing, batch_size=360, workers=0)
    found = {}
    for share in SHARES:
        code = network.select(max_macs=max(share * network.macs(), network.macs(-1)))
        found[f"{share:g}"] = evaluate(network.cut(code), val, torch.device("cpu"))["top1"]
    return found


def markdown(results: dict[str, Any]) -> str:
    """The results as a table: mean top-1 over the seeds, with its range, at each of SHARES."""
    runs = results["runs"]
    lines = ["| PIAD from | epochs | " + " | ".join(f"{share:g} of the MACs" for share in SHARES) + " |"]
    lines.append("|---" * (len(SHARES) + 2) + "|")
    for of, epochs, variant in sorted({(run["of"], run["epochs"], run["variant"]) for run in runs}):
        same = {"of": of, "epochs": epochs, "variant": variant}
        own = [run["top1"] for run in runs if all(run[key] == value for key, value in same.items())]
        cells = []
        for share in SHARES:
            values = [top1[f"{share:g}"] for top1 in own]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        lines.append(f"| {variant} | {epochs} of {of} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="pre-trained weights of the demo")
    parser.add_argument("--epochs", type=positive, default=60, help="epochs of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs (default: 0 1 2)")
    parser.add_argument("--output", type=Path, default=RESULTS / "training.json", help="(default: %(default)s)")
    args = parser.parse_args()
    known = json.loads(args.output.read_text())["runs"] if args.output.exists() else []
    for seed in args.seeds:
        for variant in VARIANTS:
            if any((run["variant"], run["seed"], run["of"]) == (variant, seed, args.epochs) for run in known):
                continue
            with tempfile.TemporaryDirectory() as folder:
                contracted, output = Path(folder) / "contracted", Path(folder) / "piad"
                method = "paper" if variant == "paper" else "best"
                run_entry_point(
                    reparam.main, *MODEL, *DATA, "--method", method, "--seed", seed, "--no-eval",
                    "--checkpoint", args.checkpoint, "--output-dir", contracted,
                )  # fmt: skip
                train(variant, seed, args.epochs, contracted, output)
                for epochs in (args.epochs // 2, args.epochs):
                    top1 = accuracies(variant, contracted, output / f"checkpoint_{epochs - 1}.pth")
                    known.append({"variant": variant, "seed": seed, "epochs": epochs, "of": args.epochs, "top1": top1})
            machine = describe_machine(torch.device("cpu"), torch.get_num_threads())
            write_text(args.output, json.dumps({"machine": machine, "recipe": RECIPE, "runs": known}, indent=1) + "\n")
    print(markdown({"runs": known}))
    print(json.dumps({"file": args.output.name, "runs": len(known)}))


if __name__ == "__main__":
    run_program(main)
