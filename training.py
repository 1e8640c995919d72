"""What a training run holds, and how it is taken up again from a checkpoint."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import AverageMeter, ModelEmaV3, unwrap_model
from torch import Tensor, nn

from files import check_like, shown
from utils import UserError, gather_over_ranks, world


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
