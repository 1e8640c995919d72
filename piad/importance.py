"""PIAD's importance of every dim: the sensitivity of its module times its share of the module's Taylor importance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.backbone import Backbone, modules_of
from models.parts import apply_part, classify, parts_of
from models.taylor import TaylorImportance, collect
from utils import UserError, progress_bar, reduce_sum

Batches = Iterable[tuple[Tensor, Tensor]]
TINY = 1e-12  # avoids a division by a cross-entropy of 0


@dataclass
class Sensitivity:
    """Result of module_sensitivity().

    cost: Mean cross-entropy C of the network.
    gamma: Module key -> max(0, (C_m - C) / C), with C_m the cost without module m.
    branches_run: Number of branches run per batch.
    """

    cost: float
    gamma: dict[str, float]
    branches_run: int


@torch.no_grad()
def module_sensitivity(model: Backbone, batches: Batches) -> Sensitivity:
    """Module sensitivity gamma_m = max(0, (C_m - C) / C) (paper, PIAD).

    C is the mean cross-entropy of the model, C_m that of the model with module m bypassed. Bypassing a module changes
    nothing before it, so the input of every branch is kept and only the branches after module m are run again, which is
    about half of the work. Runs in eval mode without autocast. Sums are reduced over ranks.

    Args:
        model: The smallest network so far, extracted. Modules that it already bypasses get gamma 0.
        batches: Proxy images (B, C, height, width) and targets (B,).

    Raises:
        UserError: If a cross-entropy is not finite.
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
            f"the cross-entropy on the proxy set, {cost:.4g}, or that with one module bypassed is not finite: "
            "the weights are out of range; the last checkpoint is intact, try a lower --lr"
        )
    gamma = dict.fromkeys(modules_of(model), 0.0)
    gamma |= {key: max(0.0, (c - cost) / max(cost, TINY)) for key, c in zip(keys, without, strict=True)}
    return Sensitivity(cost, gamma, branches_run)


def _bypass_costs(model: Backbone, images: Tensor, targets: Tensor) -> tuple[list[Tensor], int]:
    """Cross-entropy summed over the batch: ([C, C_m of each module that runs], number of branches run)."""
    x, parts = parts_of(model, images)
    inputs = []  # of each part
    for part in parts:
        inputs.append(x)
        x = apply_part(x, part)
    costs, run = [_cross_entropy(model, x, targets)], sum(key is not None for key, _ in parts)
    for skipped, x in enumerate(inputs):
        if parts[skipped][0] is None:  # patch merging, which is not a module
            continue
        for part in parts[skipped + 1 :]:
            x = apply_part(x, part)
            run += part[0] is not None
        costs.append(_cross_entropy(model, x, targets))
    return costs, run


def _cross_entropy(model: Backbone, x: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(classify(model, x).double(), targets, reduction="sum")


def dimension_importance(model: Backbone, batches: Batches, cost: str = "logit") -> dict[str, np.ndarray]:
    """Dimension importance alpha of every dim, with sum 1 in each module (paper, PIAD).

    alpha_i is the Taylor importance of dim i, the mean over tokens of |g * x| with g = dC/dx, divided by its sum over
    the module. For attention, x are q, k and v: their importance is added up and averaged over heads. For an MLP, x is
    the output of the activation. A module without any importance gets equal alphas.

    Args:
        model: The smallest network so far, extracted.
        batches: Proxy images (B, C, height, width) and targets (B,).
        cost: Key of models.targets.COSTS.

    Returns:
        Module key -> alpha (width,), for every module that is not bypassed.
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
    """Importance I_i = gamma_m * alpha_i (width,) of the dims of every module m that is not bypassed (paper, PIAD)."""
    gamma = module_sensitivity(model, progress_bar(batches, "module sensitivity")).gamma
    alphas = dimension_importance(model, progress_bar(batches, "dimension importance"))
    return {key: gamma[key] * alpha for key, alpha in alphas.items()}
