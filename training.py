"""What a training run holds, and how it resumes from a checkpoint."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import AverageMeter, ModelEmaV3
from torch import Tensor, nn

from files import shown
from piad.distillation import Distillation
from utils import UserError, gather_over_ranks, world


class BothHeads(nn.Module):
    """The mean of a loss over both heads of a distilled DeiT, which learn the same targets."""

    def __init__(self, loss_fn: nn.Module):
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """outputs: logits (B, classes) of each head."""
        return sum(self.loss_fn(logits, targets) for logits in outputs) / len(outputs)


@dataclass
class Training:
    """What a training run holds.

    model: the network.  amp: dtype of autocast, None = off.
    labels: whether the loss needs any; zeros stand for them otherwise.
    distillation: the loss where there is a teacher.
    runner: what a step calls with images (default: the model), such as the model wrapped in DDP.
    grad_accum_steps: parts in which the batch of a step goes through the model.
    grad_checkpointing: compute the activations of the blocks again for the backward pass instead of keeping them.
    layout: of the images in memory.
    """

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
    labels: bool = True
    distillation: Distillation | None = None
    runner: nn.Module | None = None
    grad_accum_steps: int = 1
    grad_checkpointing: bool = False
    layout: torch.memory_format = torch.contiguous_format
    skipped_steps: int = 0  # by the scaler of float16, where gradients overflowed; a few are normal

    def __post_init__(self) -> None:
        self.runner = self.runner or self.model

    def expected(self, images: Tensor) -> dict[str, Tensor] | None:
        """What the teacher gives for images (B, C, height, width); None without one."""
        return None if self.distillation is None else self.distillation.teacher(images)

    def loss(self, images: Tensor, targets: Tensor, expected: dict[str, Tensor] | None) -> Tensor:
        """The loss of images (B, C, height, width) with targets (B,) or, from Mixup, (B, classes).

        expected: what expected() gave for the same images.
        """
        with self.autocast():
            outputs = self.runner(images)
            if self.distillation is not None:
                return self.distillation(self.loss_fn, outputs, expected, targets)
            return self.loss_fn(outputs, targets)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def state_dict(self) -> dict[str, Any]:
        """Weights, averaged weights, optimizer and scaler."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped_steps": self.skipped_steps,
        }
        if self.ema is not None:
            state["model_ema"] = self.ema.module.state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of state_dict(). Raises UserError for the state of another run."""
        with of_another_run():
            groups = [
                [group["params"] for group in s["param_groups"]]
                for s in (state["optimizer"], self.optimizer.state_dict())
            ]
            if groups[0] != groups[1]:  # torch compares their lengths alone
                raise ValueError("its optimizer has other parameters")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.skipped_steps = _count("skipped_steps", state)
            if self.ema is not None:
                self.ema.module.load_state_dict(state["model_ema"])
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])


class LossReader:
    """Reads the losses of steps and adds them up, on a CUDA device a few steps late, so that it never waits for us."""

    LATE = 4  # steps

    def __init__(
        self,
        training: Training,
        epoch: int,
        losses: AverageMeter,
        after_loss: Callable[[int, dict[str, float]], None] | None,
    ):
        self.training, self.epoch, self.losses, self.after_loss = training, epoch, losses, after_loss
        self.waiting: deque[tuple[int, int, list[int], dict[str, float], Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, images: int, op_codes: list[int], scalars: dict[str, float], loss: Tensor) -> None:
        """The mean loss of a step over its images and op codes, and what else is logged for it."""
        event = None
        if loss.is_cuda:
            loss = loss.to("cpu", non_blocking=True)  # to pinned memory: the copy does not stop the device
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((step, images, op_codes, scalars, loss, event))
        self.read(keep=self.LATE if event else 0)

    def read(self, keep: int = 0) -> None:
        """Reads all losses but the last `keep`. Raises UserError for one that is not finite."""
        while len(self.waiting) > keep:
            step, images, op_codes, scalars, loss, event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            value = loss.item()
            if not math.isfinite(value):
                lr, sizes = self.training.optimizer.param_groups[0]["lr"], ", ".join(map(str, op_codes))
                raise UserError(
                    f"loss is {value} at epoch {self.epoch}, step {step}, op code {sizes}, learning rate "
                    f"{lr:.3g}: training stops, the last checkpoint is kept; try a lower --lr"
                )
            self.losses.update(value, images)
            if self.after_loss:
                sizes = {"op_code": op_codes[0]}
                if len(op_codes) > 1:
                    sizes = {"op_code_smallest": max(op_codes), "op_code_largest": min(op_codes)}
                self.after_loss(step, {"loss": value} | sizes | scalars)


@contextlib.contextmanager
def of_another_run() -> Iterator[None]:
    """Turns whatever Python and torch raise for a state that does not fit into a UserError."""
    try:
        yield
    except Exception as error:  # torch raises many types
        raise UserError(f"the checkpoint is of another run: {type(error).__name__} {shown(error)}") from error


def _count(name: str, state: dict[str, Any]) -> int:
    """A number of things that a run can have had. Raises ValueError for anything else."""
    if type(state[name]) is not int or not 0 <= state[name] < 10**9:
        raise ValueError(f"{name} is {shown(state[name])}")
    return state[name]


@dataclass
class Progress:
    """Where a run is: the next step, this rank's losses of the epoch so far, the best epoch so far."""

    epoch: int = 0
    step: int = 0
    losses: AverageMeter = field(default_factory=AverageMeter)
    best_epoch: int | None = None
    best_score: float = -math.inf  # see engine.SCORES
    best_sizes: int = 0  # how many sizes there were at the best epoch

    def state_dict(self) -> dict[str, Any]:
        """Plain values, with the losses of every rank (a collective call)."""
        losses = gather_over_ranks([self.losses.sum, self.losses.count])
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "losses": losses}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """The inverse of state_dict(). Raises UserError for values that no run has."""
        rank, ranks = world()
        with of_another_run():
            progress = cls(_count("epoch", state), _count("step", state), best_score=float(state["best_score"]))
            progress.best_sizes = _count("best_sizes", state)
            progress.best_epoch = None if state["best_epoch"] is None else _count("best_epoch", state)
            losses = torch.tensor(state["losses"], dtype=torch.float64).view(-1, 2).tolist()
            if progress.step and len(losses) == ranks:
                total, images = losses[rank]
                if not images > 0:
                    raise ValueError(f"losses of {images} images at step {progress.step}")
                progress.losses.sum, progress.losses.count, progress.losses.avg = total, images, total / images
        return progress
