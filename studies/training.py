"""Does PIAD gain by training sub-networks that are compensated? The same budget, three seeds, on the digits.

    python -m studies.training --checkpoint output/demo/pretrained/digits/checkpoint_79.pth

Each run is main.py's PIAD stage, from weights that reparam.py contracted: `paper` (WPAC), `best` (--method best), and
`best, compensated`, where an elastic module's last layer is A_:k L_kk^-1 at each step, with the L of the start and the
weights in training. Top-1 of the averaged weights at shares of the MACs, after half of the epochs and after all.
Writes docs/results/training.json, a run as soon as it is over; what is there is not run again.
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
from arguments import positive
from benchmarks.common import describe_machine
from datasets import eval_loader, open_images, preprocessing
from engine import evaluate
from files import load_checkpoint, write_text
from models.elastic import make_elastic
from models.extraction import extract
from models.loading import load_backbone
from models.macs import count_macs
from piad.mask_table import MaskTable
from studies.common import RESULTS, call
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
# As common.sh and run_train.sh have it for the digits.
RECIPE = shlex.split(
    "--stage piad --aa none --color-jitter 0 --hflip 0 --scale 0.7 1 --reprob 0 --mixup 0 --cutmix 0 --repeated-aug 0 "
    "--dropout-ratio 0.94 --lr 1.6e-2 --ema-decay 0.99"
)


def train(variant: str, seed: int, epochs: int, contracted: Path, output: Path) -> None:
    """main.py's PIAD stage; with compensation its super-network has it from the start."""

    def compensated(model: VisionTransformer) -> VisionTransformer:
        load_compensation(contracted / COMPENSATION, model)
        return make_elastic(model)

    make = compensated if variant == "best, compensated" else make_elastic
    flags = ["--epochs", epochs, "--progressive-epochs", epochs // 2, "--eval-every", epochs, "--seed", seed]
    with mock.patch.object(program, "make_elastic", make):
        call(program.main, *MODEL, *DATA, *RECIPE, *flags, "--keep-every", epochs // 2, "--checkpoint",
             contracted / "contracted.safetensors", "--output-dir", output)  # fmt: skip


def accuracies(variant: str, contracted: Path, checkpoint: Path) -> dict[str, float]:
    """Top-1, percent, of the averaged weights at SHARES of the MACs (the smallest, where a table ends before)."""
    state = load_checkpoint(checkpoint)
    model = load_backbone(
        "vit_tiny_patch16_224", MODEL_KWARGS, num_classes=10, checkpoint=contracted / "contracted.safetensors"
    )
    if variant == "best, compensated":
        load_compensation(contracted / COMPENSATION, model)
    model.load_state_dict(state["model_ema"])
    table, whole = MaskTable.from_json(state["mask_table"]), count_macs(model)
    config = preprocessing(model, {"crop_pct": 1.0})
    val = eval_loader(open_images("digits", None, "val"), config, batch_size=360, workers=0)
    smallest = count_macs(model, table.widths(-1))
    found = {}
    for share in SHARES:
        code = table.select(model, max_macs=max(share * whole, smallest))
        found[f"{share:g}"] = evaluate(extract(model, table.widths(code)), val, torch.device("cpu"))["top1"]
    return found


def summary(runs: list[dict[str, Any]]) -> str:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the demo's pre-trained weights")
    parser.add_argument("--epochs", type=positive, default=60, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--output", type=Path, default=RESULTS / "training.json")
    args = parser.parse_args()
    known = json.loads(args.output.read_text())["runs"] if args.output.exists() else []
    for seed in args.seeds:
        for variant in VARIANTS:
            if any((run["variant"], run["seed"], run["of"]) == (variant, seed, args.epochs) for run in known):
                continue
            with tempfile.TemporaryDirectory() as folder:
                contracted, output = Path(folder) / "contracted", Path(folder) / "piad"
                method = "paper" if variant == "paper" else "best"
                call(reparam.main, *MODEL, *DATA, "--method", method, "--seed", seed, "--no-eval",
                     "--checkpoint", args.checkpoint, "--output-dir", contracted)  # fmt: skip
                train(variant, seed, args.epochs, contracted, output)
                for epochs in (args.epochs // 2, args.epochs):
                    top1 = accuracies(variant, contracted, output / f"checkpoint_{epochs - 1}.pth")
                    known.append({"variant": variant, "seed": seed, "epochs": epochs, "of": args.epochs, "top1": top1})
            machine = describe_machine(torch.device("cpu"), torch.get_num_threads())
            write_text(args.output, json.dumps({"machine": machine, "recipe": RECIPE, "runs": known}, indent=1) + "\n")
    print(summary(known))
    print(json.dumps({"file": args.output.name, "runs": len(known)}))


if __name__ == "__main__":
    run_program(main)
