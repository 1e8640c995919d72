"""Command-line flags that the entry points share, in groups, and opening the network that they name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from timm.utils import ParseKwargs

import supernet
from datasets import FOLDER_NAMES, UNLABELLED

DEFAULT_MODEL = "deit_small_patch16_224"  # of new weights, and of timm's pretrained ones


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{Path(sys.argv[0]).name}: error: {message}\n")


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: a whole number (kind int) or a decimal number (float) from low to high."""

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


def default_workers() -> int:
    """Cores per process of this machine, from 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data and run: the groups that every entry point has."""
    _add_model_arguments(parser)
    _add_data_arguments(parser)
    _add_run_arguments(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        "--sub-network",
        type=Path,
        metavar="PATH",
        help="weights to start from: .pth or .safetensors, bare or under model / state_dict; or the folder of a run, "
        "of contracted weights or of a sub-network",
    )
    group.add_argument(
        "--pretrained",
        action="store_true",
        help="without --checkpoint: start from timm's pretrained weights",
    )
    add_model(group)


def add_model(group: argparse._ArgumentGroup) -> None:
    """What the weights are of: --model, --model-kwargs, --eval-ema."""
    group.add_argument(
        "--model",
        metavar="NAME",
        help="timm's name, or vit_tiny, vit_small, vit_base for the DeiT models, or hf-hub:OWNER/NAME for a timm model "
        "on the Hugging Face hub; needed for weights that do not say it "
        f"(default: what they say; without weights {DEFAULT_MODEL})",
    )
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="KEY=VALUE",
        help="arguments for timm's model, such as img_size=98 patch_size=14 (default: what the weights say)",
    )
    group.add_argument(
        "--eval-ema",
        "--use-ema",
        action="store_true",
        dest="use_ema",
        help="use the averaged weights (model_ema) of the checkpoint",
    )


def add_mask_table(group: argparse._ArgumentGroup) -> None:
    """What lies beside the weights of a super-network: --mask-table, --compensate."""
    group.add_argument(
        "--mask-table",
        type=Path,
        metavar="FILE",
        help="mask table (default: the one in the checkpoint, else mask_table.json beside the weights)",
    )
    group.add_argument(
        "--compensate",
        action=argparse.BooleanOptionalAction,
        help="sub-networks make up for what they lost, with the compensation.safetensors beside the weights (default: "
        "where that file exists)",
    )


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add_data_set(group, default="folder")
    add_proxy_samples(group)
    group.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="images per process and step (default: %(default)s)",
    )
    group.add_argument(
        "--workers",
        type=count,
        default=default_workers(),
        metavar="N",
        help="data loading processes per process; 0 loads in the process itself (default: as many as there are cores, "
        "up to 8: %(default)s here)",
    )
    add_preprocessing(group)


def add_preprocessing(group: argparse._ArgumentGroup) -> None:
    """How images are prepared: --mean, --std, --interpolation, --crop-pct."""
    group.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="X",
        help="pixel mean per channel (default: what the weights say, else timm's)",
    )
    group.add_argument(
        "--std",
        type=number(float, 1e-3),
        nargs="+",
        metavar="X",
        help="standard deviation of the pixels per channel (default: as of --mean)",
    )
    group.add_argument(
        "--interpolation",
        choices=("bilinear", "bicubic", "nearest"),
        help="resizing in evaluation (default: as of --mean)",
    )
    group.add_argument(
        "--crop-pct",
        type=decimal,
        metavar="X",
        help="share of the resized side that the crop of evaluation keeps, 1 = no crop (default: as of --mean)",
    )


def add_data_set(group: argparse._ArgumentGroup, default: str | None) -> None:
    """--data-set, --data-path and --index."""
    group.add_argument(
        "--data-set",
        default=default,
        metavar="NAME",
        help=f"digits (embedded), {', '.join(FOLDER_NAMES)} (train/ and val/ with a folder per class), {UNLABELLED} "
        "(images anywhere in a folder, without labels; a tenth of them, drawn from the seed, is held back for "
        "evaluation), or a name of timm's create_dataset such as torch/cifar10 (default: %(default)s)",
    )
    group.add_argument("--data-path", metavar="DIR", help="folder of the data set; not needed for digits")
    group.add_argument(
        "--index",
        type=Path,
        metavar="DIR",
        help="folder where the list of the images is kept, so that a later run need not list a large data set again; "
        "it is made anew if a folder of the data has changed (default: it is not kept)",
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output-dir", type=Path, default=Path("output"), metavar="DIR", help="where results go (default: %(default)s)"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto: CUDA if there is one")
    group.add_argument("--seed", type=count, default=0, help="of all random numbers (default: %(default)s)")


def data_overrides(args: argparse.Namespace) -> dict[str, object]:
    """The preprocessing flags; None where a flag was not given."""
    return {key: getattr(args, key) for key in ("mean", "std", "interpolation", "crop_pct")}


def open_network(
    args: argparse.Namespace, num_classes: int | None = None, *, plain_weights: bool = False, drop_path: float = 0.0
) -> supernet.Network:
    """The network that the flags name (see supernet.load() and create()), on the CPU.

    num_classes: of new weights, where there is no --checkpoint.
    """
    more = {"model_kwargs": args.model_kwargs, "preprocessing": data_overrides(args), "drop_path": drop_path}
    if args.checkpoint is None:
        name = args.model or DEFAULT_MODEL
        return supernet.create(name, pretrained=args.pretrained, num_classes=num_classes, **more)
    if plain_weights:
        return supernet.load(args.checkpoint, name=args.model, use_ema=args.use_ema, plain_weights=True, **more)
    return supernet.load(
        args.checkpoint,
        name=args.model,
        use_ema=args.use_ema,
        compensate=args.compensate,
        mask_table=args.mask_table,
        **more,
    )


def add_cost_of(group: argparse._ArgumentGroup) -> None:
    """--cost-of."""
    group.add_argument(
        "--cost-of",
        type=Path,
        metavar="FILE",
        help="device.json of python -m supernet.profile: the mask table is made for the time on that device (default: "
        "for MACs)",
    )


def add_dropout_ratio(group: argparse._ArgumentGroup, default: float, of: str = "MACs") -> None:
    """--dropout-ratio. of: what it is a share of, in words."""
    group.add_argument(
        "--dropout-ratio",
        type=share,
        default=default,
        metavar="R",
        help=f"share of the {of} that the mask table can drop, r (default: %(default)s)",
    )


def add_proxy_samples(group: argparse._ArgumentGroup) -> None:
    """--proxy-samples."""
    group.add_argument(
        "--proxy-samples",
        type=positive,
        default=1024,
        metavar="N",
        help="number of training images that statistics are taken on (default: %(default)s)",
    )
    group.add_argument(
        "--knn-images",
        type=positive,
        default=10_000,
        metavar="N",
        help="number of training images among which the k-NN evaluation of an encoder searches neighbours (default: "
        "%(default)s)",
    )


def add_refit(group: argparse._ArgumentGroup) -> None:
    """--refit: False where it is not given, else the steps, 0 for least squares."""
    group.add_argument(
        "--refit",
        type=count,
        nargs="?",
        const=0,
        default=False,
        metavar="STEPS",
        help="fit each sub-network anew to the whole network on --proxy-samples training images, without labels: its "
        "linear layers by least squares and then, with STEPS, each of its blocks by so many steps of gradient descent, "
        "such as 400, which comes nearer where much is cut",
    )


def add_amp(
    group: argparse._ArgumentGroup, kind: Callable[[str], torch.dtype] | None = None, default: str = "float32"
) -> None:
    """--amp, as a torch.dtype; None where it is not given. default: what that means, in words."""
    group.add_argument(
        "--amp",
        type=kind or half_precision,
        nargs="?",
        const=torch.bfloat16,
        metavar="DTYPE",
        help=f"mixed precision: bfloat16 or float16; --amp alone is bfloat16 (default: {default})",
    )


def half_precision(text: str) -> torch.dtype:
    """An argparse type: the dtype of autocast."""
    if text not in ("bfloat16", "float16"):
        raise argparse.ArgumentTypeError(f"{text!r} is not bfloat16 or float16")
    return getattr(torch, text)


def any_precision(text: str) -> torch.dtype:
    """An argparse type: half_precision(), or none, which is float32."""
    return torch.float32 if text == "none" else half_precision(text)
