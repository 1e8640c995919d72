"""PIAD's importance of every dim: how the loss rises without its module, times its share within the module."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.backbone import Backbone, modules_of
from models.parts import classify, follow, parts_of
from models.taylor import TaylorImportance, collect
from utils import UserError, progress_bar, reduce_sum

Batches = Iterable[tuple[Tensor, Tensor]]
TINY = 1e-12  # a cross-entropy of exactly 0 would divide by 0


@dataclass
class Sensitivity:
    """cost: mean cross-entropy C.  gamma: module key -> max(0, (C_m - C) / C).  branches_run: forwards, per batch."""

    cost: float
    gamma: dict[str, float]
    branches_run: int


@torch.no_grad()
def module_sensitivity(model: Backbone, batches: Batches) -> Sensitivity:
    """gamma of every module: the relative rise of the cross-entropy when its branch adds nothing (paper, PIAD).

    `model` is the smallest network so far, as extracted; modules it bypasses already get 0. Without a module of block
    b nothing changes before b, so the stream is kept at every branch and only what follows is run again: about half
    the work. Sums are reduced over the ranks. Raises UserError where a cross-entropy is not finite.
    """
    device = next(model.parameters()).device
    keys = [module.key for module in modules_of(model).values() if module.width]
    totals = torch.zeros(len(keys) + 2, dtype=torch.float64, device=device)  # C, C_m of each module, images
    branches_run = 0
    was_training = model.training
    model.eval()
    with torch.autocast(device.type, enabled=False):
        for images, targets in batches:
            costs, branches_run = _bypass_costs(model, images.to(device), targets.to(device))
            totals += torch.stack([*costs, costs[0].new_tensor(len(images))])
    model.train(was_training)
    reduce_sum(totals)
    cost, *without = (totals[:-1] / totals[-1]).tolist()
    if not all(map(math.isfinite, (cost, *without))):
        raise UserError(
            f"the cross-entropy on the proxy set is {cost:.4g}, and not finite whole or without some module: "
            "the weights are out of range, the last checkpoint stands; try a lower --lr"
        )
    gamma = dict.fromkeys(modules_of(model), 0.0)
    gamma |= {key: max(0.0, (c - cost) / max(cost, TINY)) for key, c in zip(keys, without, strict=True)}
    return Sensitivity(cost, gamma, branches_run)


def _bypass_costs(model: Backbone, images: Tensor, targets: Tensor) -> tuple[list[Tensor], int]:
    """[C, C without branch 0, without branch 1, ...] summed over the batch in float64, and the branches run."""
    x, parts = parts_of(model, images)
    stream = []  # what enters each part
    for part in parts:
        stream.append(x)
        x = follow(x, part)
    costs, run = [_cross_entropy(model, x, targets)], sum(key is not None for key, _ in parts)
    for skipped, x in enumerate(stream):
        if parts[skipped][0] is None:
            continue
        for part in parts[skipped + 1 :]:
            x = follow(x, part)
            run += part[0] is not None
        costs.append(_cross_entropy(model, x, targets))
    return costs, run


def _cross_entropy(model: Backbone, x: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(classify(model, x).double(), targets, reduction="sum")


def dimension_importance(model: Backbone, batches: Batches, cost: str = "logit") -> dict[str, np.ndarray]:
    """alpha of every dim, (width,) for each module with a width, summing to 1 in each module (paper, PIAD).

    Taylor importance at the network as it stands: for an attention that of q, k and v summed, mean over heads; for an
    MLP that of the activation's output.
    """
    device = next(model.parameters()).device
    modules = {key: module for key, module in modules_of(model).items() if module.width}
    collectors = {key: TaylorImportance(module, device) for key, module in modules.items()}
    collect(model, collectors, batches, cost)
    alpha = {}
    for key, module in modules.items():
        taylor = collectors[key].finalize()
        dims = taylor.sum(0).mean(0) if module.kind == "attn" else taylor  # (width,)
        total = dims.sum()
        alpha[key] = (dims / total if total > 0 else torch.full_like(dims, 1 / len(dims))).cpu().numpy()
    return alpha


def importance_of_dims(model: Backbone, batches: Batches) -> dict[str, np.ndarray]:
    """I_i = gamma of the module * alpha of the dim, (width,) for each module with a width."""
    gamma = module_sensitivity(model, progress_bar(batches, "module sensitivity")).gamma
    alphas = dimension_importance(model, progress_bar(batches, "dimension importance"))
    return {key: gamma[key] * alpha for key, alpha in alphas.items()}
