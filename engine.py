"""The training loop and the evaluation loop, shared by all stages."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import AverageMeter, accuracy, dispatch_clip_grad, unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F

from datasets import TrainLoader
from files import CheckpointFolder
from logs import RunLog
from piad.progressive import ProgressiveDropout
from training import Progress, Training
from utils import (
    Preempted,
    UserError,
    check_ranks_agree,
    checksum,
    mean_over_ranks,
    peak_memory,
    progress_bar,
    reduce_sum,
    seed_everything,
    stop_if_asked,
    stop_signals,
    world,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Run:
    """A training run: its epochs from `progress` on. Each epoch grows the mask table, trains, evaluates, logs, saves.

    evaluate_epoch() returns values for the log line of the epoch; the better of its "top1" and, where weights are
    averaged, "ema_top1" decides which epoch is the best.
    regime: how the sub-network of each step is chosen; None trains the model as it is.
    checkpoint_steps: also save every so many steps, 0 = only at the end of an epoch.
    draw_widths() returns a picture for TensorBoard after each evaluation.
    """

    training: Training
    loader: TrainLoader
    files: CheckpointFolder
    log: RunLog
    scheduler: Scheduler
    progress: Progress
    evaluate_epoch: Callable[[], dict[str, float]]
    regime: ProgressiveDropout | None = None
    eval_every: int = 1
    checkpoint_steps: int = 0
    draw_widths: Callable[[], Figure] | None = None

    def fit(self, epochs: int) -> None:
        """Runs until `epochs` are done. On a stop signal it saves and raises Preempted, which says how to resume."""
        if self.progress.step > self.loader.steps:
            place = f"step {self.progress.step} of an epoch, which has {self.loader.steps} of this data"
            raise UserError(f"the checkpoint stands at {place}: give the data of its run")
        with stop_signals():
            try:
                while self.progress.epoch < epochs:
                    self._run_epoch(last=self.progress.epoch + 1 == epochs)
            except Preempted as stop:
                if self.progress.step or not self.files.epochs():  # otherwise the last checkpoint is up to date
                    self._save()
                place = f"epoch {self.progress.epoch}, step {self.progress.step}"
                raise Preempted(f"{stop} at {place}, saved; the same command with --resume auto goes on") from stop
        self.log.close()

    def _run_epoch(self, last: bool) -> None:
        progress, epoch, steps = self.progress, self.progress.epoch, self.loader.steps
        self.scheduler.step(epoch)
        if self.regime and progress.step == 0:
            self.regime.begin_epoch(epoch)
        start, done_before = time.perf_counter(), progress.losses.count
        train_one_epoch(
            self.training,
            self.loader.batches(epoch, progress.step),
            epoch,
            steps=steps,
            losses=progress.losses,
            start_step=progress.step,
            choose=self.regime.choose if self.regime else None,
            after_step=self._after_step,
        )
        images_per_second = world()[1] * (progress.losses.count - done_before) / (time.perf_counter() - start)
        check_agreement(self.training, self.regime)
        line = {"epoch": epoch, "lr": self.training.optimizer.param_groups[0]["lr"]}
        line |= mean_over_ranks({"train_loss": progress.losses.avg})
        if self.training.scaler is not None:
            line["skipped_steps"] = self.training.skipped_steps
        line |= self.regime.epoch_scalars() if self.regime else {}
        last_step = (epoch + 1) * steps - 1
        if (epoch + 1) % self.eval_every == 0 or last:
            line |= self.evaluate_epoch()
            sizes = len(self.regime.table) if self.regime else 1
            # Accuracies of other sizes cannot be compared: while the mask table grows, the newest epoch is the best.
            top1 = max(line["top1"], line.get("ema_top1", 0.0))
            if sizes != progress.best_sizes or top1 > progress.best_top1:
                progress.best_epoch, progress.best_top1, progress.best_sizes = epoch, top1, sizes
            if self.draw_widths:
                self.log.figure("widths", self.draw_widths, last_step)
        self.log.epoch(line, last_step)
        self.log.machine(images_per_second, peak_memory(self.training.device), last_step)
        self._save(done=True)

    def _after_step(self, step: int, scalars: dict[str, float]) -> None:
        progress, steps = self.progress, self.loader.steps
        scalars = scalars | (self.regime.step_scalars() if self.regime else {})
        self.log.scalars(scalars, progress.epoch * steps + step)
        progress.step = step + 1
        if self.checkpoint_steps and progress.step % self.checkpoint_steps == 0 and progress.step < steps:
            self._save()
        stop_if_asked(collective=True)

    def _save(self, done: bool = False) -> None:
        """Writes checkpoint_<epoch>.pth, in the middle of the epoch or, `done`, at its end."""
        epoch = self.progress.epoch
        if done:
            self.progress.epoch, self.progress.step, self.progress.losses = epoch + 1, 0, AverageMeter()
        self.log.flush()  # a run that resumes from this checkpoint does not log again what came before it
        state = {**self.training.state_dict(), **self.progress.state_dict()}
        state |= self.regime.state_dict() if self.regime else {}
        self.files.save(epoch, state, self.progress.best_epoch)
        if self.regime:
            self.regime.save(self.files.folder)


def check_agreement(training: Training, regime: ProgressiveDropout | None) -> None:
    """Raises UserError, naming a rank, unless all ranks hold the same weights and mask table."""
    if world()[1] == 1:
        return
    check_ranks_agree("the weights", checksum(unwrap_model(training.model).parameters()))
    if regime:
        table = json.dumps(regime.state_dict(), sort_keys=True)
        check_ranks_agree("the mask tables", zlib.crc32(table.encode()))


def train_one_epoch(
    training: Training,
    batches: Iterable[tuple[Tensor, Tensor]],
    epoch: int,
    *,
    steps: int,
    losses: AverageMeter,
    start_step: int = 0,
    choose: Callable[..., int] | None = None,
    after_step: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Trains on the batches (images (B, C, height, width), targets (B,)); this rank's losses are added to `losses`.

    steps: number of steps in the whole epoch; start_step: the step of the first batch, where an epoch is resumed.
    choose(epoch=, step=, rank=) sets the sub-network of the step and returns its op code; None trains the whole model.
    after_step(step, scalars) is called after each step. Raises UserError where the loss is not finite.
    """
    rank, _ = world()
    training.model.train()
    bar = progress_bar(batches, f"epoch {epoch}", total=steps, initial=start_step)
    for step, (images, targets) in enumerate(bar, start_step):
        # Seeded by the step, so that Mixup, dropout and drop path draw the same in a resumed run.
        seed_everything(training.seed, epoch, step, rank)
        op_code = choose(epoch=epoch, step=step, rank=rank) if choose else 0
        images = images.to(training.device, non_blocking=True)
        targets = targets.to(training.device, non_blocking=True)
        if training.mixup is not None:
            images, targets = training.mixup(images, targets)
        with training.autocast():
            loss = training.loss_fn(training.model(images), targets)
        value = loss.item()
        if not math.isfinite(value):
            lr = training.optimizer.param_groups[0]["lr"]
            raise UserError(
                f"loss is {value} at epoch {epoch}, step {step}, op code {op_code}, learning rate {lr:.3g}: "
                "training stops, the last checkpoint is kept; try a lower --lr"
            )
        _update(training, loss, epoch * steps + step)
        losses.update(value, len(images))
        bar.set_postfix(loss=f"{losses.avg:.3f}", op_code=op_code, refresh=False)
        if after_step:
            after_step(step, {"loss": value, "op_code": op_code})


def _update(training: Training, loss: Tensor, step: int) -> None:
    """Backward, gradient clipping, optimizer step and moving average; step: counted from the start of the run."""
    training.optimizer.zero_grad()
    scaler, optimizer = training.scaler, training.optimizer
    (scaler.scale(loss) if scaler else loss).backward()
    if training.clip_grad:
        if scaler:
            scaler.unscale_(optimizer)
        dispatch_clip_grad(training.model.parameters(), training.clip_grad)
    if scaler:
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        training.skipped_steps += scaler.get_scale() < scale
    else:
        optimizer.step()
    if training.ema is not None:
        training.ema.update(unwrap_model(training.model), step)


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, amp: torch.dtype | None = None
) -> dict[str, float]:
    """top1 and top5 (percent) and loss (mean cross-entropy) over the batches of all ranks."""
    model.eval()
    found = Accuracy(device)
    for images, targets in batches:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits = model(images)
        found.update(logits.float(), targets)
    return found.finalize()


class Accuracy:
    """Collects top1 and top5 (percent) and loss (mean cross-entropy) over the batches of all ranks."""

    def __init__(self, device: torch.device):
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)  # correct at 1, at 5, loss, images

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """logits: (B, classes).  targets: (B,)."""
        top1, top5 = accuracy(logits, targets, topk=(1, 5))
        loss = F.cross_entropy(logits, targets, reduction="sum")
        n = len(logits)
        self.totals += torch.stack([top1 * n / 100, top5 * n / 100, loss, loss.new_tensor(n)])

    def finalize(self) -> dict[str, float]:
        reduce_sum(self.totals)
        correct1, correct5, loss, images = self.totals.tolist()
        return {"top1": 100 * correct1 / images, "top5": 100 * correct5 / images, "loss": loss / images}
