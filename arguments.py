"""Command-line flags, in groups, shared by the entry points; and the recipe of each stage."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from timm.utils import ParseKwargs

from datasets import FOLDER_NAMES
from models.macs import CONVENTIONS
from piad.regimes import REGIMES
from piad.selection import parse_amount

# The paper's recipe, DeiT's where the paper says nothing. DeiT-B trains 150 epochs of PIAD: run_train.sh says so.
RECIPES = {
    "pretrain": {"epochs": 300, "lr": 5e-4, "min_lr": 1e-5, "warmup_epochs": 5, "drop_path": 0.1, "ema_decay": 0.99996},
    "piad": {"epochs": 300, "lr": 5e-4, "min_lr": 1e-5, "warmup_epochs": 0, "drop_path": 0.0, "ema_decay": 0.99996},
    "finetune": {"epochs": 30, "lr": 5e-5, "min_lr": 1e-6, "warmup_epochs": 0, "drop_path": 0.1, "ema_decay": 0.0},
}


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


def super_network_words(args: argparse.Namespace) -> list[str]:
    """The words with which main.py --eval opens this super-network again: all but sizes, speed and output folder."""
    words = ["--model", args.model]
    if args.model_kwargs:
        words += ["--model-kwargs", *(f"{key}={value}" for key, value in args.model_kwargs.items())]
    given = {key: getattr(args, key) for key in ("checkpoint", "mask_table", "data_set", "data_path")}
    given |= data_overrides(args)
    if args.refit:
        given |= {"proxy_samples": args.proxy_samples, "seed": args.seed}
    for key, value in given.items():
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{key.replace('_', '-')}", *map(str, values)]
    words += ["--eval-ema"] if args.use_ema else []
    words += ["--refit"] if args.refit else []
    return words + ([] if args.compensate is None else ["--compensate" if args.compensate else "--no-compensate"])


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


def parse_main_arguments() -> argparse.Namespace:
    """main.py's flags; the defaults of the optimization group are those of --stage."""
    parser = argparse.ArgumentParser(
        description="Train a ViT, train its super-network with PIAD, fine-tune or evaluate sub-networks."
    )
    group = parser.add_argument_group("what to do")
    group.add_argument(
        "--stage",
        choices=RECIPES,
        default="piad",
        help="pretrain: a plain model; piad: a super-network from contracted weights; finetune: one "
        "extracted sub-network (default: %(default)s)",
    )
    group.add_argument("--eval", action="store_true", help="evaluate sub-networks instead of training")
    add_common_arguments(parser)
    _add_super_network_arguments(parser)
    add_size_arguments(parser)
    _add_optimization_arguments(parser)
    _add_augmentation_arguments(parser)
    _add_checkpoint_arguments(parser)
    # The stage first, alone: --help, too, shows that stage's defaults.
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--stage", default="piad")
    parser.set_defaults(**RECIPES.get(first.parse_known_args()[0].stage, {}))
    return parser.parse_args()


def _add_super_network_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("super-network")
    group.add_argument("--mask-table", type=Path, metavar="FILE", help="mask_table.json of the super-network")
    group.add_argument("--sub-network", type=Path, metavar="DIR", help="with --eval: a folder written by finetune")
    group.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="with --eval: weights to cut to the same widths, shown beside the super-network's",
    )
    group.add_argument("--frontier", type=positive, metavar="N", help="N sizes, evenly spaced in MACs")
    group.add_argument(
        "--compensate",
        action=argparse.BooleanOptionalAction,
        help="sub-networks make up for what they lost; needs compensation.safetensors beside --checkpoint (default: "
        "where it is)",
    )
    group.add_argument(
        "--refit",
        action="store_true",
        help="solve the linear layers of a sub-network anew on --proxy-samples training images, without labels",
    )
    group.add_argument(
        "--write-sub-networks", action="store_true", help="with --eval: also write each size as a folder op_<code>/"
    )
    add_dropout_ratio(group)
    group.add_argument(
        "--regime",
        choices=REGIMES,
        default="piad",
        help="what a step trains: piad, or what it is compared with: the whole network, or one that lacks units or "
        "modules drawn by chance, on average as many as with piad (default: %(default)s)",
    )
    group.add_argument(
        "--progressive-epochs",
        type=positive,
        default=50,
        metavar="N",
        help="epochs over which the dropout list grows, P_e (default: %(default)s)",
    )


def _add_optimization_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization (defaults: the stage's recipe)")
    group.add_argument("--epochs", type=positive, metavar="N", help="epochs to train (default: %(default)s)")
    group.add_argument("--opt", default="adamw", help="timm's name of the optimizer (default: %(default)s)")
    group.add_argument(
        "--lr",
        type=decimal,
        metavar="X",
        help="learning rate for 512 images a step; scaled linearly (default: %(default)s)",
    )
    group.add_argument(
        "--min-lr",
        type=decimal,
        metavar="X",
        help="learning rate at the end of the cosine, as it is (default: %(default)s)",
    )
    group.add_argument(
        "--warmup-epochs", type=count, metavar="N", help="epochs of linear warm-up from 1e-6 (default: %(default)s)"
    )
    group.add_argument("--weight-decay", type=decimal, default=0.05, metavar="X", help="default: %(default)s")
    group.add_argument("--clip-grad", type=decimal, metavar="X", help="largest gradient norm (default: no clipping)")
    group.add_argument("--drop-path", type=share, metavar="X", help="stochastic depth rate (default: %(default)s)")
    group.add_argument(
        "--ema-decay",
        type=share,
        metavar="X",
        help="decay of the averaged weights, 0 = none (default: %(default)s)",
    )
    add_amp(group)


def _add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation (defaults: DeiT's)")
    group.add_argument(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        metavar="POLICY",
        help="timm's auto augment policy, none = off (default: %(default)s)",
    )
    group.add_argument("--color-jitter", type=decimal, default=0.3, metavar="X", help="default: %(default)s")
    group.add_argument(
        "--scale",
        type=share,
        nargs=2,
        default=(0.08, 1.0),
        metavar="X",
        help="share of the image's area that a random crop keeps (default: 0.08 1)",
    )
    group.add_argument(
        "--ratio",
        type=decimal,
        nargs=2,
        default=(3 / 4, 4 / 3),
        metavar="X",
        help="aspect ratio of a random crop (default: 3/4 4/3)",
    )
    group.add_argument("--hflip", type=share, default=0.5, metavar="P", help="chance of a mirror image (default: 0.5)")
    group.add_argument(
        "--reprob", type=share, default=0.25, metavar="P", help="chance of random erasing (default: %(default)s)"
    )
    group.add_argument("--mixup", type=decimal, default=0.8, metavar="ALPHA", help="0 = off (default: %(default)s)")
    group.add_argument("--cutmix", type=decimal, default=1.0, metavar="ALPHA", help="0 = off (default: %(default)s)")
    group.add_argument("--smoothing", type=share, default=0.1, metavar="X", help="of labels (default: %(default)s)")
    group.add_argument(
        "--repeated-aug",
        type=count,
        default=3,
        metavar="N",
        help="how often an epoch repeats an image, augmented anew, 0 = off (default: %(default)s)",
    )


def _add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints and logs")
    group.add_argument(
        "--resume", metavar="FILE", help="go on from a checkpoint of this run; auto: the newest in --output-dir, if any"
    )
    group.add_argument(
        "--checkpoint-steps",
        type=count,
        default=0,
        metavar="N",
        help="also save each N steps of an epoch; 0 = at its end only (default: %(default)s)",
    )
    group.add_argument(
        "--keep-every",
        type=count,
        default=0,
        metavar="N",
        help="besides the last two and the best, keep each N-th epoch's checkpoint; 0 = none",
    )
    group.add_argument(
        "--eval-every",
        type=positive,
        default=1,
        metavar="N",
        help="epochs from one evaluation to the next (default: %(default)s)",
    )
