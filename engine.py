"""The training loop and the evaluation loop: one of each, for every stage."""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import AverageMeter, ModelEmaV3, accuracy, dispatch_clip_grad, unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F

from datasets import TrainLoader
from files import CheckpointFolder, RunLog, check_like, shown
from utils import (
    Preempted,
    UserError,
    check_ranks_agree,
    checksum,
    gather_over_ranks,
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


class BothHeads(nn.Module):
    """The mean of a loss over the heads of a distilled DeiT; without a teacher both learn the same targets."""

    def __init__(self, loss_fn: nn.Module):
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """outputs: logits (B, classes) of each head."""
        return sum(self.loss_fn(logits, targets) for logits in outputs) / len(outputs)


@dataclass
class Training:
    """What a training run holds. model: as it is called, DDP or not; amp: dtype of autocast, None = off."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: nn.Module
    device: torch.device
    seed: int
    amp: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    ema: ModelEmaV3 | None = None
    mixup: Mixup | None = None
    clip_grad: float | None = None
    skipped_steps: int = 0  # by float16's scaler, where gradients overflowed: a few are normal

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def state_dict(self) -> dict[str, Any]:
        """Weights, averaged weights, optimizer and scaler: what a checkpoint needs of the run."""
        state = {
            "model": unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped_steps": self.skipped_steps,
        }
        if self.ema is not None:
            state["model_ema"] = self.ema.module.state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of state_dict(). Raises UserError, and loads nothing, where the state is of another run."""
        own = self.state_dict()
        own["optimizer"] = _made_as(self.optimizer, state.get("optimizer"))
        check_like({key: state[key] for key in own if key in state}, own)
        _check_count(state["skipped_steps"], "skipped_steps")
        if _parameters_in(state["optimizer"]) != _parameters_in(own["optimizer"]):
            raise UserError("the checkpoint is of another run: its optimizer has other parameters")
        unwrap_model(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.skipped_steps = state["skipped_steps"]
        if self.ema is not None:
            self.ema.module.load_state_dict(state["model_ema"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


def _made_as(optimizer: torch.optim.Optimizer, state: Any) -> dict[str, Any]:
    """What a state of this optimizer looks like (see check_like); torch itself would take much that is none.

    state: the one to be loaded. A parameter that no sub-network has used so far has no entry in it.
    """
    twin = copy.deepcopy(optimizer)
    for parameter in (p for group in twin.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    twin.step()  # only then does it hold what it keeps of a parameter
    kept, made = twin.state_dict()["state"], {}
    entries = state.get("state") if isinstance(state, dict) else None
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if isinstance(entries, dict) and isinstance(entries.get(index), dict):
            # What comes in later steps, as timm's Lookahead adds, is like the parameter.
            made[index] = dict.fromkeys(entries[index], parameter) | kept.get(index, {})
    return optimizer.state_dict() | {"state": made}


def _parameters_in(optimizer_state: dict[str, Any]) -> list[list[int]]:
    return [group["params"] for group in optimizer_state["param_groups"]]


def _check_count(value: Any, name: str) -> None:
    """Raises UserError unless the value is a number of things that a run can have had."""
    if type(value) is not int or not 0 <= value < 10**9:
        raise UserError(f"the checkpoint is damaged: {name} is {shown(value)}")


@dataclass
class Progress:
    """Where a run stands: the next step to do, this rank's losses of the epoch so far, the best epoch so far."""

    epoch: int = 0
    step: int = 0
    losses: AverageMeter = field(default_factory=AverageMeter)
    best_epoch: int | None = None
    best_top1: float = -1.0

    def state_dict(self) -> dict[str, Any]:
        """Plain values, with the losses of every rank (a collective call)."""
        losses = gather_over_ranks([self.losses.sum, self.losses.count])
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "losses": losses}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """The inverse of state_dict(). Raises UserError for values that no run has."""
        values = {f.name: state[f.name] for f in fields(cls)}
        for name in ("epoch", "step", *(["best_epoch"] if values["best_epoch"] is not None else [])):
            _check_count(values[name], name)
        check_like(values["best_top1"], cls.best_top1, "best_top1")
        losses, values["losses"] = values["losses"], AverageMeter()
        check_like(losses, [[0.0, 0.0]] * (len(losses) if isinstance(losses, list) else 1), "losses")
        if values["step"] and len(losses) == world()[1]:
            total, images = losses[world()[0]]
            if not images > 0:
                raise UserError(f"the checkpoint is damaged: losses of {images} images at step {values['step']}")
            values["losses"].sum, values["losses"].count, values["losses"].avg = total, images, total / images
        return cls(**values)


class Regime(Protocol):
    """How sub-networks are chosen in training; piad.progressive.ProgressiveDropout is the paper's."""

    def begin_epoch(self, epoch: int) -> None: ...

    def choose(self, *, epoch: int, step: int, rank: int) -> int: ...

    def step_scalars(self) -> dict[str, float]: ...

    def epoch_scalars(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def save(self, folder: Path) -> None: ...


@dataclass
class Run:
    """A training run: its epochs from `progress` on, each one grow the table, train, evaluate, log, save.

    evaluate_epoch() gives what goes into the epoch's log line; its "top1" decides which epoch is the best.
    checkpoint_steps: also save each time so many steps of an epoch are done, 0 = only at its end.
    draw_widths() gives a picture for TensorBoard each time there was an evaluation.
    """

    training: Training
    loader: TrainLoader
    files: CheckpointFolder
    log: RunLog
    scheduler: Scheduler
    progress: Progress
    evaluate_epoch: Callable[[], dict[str, float]]
    regime: Regime | None = None
    eval_every: int = 1
    checkpoint_steps: int = 0
    draw_widths: Callable[[], Figure] | None = None

    def fit(self, epochs: int) -> None:
        """Runs up to `epochs`. Asked to stop by a signal, it saves and raises Preempted, which says how to go on."""
        if self.progress.step > self.loader.steps:
            place = f"step {self.progress.step} of an epoch, which has {self.loader.steps} of this data"
            raise UserError(f"the checkpoint stands at {place}: give the data of its run")
        with stop_signals():
            try:
                while self.progress.epoch < epochs:
                    self._run_epoch(last=self.progress.epoch + 1 == epochs)
            except Preempted as stop:
                if self.progress.step or not self.files.epochs():  # else the last checkpoint is where the run stands
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
            if line["top1"] > progress.best_top1:
                progress.best_epoch, progress.best_top1 = epoch, line["top1"]
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
        """Writes checkpoint_<epoch>.pth: of the epoch under way, or `done`, from which the next one starts."""
        epoch = self.progress.epoch
        if done:
            self.progress.epoch, self.progress.step, self.progress.losses = epoch + 1, 0, AverageMeter()
        self.log.flush()  # what was logged before a checkpoint is not logged again after a resume from it
        state = {**self.training.state_dict(), **self.progress.state_dict()}
        state |= self.regime.state_dict() if self.regime else {}
        self.files.save(epoch, state, self.progress.best_epoch)
        if self.regime:
            self.regime.save(self.files.folder)


def check_agreement(training: Training, regime: Regime | None) -> None:
    """Raises UserError, naming the rank, unless all ranks hold the same weights and table."""
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
    """Trains on the batches (images (B, C, height, width), targets (B,)); `losses` takes this rank's losses.

    steps: in a whole epoch; start_step: the step of the first batch, in an epoch entered in its middle.
    choose(epoch=, step=, rank=) sets the sub-network of the step and returns its op code; None trains the whole.
    after_step(step, scalars) runs when a step is complete. Raises UserError where the loss is not finite.
    """
    rank, _ = world()
    training.model.train()
    bar = progress_bar(batches, f"epoch {epoch}", total=steps, initial=start_step)
    for step, (images, targets) in enumerate(bar, start_step):
        # Keyed by the step: what Mixup, dropout and drop path draw does not hang on how the run got here.
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
                "training stops, the last checkpoint stands; try a lower --lr"
            )
        _update(training, loss)
        losses.update(value, len(images))
        bar.set_postfix(loss=f"{losses.avg:.3f}", op_code=op_code, refresh=False)
        if after_step:
            after_step(step, {"loss": value, "op_code": op_code})


def _update(training: Training, loss: Tensor) -> None:
    """Backward, gradient clipping, optimizer step and moving average."""
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
        training.ema.update(unwrap_model(training.model))


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, amp: torch.dtype | None = None
) -> dict[str, float]:
    """{"top1", "top5" (percent), "loss", "images_per_second"} over all ranks' batches.

    images_per_second counts the model's own time, on this rank, without loading: that of the median batch.
    """
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # correct at 1, at 5, loss, images
    seconds = []  # an image, of each batch
    for images, targets in batches:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits = model(images).float()
        top1, top5 = accuracy(logits, targets, topk=(1, 5))  # waits for the device
        loss = F.cross_entropy(logits, targets, reduction="sum")
        n = len(images)
        totals += torch.stack([top1 * n / 100, top5 * n / 100, loss, loss.new_tensor(n)])
        seconds.append((time.perf_counter() - start) / n)
    reduce_sum(totals)
    correct1, correct5, loss, images = totals.tolist()
    return {
        "top1": 100 * correct1 / images,
        "top5": 100 * correct5 / images,
        "loss": loss / images,
        "images_per_second": 1 / max(statistics.median(seconds), 1e-9),
    }
