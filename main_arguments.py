"""The flags of main.py, and the recipe of each stage."""

from __future__ import annotations

import argparse
from pathlib import Path

from arguments import (
    Parser,
    add_amp,
    add_common_arguments,
    add_dropout_ratio,
    add_mask_table,
    add_refit,
    any_precision,
    count,
    data_overrides,
    decimal,
    number,
    positive,
    share,
)
from piad.distillation import DISTILLATION_TYPES
from piad.regimes import REGIMES
from piad.sampling import SAMPLING
from size_arguments import add_size_arguments

# The paper's recipe, DeiT's where the paper says nothing. DeiT-B trains 150 epochs of PIAD: run_train.sh says so.
RECIPES = {
    "pretrain": {"epochs": 300, "lr": 5e-4, "min_lr": 1e-5, "warmup_epochs": 5, "drop_path": 0.1, "ema_decay": 0.99996},
    "piad": {"epochs": 300, "lr": 5e-4, "min_lr": 1e-5, "warmup_epochs": 0, "drop_path": 0.0, "ema_decay": 0.99996},
    "finetune": {"epochs": 30, "lr": 5e-5, "min_lr": 1e-6, "warmup_epochs": 0, "drop_path": 0.1, "ema_decay": 0.0},
}
# Flags that are for stage piad alone, or for a teacher.
PIAD_ALONE = ("dropout_ratio", "regime", "progressive_epochs", "op_code_sampling", "sizes_per_step", "op_code_per_rank")
TEACHER_ALONE = ("distillation_alpha", "distillation_tau")


def parse_main_arguments() -> argparse.Namespace:
    """main.py's flags; the defaults of the optimization group are those of --stage."""
    parser = Parser(
        description="Train a vision transformer, train its super-network with PIAD, fine-tune or evaluate sub-networks."
    )
    group = parser.add_argument_group("what to do")
    group.add_argument(
        "--stage",
        choices=RECIPES,
        default="piad",
        help="pretrain: a plain model; piad: a super-network from contracted weights; finetune: one "
        "sub-network (default: %(default)s)",
    )
    group.add_argument("--eval", action="store_true", help="evaluate sub-networks instead of training")
    add_common_arguments(parser)
    _add_super_network_arguments(parser)
    add_size_arguments(parser)
    _add_distillation_arguments(parser)
    _add_optimization_arguments(parser)
    _add_augmentation_arguments(parser)
    _add_checkpoint_arguments(parser)
    # The stage is parsed first, on its own, so that --help shows the defaults of that stage.
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--stage", default="piad")
    parser.set_defaults(**RECIPES.get(first.parse_known_args()[0].stage, {}))
    args = parser.parse_args()
    _check_ignored(parser, args)
    return args


def _check_ignored(parser: Parser, args: argparse.Namespace) -> None:
    """Ends the program where a flag is given that the stage does not use, or that is for a teacher without one."""
    ignored = {}
    if args.stage != "piad" and not args.eval:
        ignored |= dict.fromkeys(PIAD_ALONE, f"is for --stage piad, not {args.stage}: leave it out")
    if args.distillation_type == "none":
        ignored |= dict.fromkeys(TEACHER_ALONE, "is for a teacher: give --distillation-type, or leave it out")
    for name, why in ignored.items():
        value = getattr(args, name)
        if value != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} {'' if value is True else f'{value} '}{why}")


def _add_super_network_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("super-network")
    add_mask_table(group)
    group.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="with --eval: other weights of the same model, such as those that training started from, cut to the same "
        "widths (compensated, where their folder has a compensation) and evaluated for comparison; of a sub-network "
        "also the whole network that its fidelity refers to",
    )
    group.add_argument(
        "--compare",
        type=Path,
        metavar="DIR",
        help="with --eval: the folder of another evaluation on the same images, whose sizes are drawn beside these",
    )
    group.add_argument(
        "--frontier", type=positive, metavar="N", help="N sizes evenly spaced in MACs, besides those of the other flags"
    )
    add_refit(group)
    group.add_argument(
        "--write-sub-networks", action="store_true", help="with --eval: also write each size as a folder, op_<code>/"
    )
    add_dropout_ratio(group, 0.875)  # the paper's
    group.add_argument(
        "--regime",
        choices=REGIMES,
        default="piad",
        help="what a step trains: a sub-network of the mask table (piad), or, for comparison, the whole network (none) "
        "or one without randomly drawn units or modules, on average as many as with piad (default: %(default)s)",
    )
    group.add_argument(
        "--progressive-epochs",
        type=count,
        default=50,
        metavar="N",
        help="number of epochs over which the dropout list grows, P_e; 0: train the sizes of the mask table that comes "
        "with the weights, or of --mask-table (default: %(default)s)",
    )
    group.add_argument(
        "--op-code-sampling",
        choices=SAMPLING,
        default="uniform",
        help="how the op code of a step is drawn: uniformly; uniformly in the logarithm of its MACs, which trains "
        "small networks more often; or uniformly in 1 / MACs, which trains them even more (default: %(default)s)",
    )
    group.add_argument(
        "--sizes-per-step",
        type=positive,
        default=1,
        metavar="N",
        help="number of op codes that a step trains on the same images, each drawn from its own part of the sizes; a "
        "step of N takes about N times as long (default: %(default)s)",
    )
    group.add_argument(
        "--op-code-per-rank",
        action="store_true",
        help="each process draws an op code of its own, as in the paper (default: one for all, so that none waits)",
    )


def _add_distillation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("distillation (DeiT's flags)")
    group.add_argument(
        "--teacher-model",
        metavar="NAME",
        help="self: the network as it was at the start (of finetune: the whole network); else timm's name of the model "
        "of --teacher-path or, without that, of timm's pretrained weights",
    )
    group.add_argument("--teacher-path", type=Path, metavar="PATH", help="weights of the teacher, as of --checkpoint")
    group.add_argument(
        "--distillation-type",
        choices=DISTILLATION_TYPES,
        default="none",
        help="what is learned from the teacher: its prediction, or the features and tokens of a model without a head "
        "(soft), or the class that it predicts (hard) (default: %(default)s)",
    )
    group.add_argument(
        "--distillation-alpha",
        type=share,
        default=0.5,
        metavar="X",
        help="weight of the teacher, 1 - X is that of the labels; with 1 no label is used, and sizes are evaluated by "
        "how near they come to the teacher (default: %(default)s)",
    )
    group.add_argument(
        "--distillation-tau",
        type=number(float, 1e-3),
        default=1.0,
        metavar="T",
        help="temperature of the predictions, of type soft (default: %(default)s)",
    )
    group.add_argument(
        "--distillation-tokens",
        type=decimal,
        default=0.0,
        metavar="X",
        help="also learn the teacher's tokens: after four of the blocks, the squared distance from them, relative to "
        "their length, is added to the loss with this weight; the teacher must have the same number and size of blocks "
        "(default: %(default)s)",
    )


def _add_optimization_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization (defaults: the stage's recipe)")
    group.add_argument("--epochs", type=positive, metavar="N", help="epochs to train (default: %(default)s)")
    group.add_argument("--opt", default="adamw", help="timm's name of the optimizer (default: %(default)s)")
    group.add_argument(
        "--lr",
        type=decimal,
        metavar="X",
        help="learning rate for 512 images per step; scaled linearly with the images per step (default: %(default)s)",
    )
    group.add_argument(
        "--min-lr",
        type=decimal,
        metavar="X",
        help="learning rate at the end of the cosine schedule, not scaled (default: %(default)s)",
    )
    group.add_argument(
        "--warmup-epochs", type=count, metavar="N", help="epochs of linear warm-up from 1e-6 (default: %(default)s)"
    )
    group.add_argument(
        "--sched-on-updates",
        action="store_true",
        help="change the learning rate after each step instead of each epoch, for runs of few epochs",
    )
    group.add_argument(
        "--freeze-embedding",
        action="store_true",
        help="do not train what comes before the first block, such as the embedding of patches and positions, which "
        "no sub-network cuts",
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
    group.add_argument(
        "--grad-accum-steps",
        type=positive,
        default=1,
        metavar="N",
        help="parts of --batch-size images that make a step: the gradients of N parts are added up (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="compute activations again for the backward pass: less memory, more time",
    )
    group.add_argument("--channels-last", action="store_true", help="keep images and weights in this memory layout")
    group.add_argument(
        "--torchcompile",
        "--compile",
        dest="compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the model (of pretrain and finetune) and the teacher with torch.compile",
    )
    add_amp(group, any_precision, "bfloat16 for training on CUDA, else none, which is float32")


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
        help="repeated augmentation: how often an image comes in an epoch, 0 = off (default: %(default)s)",
    )


def _add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints and logs")
    group.add_argument(
        "--resume", metavar="FILE", help="a checkpoint of this run to resume; auto: the newest in --output-dir, if any"
    )
    group.add_argument(
        "--checkpoint-steps",
        type=count,
        default=0,
        metavar="N",
        help="also save a checkpoint every N steps; 0 = at the end of each epoch only (default: %(default)s)",
    )
    group.add_argument(
        "--keep-every",
        type=count,
        default=0,
        metavar="N",
        help="besides the last two and the best, keep the checkpoint of every N-th epoch; 0 = none (default: 0)",
    )
    group.add_argument(
        "--eval-every",
        type=positive,
        default=1,
        metavar="N",
        help="evaluate every N epochs (default: %(default)s)",
    )


def words_to_open(args: argparse.Namespace) -> list[str]:
    """The flags that open the same network on the same data again, without sizes, speed and output folder."""
    words = ["--model-kwargs", *(f"{key}={value}" for key, value in args.model_kwargs.items())]
    words = words if args.model_kwargs else []
    given = {key: getattr(args, key) for key in ("model", "checkpoint", "mask_table", "data_set", "data_path")}
    given |= data_overrides(args)
    given |= {"seed": args.seed} if args.seed else {}  # images are held back and drawn by it
    given |= {"proxy_samples": args.proxy_samples} if args.refit is not False else {}
    for key, value in given.items():
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{key.replace('_', '-')}", *map(str, values)]
    words += ["--eval-ema"] if args.use_ema else []
    words += [] if args.refit is False else ["--refit", str(args.refit)] if args.refit else ["--refit"]
    return words + ([] if args.compensate is None else ["--compensate" if args.compensate else "--no-compensate"])
