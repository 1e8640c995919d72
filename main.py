"""Trains (pretrain | piad | finetune) and evaluates: what each stage builds and runs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from arguments import open_network
from datasets import Images, TrainLoader, check_labels, eval_loader, open_splits, proxy_set
from engine import Run, evaluate
from files import CheckpointFolder, check_output_dir, only_run_in
from logs import RunLog
from main_arguments import parse_main_arguments
from models.backbone import Backbone, full_widths
from models.elastic import make_elastic, set_widths
from models.loading import fit_head
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout
from piad.regimes import REGIMES
from report.frontier import evaluate_command
from supernet import Network
from supernet.amounts import format_amount
from supernet.budgets import asks_for_size, chosen_op_codes
from supernet.facts import stamp_of_run
from supernet.selection import largest_within
from training import BothHeads, Progress, Training
from utils import (
    Interruptible,
    UserError,
    first_line,
    init_processes,
    is_main_process,
    run_program,
    say,
    seed_everything,
    world,
)
from wpac.refit import refit, refit_grade

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Flags that do not change what a run computes, and those that the description of the network replaces.
NOT_SETTINGS = {
    *("output_dir", "resume", "checkpoint_steps", "keep_every", "eval_every", "eval", "frontier", "baseline"),
    *("device", "workers", "rank", "local_rank", "world_size", "distributed"),
    *("data_path", "index", "checkpoint", "mask_table", "knn_images"),
    *("mean", "std", "interpolation", "crop_pct"),
}
# Sizes that PIAD is evaluated at besides the whole network and the smallest, once the table reaches them.
FIXED_SHARES = {"half": 0.5, "quarter": 0.25}


def main() -> None:
    args = parse_main_arguments()
    device = init_processes(args)
    seed_everything(args.seed)
    check_output_dir(args.output_dir)
    if args.eval:
        evaluate_command(args, device)
    else:
        train_command(args, device)


def train_command(args: argparse.Namespace, device: torch.device) -> None:
    """Builds what the stage needs and runs its epochs; with --resume it continues from the checkpoint."""
    train_images, val_images = open_splits(args.data_set, args.data_path, index=args.index, seed=args.seed)
    check_labels(train_images, args.data_set, f"--stage {args.stage}", "give a data set with a folder per class")
    whole = open_start(args, train_images.num_classes)
    config = whole.preprocessing
    loading = {"batch_size": args.batch_size, "workers": args.workers}
    loader = TrainLoader(train_images, config, augmentation(args), seed=args.seed, repeats=args.repeated_aug, **loading)
    val = Interruptible(eval_loader(val_images, config, **loading))
    network = trained_network(args, whole, train_images.num_classes)
    model = network.model.to(device)
    settings = settings_of(args, network)
    files = CheckpointFolder(args.output_dir, settings, args.keep_every)
    state = files.to_resume(args.resume)
    if args.refit is not False and args.stage == "finetune" and state is None:
        images = (images for images, _ in proxy_batches(args, train_images, config))
        refit(whole.model, model, images, whole.target, args.refit)
    training = start_training(args, model, train_images.num_classes, device)
    piad = None
    if args.stage == "piad":
        table = MaskTable.from_json(state.get("mask_table")) if state else None
        proxy = proxy_batches(args, train_images, config)
        piad = REGIMES[args.regime](
            model, proxy, ratio=args.dropout_ratio, epochs=args.progressive_epochs, seed=args.seed, table=table
        )
        piad.table.meta["stamp"] = settings["stamp"]
    scheduler, _ = create_scheduler_v2(
        training.optimizer,
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=min(1e-6, args.min_lr),
    )
    progress = Progress()
    if state:
        training.load_state_dict(state)
        progress = Progress.from_state(state)
        check_processes(len(state["losses"]), progress, loader.steps)
    if args.distributed:
        device_ids = [device] if device.type == "cuda" else None
        training.model = DistributedDataParallel(model, device_ids=device_ids)
    with only_run_in(args.output_dir):
        Run(
            training,
            loader,
            files,
            RunLog(args.output_dir, progress.epoch, progress.epoch * loader.steps + progress.step),
            scheduler,
            progress,
            evaluate_epoch=partial(evaluate_epoch, training, piad, val),
            regime=piad,
            eval_every=args.eval_every,
            checkpoint_steps=args.checkpoint_steps,
            draw_widths=partial(widths_picture, piad) if piad else None,
        ).fit(args.epochs)
        if args.stage == "finetune":
            finish_finetune(args, network, training, val)


def open_start(args: argparse.Namespace, num_classes: int) -> Network:
    """The network that the stage starts from, on the CPU."""
    if args.stage != "pretrain" and args.checkpoint is None:
        needed = "contracted weights, as reparam.py writes them" if args.stage == "piad" else "a super-network"
        raise UserError(f"--checkpoint is missing: {args.stage} starts from {needed}")
    return open_network(args, num_classes, plain_weights=args.stage != "finetune", drop_path=args.drop_path)


def trained_network(args: argparse.Namespace, whole: Network, num_classes: int) -> Network:
    """What the stage trains: the network itself, made elastic for piad, or the sub-network that finetune cuts."""
    if args.stage != "finetune":
        fit_head(whole.model, num_classes, remake=args.stage == "pretrain")
        if args.stage == "piad":
            if whole.is_subnetwork:
                raise UserError(f"{args.checkpoint} is a sub-network: piad starts from contracted weights")
            make_elastic(whole.model)
        return replace(whole, method="piad" if args.stage == "piad" else None, averaged=False, target="logits")
    op_codes = chosen_op_codes(args, whole)
    if len(op_codes) != 1 or not (asks_for_size(args) or whole.is_subnetwork):
        raise UserError(
            "finetune trains one size: give --op-code, or one value of --macs-ratio, --macs, --params, --memory, "
            "--latency, --throughput, or of several of them"
        )
    small = whole.subnetwork(op_codes[0], grade=whole.grade if args.refit is False else refit_grade(args.refit))
    fit_head(small.model, num_classes, remake=True)
    return replace(small, target="logits")


def check_processes(before: int, progress: Progress, steps: int) -> None:
    """Says what another number of processes changes for a run that resumes; raises UserError within an epoch."""
    _, processes = world()
    if before == processes:
        return
    if progress.step:
        raise UserError(
            f"the checkpoint is of step {progress.step} of an epoch of {before} processes, this run has {processes}: "
            "resume it with as many, or from the end of an epoch"
        )
    say(
        f"resuming with {processes} processes instead of {before}: an epoch has {steps} steps from now on, and the "
        "learning rate is scaled to the images per step"
    )


def start_training(args: argparse.Namespace, model: Backbone, num_classes: int, device: torch.device) -> Training:
    """Optimizer, loss, Mixup, averaged weights and gradient scaler, as the flags say."""
    _, processes = world()
    lr = args.lr * args.batch_size * processes / 512
    try:
        optimizer = create_optimizer_v2(model, opt=args.opt, lr=lr, weight_decay=args.weight_decay)
    except (AssertionError, ValueError) as error:
        raise UserError(f"--opt {args.opt}: timm cannot make it: {first_line(error)}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"--opt {args.opt} needs second-order gradients, which this loop does not compute")
    mixup = None
    loss_fn: nn.Module = LabelSmoothingCrossEntropy(args.smoothing)
    if args.mixup > 0 or args.cutmix > 0:
        if args.batch_size % 2:
            raise UserError(
                f"--batch-size {args.batch_size} is odd: Mixup needs pairs; use an even one or --mixup 0 --cutmix 0"
            )
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)
        loss_fn = SoftTargetCrossEntropy()
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
        loss_fn = BothHeads(loss_fn)
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
    )


def settings_of(args: argparse.Namespace, network: Network) -> dict[str, Any]:
    """What decides the result of a run, as plain values, with the description of the network that is trained."""
    settings = {
        key: str(value) if isinstance(value, Path | torch.dtype) else list(value) if isinstance(value, tuple) else value
        for key, value in vars(args).items()
        if key not in NOT_SETTINGS
    }
    settings |= network.describe()
    if network.is_subnetwork:
        settings |= {"widths": full_widths(network.model), "grade": network.grade, **network.facts}
    if args.stage == "piad":
        settings["stamp"] = stamp_of_run(network.model.parameters(), settings)
    return settings


def proxy_batches(args: argparse.Namespace, images: Images, config: dict[str, Any]) -> Interruptible:
    """The proxy set in batches (B, C, height, width), for the stages that need one."""
    proxy = proxy_set(images, args.proxy_samples, args.seed)
    return Interruptible(eval_loader(proxy, config, batch_size=args.batch_size, workers=args.workers))


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


def evaluate_epoch(training: Training, piad: ProgressiveDropout | None, val: DataLoader) -> dict[str, float]:
    """The accuracy after an epoch, and under names with ema_ that of the averaged weights, where there are any."""
    evaluate_model = partial(evaluate_piad, piad) if piad else evaluate
    line = evaluate_model(unwrap_model(training.model), val, training.device, training.amp)
    if training.ema is not None:
        averaged = evaluate_model(training.ema.module, val, training.device, training.amp)
        line |= {f"ema_{key}": value for key, value in averaged.items()}
    return line


def evaluate_piad(
    piad: ProgressiveDropout, model: Backbone, val: DataLoader, device: torch.device, amp: torch.dtype | None
) -> dict[str, float]:
    """The accuracy of a super-network in training: whole, at half and a quarter of its MACs, and of the smallest.

    top1 is the mean of the whole and the smallest.
    """
    line: dict[str, float] = {}
    sizes = {"full": 0, "smallest": -1}
    for name, share in FIXED_SHARES.items():
        if piad.macs_share(-1) <= share:  # the table reaches so far by now
            sizes[name] = largest_within(piad.model, piad.table, {"macs": share * piad.network_macs})
    for name, op_code in sizes.items():
        set_widths(model, piad.table.widths(op_code))
        results = evaluate(model, val, device, amp)
        line |= {f"{key}_{name}": value for key, value in results.items()}
    return line | {"top1": (line["top1_full"] + line["top1_smallest"]) / 2}


def widths_picture(piad: ProgressiveDropout) -> Figure:
    """The widths of all sizes so far."""
    from report.plots import draw_widths  # here, because matplotlib is slow to import

    return draw_widths(piad.table.rows, piad.table.widths(0), list(map(str, range(len(piad.table)))), "op code")


def finish_finetune(args: argparse.Namespace, network: Network, training: Training, val: DataLoader) -> None:
    """Writes the trained sub-network as a folder: of the raw and the averaged weights those with the higher top-1."""
    small, kind = network.model, "raw"
    accuracy = evaluate(small, val, training.device)
    if training.ema is not None:
        averaged = evaluate(training.ema.module, val, training.device)
        say(f"top-1 of the raw weights {accuracy['top1']:.2f} %, of the averaged weights {averaged['top1']:.2f} %")
        if averaged["top1"] > accuracy["top1"]:
            small, kind, accuracy, network.averaged = training.ema.module, "averaged", averaged, True
    if not is_main_process():
        return
    facts = {"grade": f"{network.grade}, then fine-tuned", "accuracy": accuracy, "data_set": args.data_set}
    saved = network.save(args.output_dir, small, **facts)
    say(
        f"written ({kind} weights): {args.output_dir}/model.safetensors, config.json and model.py: "
        f"{format_amount(saved['macs']['linear'])} MACs, {format_amount(saved['params'])} parameters, "
        f"top-1 {accuracy['top1']:.2f} %"
    )


if __name__ == "__main__":
    run_program(main)
