"""Command-line flags, in groups, shared by the entry points."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from timm.utils import ParseKwargs

from datasets import FOLDER_NAMES
from models.macs import CONVENTIONS
from supernet.selection import parse_amount


class Parser(argparse.ArgumentParser):
    """Whose errors are one line, as all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{Path(sys.argv[0]).name}: error: {message}\n")


def quantity(kind: str, example: str) -> Callable[[str], float]:
    """An argparse type: a positive amount with a unit of this kind."""

    def parse(text: str) -> float:
        try:
            return parse_amount(text, kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {example}") from error

    return parse


amount = quantity("amount", "an amount such as 2.4G or 12M")
memory = quantity("bytes", "an amount of memory such as 40MB or 12MiB")
duration = quantity("seconds", "a time such as 5ms or 0.2s")


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: a whole number or a decimal one from low to high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or value == float("inf"):
            what = "a whole number" if kind is int else "a number"
            limits = f"{low:g} or more" if high == float("inf") else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {limits}")
        return value

    return parse


positive, count = number(int, 1), number(int, 0)
share, decimal = number(float, 0, 1), number(float, 0)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data and run: the groups that every entry point has."""
    _add_model_arguments(parser)
    _add_data_arguments(parser)
    _add_run_arguments(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="deit_small_patch16_224",
        metavar="NAME",
        help="timm's name, or vit_tiny, vit_small, vit_base for the DeiT models (default: %(default)s)",
    )
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="KEY=VALUE",
        help="arguments for timm's model, such as img_size=98 patch_size=14",
    )
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights to start from: .pth or .safetensors, bare or under model / state_dict",
    )
    group.add_argument(
        "--pretrained",
        action="store_true",
        help="without --checkpoint: start from timm's weights (its hub)",
    )
    group.add_argument(
        "--eval-ema",
        "--use-ema",
        action="store_true",
        dest="use_ema",
        help="take the averaged weights (model_ema) of --checkpoint",
    )


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add_data_set(group, default="folder")
    group.add_argument(
        "--proxy-samples",
        type=positive,
        default=1024,
        metavar="N",
        help="training images that statistics are taken on (default: %(default)s)",
    )
    group.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="images a process and step (default: %(default)s)"
    )
    group.add_argument(
        "--workers",
        type=count,
        default=4,
        metavar="N",
        help="data loading processes a process; 0 loads in the process itself (default: %(default)s)",
    )
    group.add_argument("--mean", type=float, nargs="+", metavar="X", help="pixel mean, 0..1 (default: the model's)")
    group.add_argument(
        "--std", type=number(float, 1e-3), nargs="+", metavar="X", help="pixel deviation (default: the model's)"
    )
    group.add_argument(
        "--interpolation",
        choices=("bilinear", "bicubic", "nearest"),
        help="resizing in evaluation (default: the model's)",
    )
    group.add_argument(
        "--crop-pct",
        type=decimal,
        metavar="X",
        help="share of the resized side that evaluation keeps, 1 = no crop (default: the model's)",
    )


def add_data_set(group: argparse._ArgumentGroup, default: str | None) -> None:
    """Which images."""
    group.add_argument(
        "--data-set",
        default=default,
        metavar="NAME",
        help=f"digits (embedded), {', '.join(FOLDER_NAMES)} (train/ and val/, a folder a class), or a "
        "name of timm's create_dataset such as torch/cifar10 (default: %(default)s)",
    )
    group.add_argument("--data-path", metavar="DIR", help="where the data set lies; not needed for digits")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output-dir", type=Path, default=Path("output"), metavar="DIR", help="where results go (default: %(default)s)"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto: CUDA if there is one")
    group.add_argument("--seed", type=count, default=0, help="of everything that is drawn (default: %(default)s)")


def data_overrides(args: argparse.Namespace) -> dict[str, object]:
    """The preprocessing flags, for datasets.preprocessing()."""
    return {key: getattr(args, key) for key in ("mean", "std", "interpolation", "crop_pct")}


def add_dropout_ratio(group: argparse._ArgumentGroup) -> None:
    """How far a mask table goes."""
    group.add_argument(
        "--dropout-ratio",
        type=share,
        default=0.875,
        metavar="R",
        help="share of the MACs that the mask table reaches (default: %(default)s)",
    )


def add_amp(group: argparse._ArgumentGroup) -> None:
    """The type that a model is run in."""
    group.add_argument(
        "--amp",
        choices=("bfloat16", "float16"),
        nargs="?",
        const="bfloat16",
        help="mixed precision; --amp alone is bfloat16 (default: float32)",
    )


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Which sub-networks: by op code, or the largest within a budget."""
    group = parser.add_argument_group(
        "sizes",
        "One budget with several values lists several sizes; several budgets, one value each, ask for the one largest "
        "size that meets them all.",
    )
    group.add_argument(
        "--op-code",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="sizes by op code: 0 is the whole network, -1 the smallest",
    )
    # None, not an empty list, where a run's settings of before had no such flag: it can still be resumed.
    for flag, kind, default, example, what in (
        ("--macs-ratio", float, [], "X", "at most this share of the whole network's MACs, 0..1"),
        ("--macs", amount, [], "2.4G", "at most so many MACs for an image"),
        ("--params", amount, [], "12M", "at most so many parameters"),
        ("--memory", memory, None, "40MB", "at most so much memory for the weights; B, KB, MB, GB, or MiB for 2^20"),
        (
            "--latency",
            duration,
            None,
            "5ms",
            "at most so long for a batch of --batch-size on --device under --amp: sizes are measured by bisection, "
            "and kept in latency.json beside the mask table; us, ms or s",
        ),
        ("--throughput", amount, None, "2000", "at least so many images a second, measured as --latency is"),
    ):
        group.add_argument(flag, type=kind, nargs="+", default=default, metavar=example, help=what)
    group.add_argument(
        "--macs-convention",
        choices=CONVENTIONS,
        default="linear",
        help="linear layers alone, as the paper counts, or with the attention products (default: %(default)s)",
    )
