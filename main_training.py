"""What a training run of main.py is made of, as the flags say: teacher, optimizer, loss, augmentation, evaluation."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import supernet
from engine import SCORES, evaluate
from fidelity import Evaluator
from models.backbone import Backbone, heads_of
from models.elastic import make_plain
from models.extraction import extract
from models.parts import EMBEDDING
from models.targets import outputs_of
from piad.distillation import Distillation, StudentOutputs, Teacher, check_teacher
from piad.progressive import ProgressiveDropout
from supernet import Network
from supernet.selection import largest_within
from training import BothHeads, Training
from utils import UserError, first_line, say, world

# No buffer changes in training, and the factors of compensation among them are large: they are not sent at each step.
CONSTANT_BUFFERS = {"broadcast_buffers": False}
if "forward_sync_buffers" in signature(DistributedDataParallel).parameters:  # its name since PyTorch 2.14
    CONSTANT_BUFFERS = {"forward_sync_buffers": False}
# Sizes that PIAD is evaluated at besides the whole network and the smallest, once the table reaches them.
FIXED_SHARES = {"half": 0.5, "quarter": 0.25}
Measure = Callable[[Backbone], dict[str, float]]


def uses_labels(args: argparse.Namespace) -> bool:
    """Whether the loss uses labels: not where a teacher alone teaches."""
    return args.distillation_type == "none" or args.distillation_alpha < 1


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that contradict each other."""
    for name in ("scale", "ratio"):
        low, high = getattr(args, name)
        if not 0 < low <= high:
            raise UserError(f"--{name} {low:g} {high:g}: give two numbers above 0, the larger one last")
    if args.compile and args.compile not in (known := torch.compiler.list_backends(exclude_tags=())):
        names = ", ".join(known)
        raise UserError(f"--torchcompile {args.compile} is not a backend of torch.compile; these are: {names}")
    teacher = args.teacher_model or args.teacher_path
    if args.distillation_type == "none" and teacher:
        flag = "--teacher-model" if args.teacher_model else "--teacher-path"
        raise UserError(f"{flag} {teacher} is given without --distillation-type: give soft or hard, or leave it out")
    if args.distillation_type != "none" and not teacher:
        raise UserError(
            f"--distillation-type {args.distillation_type} needs a teacher: give --teacher-model self or --teacher-path"
        )
    if args.distillation_tokens and not teacher:
        raise UserError(
            f"--distillation-tokens {args.distillation_tokens:g} needs a teacher: give --teacher-model self or "
            "--teacher-path, with --distillation-type"
        )
    if args.distillation_type == "hard" and args.distillation_tau != 1:
        raise UserError(f"--distillation-tau {args.distillation_tau:g} is for --distillation-type soft: leave it out")
    if args.teacher_model == "self" and args.teacher_path:
        raise UserError(f"--teacher-model self is the network itself: leave --teacher-path {args.teacher_path} out")
    if args.stage != "piad":
        return
    if args.compile and not teacher:
        raise UserError(
            "--torchcompile: piad trains another network at each step, so only a teacher is compiled: leave it out"
        )
    if args.compensate and args.progressive_epochs > 0:
        raise UserError(
            "--compensate: a mask table that grows is for sub-networks as they are cut: give --progressive-epochs 0, "
            "or leave --compensate out"
        )
    if args.sizes_per_step > 1 and args.regime != "piad":
        raise UserError(f"--sizes-per-step {args.sizes_per_step} is for --regime piad, not {args.regime}: give 1")
    if args.progressive_epochs == 0 and args.regime != "piad":
        raise UserError(f"--progressive-epochs 0 is for --regime piad, not {args.regime}: give 1 or more")
    if args.progressive_epochs > 0 and not uses_labels(args):
        raise UserError(
            f"--progressive-epochs {args.progressive_epochs} grows the mask table by the cross-entropy of labels, "
            "which --distillation-alpha 1 does not use: give 0, and weights with a mask table (reparam.py --method "
            "best --mask-table)"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The teacher


def open_teacher(args: argparse.Namespace, whole: Network) -> Backbone | None:
    """The network that teaches, on the CPU; None without one. whole: what the stage starts from, not yet changed.

    Raises UserError where the whole network of a sub-network is not known, and for a teacher that reads other images.
    """
    if args.distillation_type == "none":
        return None
    if args.teacher_model == "self":
        if whole.is_subnetwork:
            raise UserError(
                f"--teacher-model self: {args.checkpoint} is a sub-network, and the whole network that it was cut from "
                "is not known: give that as --teacher-path"
            )
        if args.checkpoint is None and not args.pretrained:
            raise UserError("--teacher-model self: new weights teach nothing: give --checkpoint or --pretrained")
        if args.stage == "finetune":  # it trains a cut, which has its own memory
            return whole.model
        return copy.deepcopy(whole.model)
    if args.teacher_path:
        teacher = supernet.load(args.teacher_path, name=args.teacher_model, plain_weights=True)
    else:
        teacher = supernet.create(args.teacher_model, pretrained=True)
    for key in ("mean", "std"):
        if teacher.preprocessing[key] != whole.preprocessing[key]:
            raise UserError(
                f"the teacher expects pixels of {key} {teacher.preprocessing[key]}, the model of "
                f"{whole.preprocessing[key]}, but both see the same image: give another teacher"
            )
    return teacher.model


def check_teaching(args: argparse.Namespace, teacher: Backbone, network: Network) -> None:
    """Raises UserError for a teacher that cannot teach the network that is trained. Both are on the CPU."""
    source = "the network at the start" if args.teacher_model == "self" else f"the teacher {words_of_teacher(args)}"
    if args.distillation_type == "hard" and network.target != "logits":
        raise UserError(
            f"--distillation-type hard needs classes, but the target of the network is its {network.target}: give soft"
        )
    if args.distillation_tau != 1 and network.target != "logits":
        raise UserError(
            f"--distillation-tau {args.distillation_tau:g} is for classes, but the target of the network is its "
            f"{network.target}: leave it out"
        )
    mend = "give a teacher with as many"
    if args.checkpoint is None and not uses_labels(args):  # new weights, whose number of classes no data set says
        mend += f", or --model-kwargs num_classes={teacher.num_classes}"
    tokens = args.distillation_tokens > 0
    check_teacher(teacher, network.model, network.target, source, tokens=tokens, mend=mend)


def words_of_teacher(args: argparse.Namespace) -> str:
    return str(args.teacher_path or args.teacher_model)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer, loss, augmentation


def start_training(
    args: argparse.Namespace,
    model: Backbone,
    num_classes: int,
    device: torch.device,
    teacher: Backbone | None = None,
    target: str = "logits",
) -> Training:
    """Optimizer, loss, Mixup, averaged weights and gradient scaler, as the flags say.

    teacher: see open_teacher().  target: what the model learns from it.
    """
    _, processes = world()
    if device.type == "cpu" and args.amp is not None:
        use_plain_attention(model)
    if args.freeze_embedding:
        freeze_embedding(model)
    if target != "logits":
        for head in heads_of(model):  # they get no gradient, and DDP would wait for one
            head.requires_grad_(False)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    images = args.batch_size * args.grad_accum_steps * processes
    lr = args.lr * images / 512
    say(
        f"{images} images per step ({args.batch_size} x {args.grad_accum_steps} parts x {processes} processes), "
        f"learning rate {lr:.3g}"
    )
    try:
        optimizer = create_optimizer_v2(model, opt=args.opt, lr=lr, weight_decay=args.weight_decay)
    except (AssertionError, ValueError) as error:
        raise UserError(f"--opt {args.opt}: timm cannot make it: {first_line(error)}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"--opt {args.opt} needs second-order gradients, which this loop does not compute")
    mixup = None
    loss_fn: nn.Module = LabelSmoothingCrossEntropy(args.smoothing)
    if args.mixup > 0 or args.cutmix > 0:
        if args.batch_size * args.grad_accum_steps % 2:
            raise UserError(
                f"--batch-size {args.batch_size} is odd: Mixup needs pairs; use an even one or --mixup 0 --cutmix 0"
            )
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=max(num_classes, 1))
        loss_fn = SoftTargetCrossEntropy()
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
        loss_fn = loss_fn if teacher is not None else BothHeads(loss_fn)
    distillation = None
    if teacher is not None:
        make_plain(teacher)  # without the factors of compensation, which the whole network does not use
        teacher.to(device)
        tokens = args.distillation_tokens > 0
        taught = Teacher(teacher, target, args.amp, tokens)
        taught.run = torch.compile(outputs_of, backend=args.compile) if args.compile else outputs_of
        distillation = Distillation(
            taught, args.distillation_type, args.distillation_alpha, args.distillation_tau, args.distillation_tokens
        )
    return Training(
        model,
        optimizer,
        loss_fn,
        device,
        args.seed,
        amp=args.amp,
        scaler=torch.amp.GradScaler(device.type) if args.amp == torch.float16 else None,
        ema=ModelEmaV3(model, decay=args.ema_decay, use_warmup=True) if args.ema_decay else None,
        mixup=mixup,
        clip_grad=args.clip_grad,
        labels=uses_labels(args),
        distillation=distillation,
        runner=model if teacher is None else StudentOutputs(model, target, tokens),
        grad_accum_steps=args.grad_accum_steps,
        grad_checkpointing=args.grad_checkpointing,
        layout=layout,
    )


def use_plain_attention(model: nn.Module) -> None:
    """Turns fused attention off: its backward pass in PyTorch is slow in half precision on a CPU."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def freeze_embedding(model: nn.Module) -> None:
    """Stops the training of everything before the first block."""
    for name, parameter in model.named_parameters():
        if name.startswith(EMBEDDING):
            parameter.requires_grad_(False)


def wrap_runner(args: argparse.Namespace, training: Training) -> None:
    """Makes what a step calls distributed and compiled, as the flags say."""
    if args.distributed:
        device_ids = [training.device] if training.device.type == "cuda" else None
        training.runner = DistributedDataParallel(training.runner, device_ids=device_ids, **CONSTANT_BUFFERS)
    if args.compile and args.stage != "piad":  # piad runs another network at each step
        training.runner = torch.compile(training.runner, backend=args.compile)


def augmentation(args: argparse.Namespace) -> dict[str, Any]:
    """The augmentation flags, under timm.data.create_loader's names."""
    return {
        "auto_augment": None if args.aa == "none" else args.aa,
        "color_jitter": args.color_jitter,
        "scale": args.scale,
        "ratio": args.ratio,
        "hflip": args.hflip,
        "re_prob": args.reprob,
        "re_mode": "pixel",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation after an epoch


def measure_of(training: Training, val: DataLoader, amp: torch.dtype | None) -> Measure:
    """What evaluates a model on the device: its accuracy or, in a run without labels, how near it is to the teacher."""
    if training.labels:
        return partial(evaluate, batches=val, device=training.device, amp=amp)
    teacher = training.distillation.teacher
    amps = {"amp": amp, "whole_amp": teacher.amp}  # the teacher's weights stay in the dtype of training
    return Evaluator(teacher.target, val, training.device, labels=False, whole=teacher.model, **amps)


def evaluate_epoch(training: Training, piad: ProgressiveDropout | None, measure: Measure) -> dict[str, float]:
    """What is found after an epoch, and under names with ema_ for the averaged weights, where there are any."""
    evaluate_model = partial(evaluate_piad, piad, measure=measure) if piad else measure
    line = evaluate_model(training.model)
    if training.ema is not None:
        line |= {f"ema_{key}": value for key, value in evaluate_model(training.ema.module).items()}
    return line


def evaluate_piad(piad: ProgressiveDropout, model: Backbone, measure: Measure) -> dict[str, float]:
    """What is found for a super-network in training: whole, at half and a quarter of its MACs, and the smallest.

    top1, or what stands for it without labels, is the mean of the whole and the smallest.
    """
    line: dict[str, float] = {}
    sizes = {"full": 0, "smallest": -1}
    for name, share in FIXED_SHARES.items():
        if piad.macs_share(-1) <= share:  # the table reaches so far by now
            sizes[name] = largest_within(piad.model, piad.table, {"macs": share * piad.network_macs})
    for name, op_code in sizes.items():
        # Cut, a size is compensated once, and not with each batch.
        small = extract(model, piad.table.widths(op_code), share_memory=True)
        line |= {f"{key}_{name}": value for key, value in measure(small).items()}
    scores = [key for key in SCORES if f"{key}_full" in line]
    return line | {key: (line[f"{key}_full"] + line[f"{key}_smallest"]) / 2 for key in scores}
