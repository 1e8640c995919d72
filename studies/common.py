"""What the studies share: their results file, a model with its images in memory, and their flags."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from arguments import add_common_arguments, data_overrides, open_network, positive, share
from benchmarks.common import ROOT, describe_machine
from datasets import eval_loader, open_splits, proxy_set
from files import write_text
from models.backbone import modules_of
from models.macs import count_macs
from supernet import Network
from utils import UserError

RESULTS = ROOT / "docs" / "results"
Batches = list[tuple[Tensor, Tensor]]
T = TypeVar("T")


class Results:
    """The results of a study, in a JSON file: kind -> rows. The file is rewritten after each row that is added.

    A study that is interrupted can so be continued. A .log file beside it has one line per run of the program.
    facts: further keys of the JSON file, such as the model.
    """

    def __init__(self, path: Path, **facts: Any):
        self.path, self.start, self.added = path, time.perf_counter(), 0
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.content |= facts

    def rows(self, kind: str, **key: Any) -> list[dict[str, Any]]:
        """The rows of a kind that have all the values of `key`."""
        rows = self.content.setdefault(kind, [])
        return [row for row in rows if all(row[name] == value for name, value in key.items())]

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Adds a row, writes the file and prints the values of the row."""
        self.content.setdefault(kind, []).append(row)
        self.added += 1
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")
        words = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
        print(*words.values(), sep="  ", flush=True)

    def log(self) -> None:
        """Appends the command, the machine and the time to the .log; paths are shortened to their last part."""
        words = [Path(word).name if "/" in word else word for word in sys.argv]
        seconds = round(time.perf_counter() - self.start)
        line = {"run": " ".join(words), "rows": self.added, "seconds": seconds, "machine": self.content.get("machine")}
        with self.path.with_suffix(".log").open("a") as file:
            file.write(json.dumps(line) + "\n")


class CutStudy:
    """A model and the images of val/ in memory, to compare cut networks with the whole one.

    path: of the results file.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, path: Path):
        self.args, self.device = args, device
        use_threads(args)
        self.images, val = open_splits(args.data_set, args.data_path, index=args.index)
        self.network = open_network(args, self.images.num_classes, plain_weights=True)
        self.base, self.config = self.network.model.to(device), self.network.preprocessing
        val = proxy_set(val, args.val_images, 0) if args.val_images else val
        self.val_images, self.val = len(val), self.batches(val)
        self.whole = self.logits(self.base)
        self.results = Results(path, **facts_of(self.network), machine=describe_machine(device, args.threads))
        self.reference = {"macs": count_macs(self.base), "images": self.val_images, **self.scores(self.whole)}
        if not self.results.rows("whole", images=self.val_images):
            self.results.add("whole", self.reference)

    def batches(self, images: Any) -> Batches:
        loader = eval_loader(images, self.config, batch_size=self.args.batch_size, workers=self.args.workers)
        return [(x.to(self.device), y.to(self.device)) for x, y in loader]

    def proxy(self, number: int, draw: int) -> Batches:
        """Batches of a proxy set of `number` images; draw: its seed."""
        return self.batches(proxy_set(self.images, number, draw))

    @torch.inference_mode()
    def logits(self, model: VisionTransformer) -> Tensor:
        """Logits (images, classes) of the images of val/."""
        return torch.cat([model(images) for images, _ in self.val])

    def scores(self, logits: Tensor) -> dict[str, float]:
        """Top-1 in percent, and the mean KL divergence from the whole network in nats; logits: as logits() returns."""
        targets = torch.cat([y for _, y in self.val])
        expected, found = self.whole.double().log_softmax(1), logits.double().log_softmax(1)
        kl = (expected.exp() * (expected - found)).sum(1).mean().item()
        return {"top1": 100 * (logits.argmax(1) == targets).double().mean().item(), "kl": kl}


def facts_of(network: Network) -> dict[str, Any]:
    """What a results file says of the network that a study starts from."""
    return {
        "model": network.name,
        "model_kwargs": network.model_kwargs,
        "checkpoint": network.source.name if network.source else None,
    }


def run_entry_point(main: Callable[[], T], *arguments: object) -> T:
    """What a main() or a parser of arguments returns when it is called with these command-line arguments."""
    with mock.patch.object(sys, "argv", [sys.argv[0], *map(str, arguments)]):
        return main()


def mean_and_range(values: list[float]) -> str:
    """The mean of the values, and in brackets their range if there are several: "97.2 (96.9 to 97.5)"."""
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else ""


def model_and_data_flags(args: argparse.Namespace) -> list[object]:
    """The model and data flags of a study, as flags of the programs that it runs."""
    flags = ["--model", args.model] if args.model else []
    flags += ["--model-kwargs", *(f"{key}={value}" for key, value in args.model_kwargs.items())]
    flags += ["--data-set", args.data_set, *(["--data-path", args.data_path] if args.data_path else [])]
    flags += ["--index", args.index] if args.index else []
    flags += ["--device", args.device, "--batch-size", args.batch_size, "--workers", args.workers]
    flags += ["--proxy-samples", args.proxy_samples]
    for name, value in data_overrides(args).items():
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    return flags


@torch.no_grad()
def zero_dims(model: VisionTransformer, qk: float = 1.0, v: float = 1.0) -> VisionTransformer:
    """Sets all but the first dims of q and k, and of v, to zero, in place; the outputs are as if they were cut.

    qk, v: share of the dims that is kept.
    """
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


def refuse_flags(settings: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Raises UserError for flags of main.py that a study does not follow. defaults: their names and default values."""
    for name, default in defaults.items():
        value = getattr(settings, name)
        if value != default:
            flag = f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}"
            raise UserError(f"{flag} is not followed by this study: leave it out")


def add_study_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the common flags and a group of flags for a study on one model; returns that group."""
    add_common_arguments(parser)
    group = parser.add_argument_group("study")
    group.add_argument("--name", required=True, help="name of the model and data, used in file names")
    group.add_argument(
        "--draws",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="seeds of the proxy sets or of training (default: %(default)s)",
    )
    group.add_argument(
        "--val-images", type=positive, metavar="N", help="number of images of val/ to use, drawn once (default: all)"
    )
    group.add_argument("--threads", type=positive, metavar="N", help="number of CPU threads (default: that of PyTorch)")
    parser.set_defaults(output_dir=RESULTS, workers=2)
    return group


def parse_training_arguments(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Parses the arguments of a study that trains; returns them and the flags for main.py, which follow a `--`."""
    group = add_study_arguments(parser)
    group.add_argument("--epochs", type=positive, required=True, metavar="N", help="epochs of training")
    group.add_argument(
        "--dropout-ratio", type=share, default=0.875, metavar="R", help="see main.py (default: %(default)s)"
    )
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    use_threads(args)
    return args, words[cut + 1 :]


def use_threads(args: argparse.Namespace) -> None:
    """Makes PyTorch use as many CPU threads as --threads says."""
    if args.threads:
        torch.set_num_threads(args.threads)
