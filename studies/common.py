"""What the studies share: real images and a model in memory, cuts measured against it, results kept as they come."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from arguments import add_common_arguments, data_overrides, positive, share
from benchmarks.common import ROOT, describe_machine
from datasets import eval_loader, open_splits, preprocessing, proxy_set
from files import write_text
from models.backbone import modules_of
from models.loading import load_backbone
from models.macs import count_macs

RESULTS = ROOT / "docs" / "results"
Batches = list[tuple[Tensor, Tensor]]


class Results:
    """The rows of a study, by kind, in a JSON file that is whole after each; beside it a .log with a line a run."""

    def __init__(self, path: Path, **facts: Any):
        self.path, self.start, self.added = path, time.perf_counter(), 0
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.content |= facts

    def rows(self, kind: str, **key: Any) -> list[dict[str, Any]]:
        """Those of a kind that have all of the key's values."""
        rows = self.content.setdefault(kind, [])
        return [row for row in rows if all(row[name] == value for name, value in key.items())]

    def add(self, kind: str, row: dict[str, Any]) -> None:
        self.content.setdefault(kind, []).append(row)
        self.added += 1
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")
        words = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
        print(*words.values(), sep="  ", flush=True)

    def log(self) -> None:
        """What was run, on what, and how long: paths by their last part."""
        words = [Path(word).name if "/" in word else word for word in sys.argv]
        seconds = round(time.perf_counter() - self.start)
        line = {"run": " ".join(words), "rows": self.added, "seconds": seconds, "machine": self.content.get("machine")}
        with self.path.with_suffix(".log").open("a") as file:
            file.write(json.dumps(line) + "\n")


class CutStudy:
    """A model, its val/ and its proxy sets in memory, and how far a cut network is from the whole one."""

    def __init__(self, args: argparse.Namespace, device: torch.device, path: Path):
        self.args, self.device = args, device
        self.images, val = open_splits(args.data_set, args.data_path)
        self.base = load_backbone(
            args.model, args.model_kwargs, num_classes=self.images.num_classes, checkpoint=args.checkpoint
        )
        self.base.to(device).eval()
        self.config = preprocessing(self.base, data_overrides(args))
        val = proxy_set(val, args.val_images, 0) if args.val_images else val
        self.val_images, self.val = len(val), self.batches(val)
        self.whole = self.logits(self.base)
        facts = {"model": args.model, "model_kwargs": args.model_kwargs, "checkpoint": Path(args.checkpoint).name}
        self.results = Results(path, **facts, machine=describe_machine(device, args.threads))
        self.reference = {"macs": count_macs(self.base), "images": self.val_images, **self.scores(self.whole)}
        if not self.results.rows("whole", images=self.val_images):
            self.results.add("whole", self.reference)

    def batches(self, images: Any) -> Batches:
        loader = eval_loader(images, self.config, batch_size=self.args.batch_size, workers=self.args.workers)
        return [(x.to(self.device), y.to(self.device)) for x, y in loader]

    def proxy(self, number: int, draw: int) -> Batches:
        return self.batches(proxy_set(self.images, number, draw))

    @torch.inference_mode()
    def logits(self, model: VisionTransformer) -> Tensor:
        return torch.cat([model(images) for images, _ in self.val])

    def scores(self, logits: Tensor) -> dict[str, float]:
        """Top-1 in percent, and the mean KL divergence from the whole model's outputs to these, in nats."""
        targets = torch.cat([y for _, y in self.val])
        expected, found = self.whole.double().log_softmax(1), logits.double().log_softmax(1)
        kl = (expected.exp() * (expected - found)).sum(1).mean().item()
        return {"top1": 100 * (logits.argmax(1) == targets).double().mean().item(), "kl": kl}


def call(main: Callable[[], None], *arguments: object) -> None:
    """Runs an entry point as its command line would."""
    with mock.patch.object(sys, "argv", [sys.argv[0], *map(str, arguments)]):
        main()


def model_and_data_flags(args: argparse.Namespace) -> list[object]:
    """The model and data flags that a study was given, for the entry points that it calls."""
    flags = ["--model", args.model, "--model-kwargs", *(f"{key}={value}" for key, value in args.model_kwargs.items())]
    flags += ["--data-set", args.data_set, *(["--data-path", args.data_path] if args.data_path else [])]
    flags += ["--device", args.device, "--batch-size", args.batch_size, "--workers", args.workers]
    flags += ["--proxy-samples", args.proxy_samples]
    for name, value in data_overrides(args).items():
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    return flags


@torch.no_grad()
def silence(model: VisionTransformer, qk: float = 1.0, v: float = 1.0) -> VisionTransformer:
    """Sets to zero, in place, all but the first share of the dims of q and k, and of v: as if they were cut."""
    for module in modules_of(model).values():
        if module.kind != "attn":
            continue
        qkv = model.blocks[module.block].attn.qkv
        for parameter in (qkv.weight, qkv.bias):
            if parameter is not None:
                rows = parameter.view(3, module.heads, module.width, -1)
                rows[:2, :, int(module.width * qk) :] = 0
                rows[2, :, int(module.width * v) :] = 0
    return model


def add_study_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flags of a study on one model: those of the entry points, and its own group, which is returned."""
    add_common_arguments(parser)
    group = parser.add_argument_group("study")
    group.add_argument("--name", required=True, help="of the model and data, for the files")
    group.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="seeds of the proxy sets")
    group.add_argument("--val-images", type=positive, metavar="N", help="of val/, drawn once (default: all)")
    group.add_argument("--threads", type=positive, metavar="N", help="of the CPU (default: PyTorch's)")
    parser.set_defaults(output_dir=RESULTS, workers=2)
    return group


def parse_training_arguments(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """A training study's own arguments, and what follows a lone `--`, which is for main.py."""
    group = add_study_arguments(parser)
    group.add_argument("--epochs", type=positive, required=True, metavar="N", help="of training: the budget")
    group.add_argument("--dropout-ratio", type=share, default=0.875, metavar="R", help="as main.py's")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:cut]), words[cut + 1 :]
