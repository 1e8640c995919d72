"""Trains (pretrain | piad | finetune) and evaluates: what each stage builds and runs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader

from arguments import open_network
from datasets import Images, TrainLoader, check_labels, eval_loader, open_splits, proxy_set
from engine import Run, score_of
from files import CheckpointFolder, check_output_dir, only_run_in
from logs import RunLog
from main_arguments import parse_main_arguments
from main_training import (
    augmentation,
    check_flags,
    check_teaching,
    evaluate_epoch,
    measure_of,
    open_teacher,
    start_training,
    uses_labels,
    wrap_runner,
)
from models.backbone import Backbone, full_widths
from models.elastic import make_elastic
from models.loading import fit_head
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout
from piad.regimes import REGIMES
from report.frontier import evaluate_command
from report.measures import measures_of
from supernet import Network
from supernet.amounts import format_amount
from supernet.budgets import asks_for_size, chosen_op_codes
from supernet.facts import stamp_of, stamp_of_run
from supernet.saving import save_compensation_of_run
from training import Progress, Training
from utils import (
    Interruptible,
    UserError,
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
    *("data_path", "index", "checkpoint", "mask_table", "knn_images", "teacher_path"),
    *("mean", "std", "interpolation", "crop_pct"),
}


def main() -> None:
    args = parse_main_arguments()
    device = init_processes(args)
    if args.amp is None and device.type == "cuda" and not args.eval:
        args.amp = torch.bfloat16
    args.amp = None if args.amp == torch.float32 else args.amp
    seed_everything(args.seed)
    check_output_dir(args.output_dir)
    if args.eval:
        evaluate_command(args, device)
    else:
        train_command(args, device)


def train_command(args: argparse.Namespace, device: torch.device) -> None:
    """Builds what the stage needs and runs its epochs; with --resume it continues from the checkpoint."""
    check_flags(args)
    train_images, val_images = open_splits(args.data_set, args.data_path, index=args.index, seed=args.seed)
    labels = uses_labels(args)
    if labels:
        mend = "give a data set with a folder per class, or a teacher with --distillation-alpha 1"
        check_labels(train_images, args.data_set, f"--stage {args.stage}", mend)
    classes = train_images.num_classes if labels else None
    whole = open_start(args, classes)
    teacher = open_teacher(args, whole)
    config = whole.preprocessing
    images_per_step, workers = args.batch_size * args.grad_accum_steps, args.workers
    loading = {"batch_size": images_per_step, "workers": workers, "seed": args.seed, "repeats": args.repeated_aug}
    loader = TrainLoader(train_images, config, augmentation(args), **loading)
    val = Interruptible(eval_loader(val_images, config, batch_size=args.batch_size, workers=workers))
    network = trained_network(args, whole, classes)
    args.compensate = whole.grade == "compensated"
    settings = settings_of(args, network)
    if teacher is not None:
        check_teaching(args, teacher, network)
        settings["teacher_stamp"] = stamp_of(teacher.parameters())
    model = network.model.to(device)
    files = CheckpointFolder(args.output_dir, settings, args.keep_every)
    state = files.to_resume(args.resume)
    if args.stage == "finetune":
        network.grade = grade_of_start(args, whole, network, train_images, state)
        settings["grade"] = network.grade  # saved, and not compared, since it depends on what refitting did
    training = start_training(args, model, model.num_classes, device, teacher, network.target)
    piad = start_piad(args, whole, model, train_images, state) if args.stage == "piad" else None
    if piad:
        piad.table.meta["stamp"] = settings["stamp"]
    scheduler, _ = create_scheduler_v2(
        training.optimizer,
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=min(1e-6, args.min_lr),
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=loader.steps,
    )
    progress = Progress()
    if state:
        training.load_state_dict(state)
        progress = Progress.from_state(state)
        check_processes(len(state["losses"]), progress, loader.steps)
    wrap_runner(args, training)
    with only_run_in(args.output_dir):
        if piad:
            save_compensation_of_run(model, args.output_dir, settings["stamp"])
        Run(
            training,
            loader,
            files,
            RunLog(args.output_dir, progress.epoch, progress.epoch * loader.steps + progress.step),
            scheduler,
            progress,
            evaluate_epoch=partial(evaluate_epoch, training, piad, measure_of(training, val, args.amp)),
            regime=piad,
            eval_every=args.eval_every,
            checkpoint_steps=args.checkpoint_steps,
            draw_widths=partial(widths_picture, piad) if piad else None,
        ).fit(args.epochs)
        if args.stage == "finetune":
            finish_finetune(args, network, training, val)


def open_start(args: argparse.Namespace, num_classes: int | None) -> Network:
    """The network that the stage starts from, on the CPU. num_classes: of new weights, None for timm's number."""
    if args.stage != "pretrain" and args.checkpoint is None:
        needed = "contracted weights, as reparam.py writes them" if args.stage == "piad" else "a super-network"
        raise UserError(f"--checkpoint is missing: {args.stage} starts from {needed}")
    keeps_table = args.stage == "piad" and args.progressive_epochs == 0
    plain_weights = args.stage != "finetune" and not keeps_table
    return open_network(args, num_classes, plain_weights=plain_weights, drop_path=args.drop_path)


def trained_network(args: argparse.Namespace, whole: Network, num_classes: int | None) -> Network:
    """What the stage trains: the network itself, made elastic for piad, or the sub-network that finetune cuts.

    num_classes: of the labels that it learns; None without labels, where its head and its target stay as they are.
    """
    target = whole.target if num_classes is None else "logits"
    if args.stage != "finetune":
        if num_classes is not None:
            fit_head(whole.model, num_classes, remake=args.stage == "pretrain")
        if args.stage == "piad":
            if whole.is_subnetwork:
                raise UserError(f"{args.checkpoint} is a sub-network: piad starts from contracted weights")
            make_elastic(whole.model)
        return replace(whole, method="piad" if args.stage == "piad" else None, averaged=False, target=target)
    op_codes = chosen_op_codes(args, whole)
    if len(op_codes) != 1 or not (asks_for_size(args) or whole.is_subnetwork):
        raise UserError(
            "finetune trains one size: give --op-code, or one value of --macs-ratio, --macs, --params, --memory, "
            "--latency, --throughput, or of several of them"
        )
    small = whole.subnetwork(op_codes[0], grade=whole.grade)
    if num_classes is not None:
        fit_head(small.model, num_classes, remake=True)
    return replace(small, target=target)


def grade_of_start(
    args: argparse.Namespace, whole: Network, network: Network, images: Images, state: dict[str, Any] | None
) -> str:
    """The grade of the sub-network that finetune starts from, refitted here, in place, if --refit asks for it.

    state: of a run that resumes, where that has been done.
    """
    if state:
        return state["settings"]["grade"]
    if args.refit is not False:
        batches = (images for images, _ in proxy_batches(args, images, whole.preprocessing))
        if refit(whole.model, network.model, batches, whole.target, args.refit).helped:
            return refit_grade(args.refit)
    return network.grade


def start_piad(
    args: argparse.Namespace, whole: Network, model: Backbone, images: Images, state: dict[str, Any] | None
) -> ProgressiveDropout:
    """The regime of stage piad, with the mask table of the run that resumes, or that of the weights where it stays."""
    table = MaskTable.from_json(state.get("mask_table")) if state else None
    if table is None and args.progressive_epochs == 0:
        table = whole.table
        if len(table) == 1:
            raise UserError(
                f"--progressive-epochs 0: the mask table of {args.checkpoint} has the whole network alone: make one "
                "with reparam.py --method best --mask-table, or let it grow"
            )
    return REGIMES[args.regime](
        model,
        proxy_batches(args, images, whole.preprocessing) if args.progressive_epochs else [],
        ratio=args.dropout_ratio,
        epochs=args.progressive_epochs,
        seed=args.seed,
        table=table,
        sampling=args.op_code_sampling,
        per_rank=args.op_code_per_rank,
        sizes_per_step=args.sizes_per_step,
    )


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


def settings_of(args: argparse.Namespace, network: Network) -> dict[str, Any]:
    """What decides the result of a run, as plain values, with the description of the network that is trained."""
    settings = {
        key: str(value) if isinstance(value, Path | torch.dtype) else list(value) if isinstance(value, tuple) else value
        for key, value in vars(args).items()
        if key not in NOT_SETTINGS
    }
    settings |= network.describe()
    if network.is_subnetwork:
        settings |= {"widths": full_widths(network.model), **network.facts}
    if args.stage == "piad":
        settings["stamp"] = stamp_of_run(network.model.parameters(), settings)
    return settings


def proxy_batches(args: argparse.Namespace, images: Images, config: dict[str, Any]) -> Interruptible:
    """The proxy set in batches (B, C, height, width), for the stages that need one."""
    proxy = proxy_set(images, args.proxy_samples, args.seed)
    return Interruptible(eval_loader(proxy, config, batch_size=args.batch_size, workers=args.workers))


def widths_picture(piad: ProgressiveDropout) -> Figure:
    """The widths of all sizes so far."""
    from report.plots import draw_widths  # here, because matplotlib is slow to import

    return draw_widths(piad.table.rows, piad.table.widths(0), list(map(str, range(len(piad.table)))), "op code")


def finish_finetune(args: argparse.Namespace, network: Network, training: Training, val: DataLoader) -> None:
    """Writes the trained sub-network as a folder: of the raw and the averaged weights those with the higher score."""
    measure = measure_of(training, val, amp=None)
    small, kind, found = network.model, "raw", measure(network.model)
    if training.ema is not None:
        averaged = measure(training.ema.module)
        say(f"{shown_score(found, ' of the raw weights')}, {shown_score(averaged, ' of the averaged weights')}")
        if score_of(averaged) > score_of(found):
            small, kind, found, network.averaged = training.ema.module, "averaged", averaged, True
    if not is_main_process():
        return
    ways = {"fine-tuned": training.labels, "distilled": training.distillation is not None}
    how = " and ".join(way for way, used in ways.items() if used)
    facts = {"grade": f"{network.grade}, then {how}", "data_set": args.data_set}
    facts["accuracy" if training.labels else "fidelity"] = found
    saved = network.save(args.output_dir, small, **facts)
    say(
        f"written ({kind} weights): {args.output_dir}/model.safetensors, config.json and model.py: "
        f"{format_amount(saved['macs_linear'])} MACs, {format_amount(saved['params'])} parameters, "
        f"{shown_score(found)}"
    )


def shown_score(found: dict[str, float], of: str = "") -> str:
    """The first measure of an evaluation in words."""
    key, measure = next(iter(measures_of(found).items()))
    return f"{measure.name}{of} {measure.with_unit(found[key])}"


if __name__ == "__main__":
    run_program(main)
