"""The training loop and the evaluation loop, shared by all stages."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import AverageMeter, accuracy, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn import functional as F

from datasets import TrainLoader
from files import CheckpointFolder
from logs import RunLog
from piad.progressive import ProgressiveDropout
from training import LossReader, Progress, Training
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
    tf32,
    world,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# What tells the best epoch, the first of these that an evaluation finds: 1 where more is better, -1 where less is.
SCORES = {"top1": 1, "kl": -1, "token_cosine": 1, "feature_cosine": 1}
STOP_EVERY = 20  # steps after which several ranks agree on stopping


@dataclass
class Run:
    """A training run: its epochs from `progress` on. Each epoch grows the mask table, trains, evaluates, logs, saves.

    evaluate_epoch() returns values for the log line of the epoch; the better of the score of the weights (see SCORES)
    and, where weights are averaged, of the same under the name ema_... decides which epoch is the best.
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
        self.scheduler.step(epoch)  # of the two, the one that the schedule counts in sets the learning rate
        self.scheduler.step_update(epoch * steps + progress.step)
        if self.regime and progress.step == 0:
            self.regime.begin_epoch(epoch)
        start, done_before = time.perf_counter(), progress.losses.count
        with tf32():
            train_one_epoch(
                self.training,
                self.loader.batches(epoch, progress.step),
                epoch,
                steps=steps,
                losses=progress.losses,
                start_step=progress.step,
                regime=self.regime,
                after_loss=self._log_step,
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
        evaluated = (epoch + 1) % self.eval_every == 0 or last
        if evaluated:
            line |= self.evaluate_epoch()
            sizes = len(self.regime.table) if self.regime else 1
            # Accuracies of other sizes cannot be compared: while the mask table grows, the newest epoch is the best.
            score = max(score_of(line), score_of(line, "ema_"))
            if sizes != progress.best_sizes or score > progress.best_score:
                progress.best_epoch, progress.best_score, progress.best_sizes = epoch, score, sizes
            if self.draw_widths:
                self.log.figure("widths", self.draw_widths, last_step)
        self.log.epoch(line, last_step, shown=evaluated)
        self.log.machine(images_per_second, peak_memory(self.training.device), last_step)
        self._save(done=True)

    def _log_step(self, step: int, scalars: dict[str, float]) -> None:
        self.log.scalars(scalars, self.progress.epoch * self.loader.steps + step)

    def _after_step(self, step: int, read_losses: Callable[[], None]) -> None:
        progress, steps = self.progress, self.loader.steps
        progress.step = step + 1
        self.scheduler.step_update(progress.epoch * steps + progress.step)
        if self.checkpoint_steps and progress.step % self.checkpoint_steps == 0 and progress.step < steps:
            read_losses()  # a loss that is not finite ends the run before its weights are saved
            self._save()
        if world()[1] == 1 or progress.step % STOP_EVERY == 0 or progress.step == steps:
            try:
                stop_if_asked(collective=True)
            except Preempted:
                read_losses()
                raise

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
    check_ranks_agree("the weights", checksum(training.model.parameters()))
    if regime:
        table = json.dumps(regime.state_dict(), sort_keys=True)
        check_ranks_agree("the mask tables", zlib.crc32(table.encode()))


def score_of(line: dict[str, float], prefix: str = "") -> float:
    """How good what an evaluation found is, larger is better; -inf where it found nothing of SCORES.

    prefix: of the names in the line.
    """
    return next((sign * line[prefix + name] for name, sign in SCORES.items() if prefix + name in line), -math.inf)


def train_one_epoch(
    training: Training,
    batches: Iterable[tuple[Tensor, Tensor]],
    epoch: int,
    *,
    steps: int,
    losses: AverageMeter,
    start_step: int = 0,
    regime: ProgressiveDropout | None = None,
    after_loss: Callable[[int, dict[str, float]], None] | None = None,
    after_step: Callable[[int, Callable[[], None]], None] | None = None,
) -> None:
    """Trains on the batches (images (B, C, height, width), targets (B,)); this rank's losses are added to `losses`.

    steps: number of steps in the whole epoch; start_step: the step of the first batch, where an epoch is resumed.
    regime: chooses the sub-network of each step; None trains the whole model.
    after_loss(step, scalars) is called with the loss of each step, which on a CUDA device comes some steps late.
    after_step(step, read_losses) is called after each step; read_losses() reads those that have not come yet.
    Raises UserError where the loss is not finite.
    """
    rank, _ = world()
    training.model.train()
    if training.grad_checkpointing:
        training.model.set_grad_checkpointing(True)
    bar = progress_bar(batches, f"epoch {epoch}", total=steps, initial=start_step)
    reader = LossReader(training, epoch, losses, after_loss)
    for step, (images, targets) in enumerate(bar, start_step):
        # Seeded by the step, so that Mixup, dropout and drop path draw the same in a resumed run.
        seed_everything(training.seed, epoch, step, rank)
        images = images.to(training.device, non_blocking=True, memory_format=training.layout)
        if training.labels:
            targets = targets.to(training.device, non_blocking=True)
        else:
            targets = torch.zeros(len(images), dtype=torch.long, device=training.device)
        if training.mixup is not None:
            images, targets = training.mixup(images, targets)
        sizes = [lambda: 0]
        if regime:
            place = {"epoch": epoch, "step": step, "rank": rank}
            sizes = [partial(regime.choose, **place, number=number) for number in range(regime.sizes_per_step)]
        loss, op_codes = backward(training, images, targets, sizes)
        reader.add(step, len(images), op_codes, regime.step_scalars() if regime else {}, loss)
        update(training, epoch * steps + step)
        bar.set_postfix(loss=f"{losses.avg:.3f}", op_code="/".join(map(str, op_codes)), refresh=False)
        if after_step:
            after_step(step, reader.read)
    reader.read()
    if training.grad_checkpointing:  # evaluation and PIAD's importance keep their activations
        training.model.set_grad_checkpointing(False)


def backward(
    training: Training, images: Tensor, targets: Tensor, sizes: list[Callable[[], int]]
) -> tuple[Tensor, list[int]]:
    """Gradients of the mean loss over a batch, which goes in parts through the model at each of the sizes.

    sizes: functions that set the model to a size and return its op code. Returns the loss, detached, and the op codes.
    """
    training.optimizer.zero_grad()
    length = -(-len(images) // training.grad_accum_steps)
    parts = list(zip(images.split(length), targets.split(length), strict=True))
    losses, op_codes, runs = [], [], len(parts) * len(sizes)
    for part in parts:
        expected = training.expected(part[0])
        for choose in sizes:
            op_codes.append(choose())
            # Ranks exchange the gradients of the whole batch, with its last part and size.
            alone = len(op_codes) < runs and hasattr(training.runner, "no_sync")
            with training.runner.no_sync() if alone else nullcontext():
                loss = training.loss(*part, expected) * (len(part[0]) / len(images) / len(sizes))
                (training.scaler.scale(loss) if training.scaler else loss).backward()
            losses.append(loss.detach())
    return torch.stack(losses).sum(), op_codes[: len(sizes)]


def update(training: Training, step: int) -> None:
    """Gradient clipping, optimizer step and moving average; step: counted from the start of the run."""
    scaler, optimizer = training.scaler, training.optimizer
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
        training.ema.update(training.model, step)


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
