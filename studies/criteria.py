"""Alternatives to WPAC that the studies compare it with.

Sorting dims by a measure of importance instead of rotating them, and other weights of the tokens in WPAC's statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from models.backbone import Backbone, blocks_of, first_layers, modules_of, value_layer
from models.taylor import TaylorImportance, collect
from wpac.statistics import TokenCollector
from wpac.transform import permute_mlp, rotate_attention

CRITERIA = ("random", "magnitude", "taylor", "hessian")


def importance_by(
    criterion: str,
    model: Backbone,
    batches: Iterable[tuple[Tensor, Tensor]] = (),
    cost: str = "logit",
    seed: int = 0,
    target: str = "logits",
) -> dict[str, Tensor]:
    """Importance of every dim by one of CRITERIA.

    Returns module key -> (P, H, d) for attention, with P = 3 (q, k, v) or 1 where only v is cut; (M,) for an MLP.
    criterion: "random", drawn from the seed; "magnitude", the norm of the weights of the dim in the layers before and
    after it; "taylor" or "hessian", the mean over all tokens of |g * x| or its square, with g the gradient of the cost.
    batches: (images, targets), for "taylor" and "hessian".  cost: a key of models.targets.COSTS, for the output that
    `target` names.
    """
    modules, device = modules_of(model), next(model.parameters()).device
    shapes = {key: (m.parts, m.heads, m.width) if m.kind == "attn" else (m.width,) for key, m in modules.items()}
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return {key: torch.rand(shape, generator=generator).to(device) for key, shape in shapes.items()}
    if criterion == "magnitude":
        return {key: _magnitude(model, key, shape) for key, shape in shapes.items()}
    squared = {"taylor": False, "hessian": True}[criterion]
    collectors = {key: TaylorImportance(module, device, squared) for key, module in modules.items()}
    collect(model, collectors, batches, cost, target=target)
    return {key: collector.finalize() for key, collector in collectors.items()}


@torch.no_grad()
def sort_dims(model: Backbone, importance: dict[str, Tensor]) -> None:
    """Sorts the dims of every module, most important first, in place; the function does not change.

    importance: as importance_by() returns it. Within each head, q and k are sorted by the sum of their importance, and
    v by its own.
    """
    for key, module in modules_of(model).items():
        block = blocks_of(model)[module.block]
        if module.kind == "mlp":
            permute_mlp(block.mlp, torch.argsort(importance[key], descending=True, stable=True))
            continue
        *qk, v = importance[key]
        scores = torch.stack([*[sum(qk)] * len(qk), v])
        order = torch.argsort(scores, dim=-1, descending=True, stable=True)
        one = torch.eye(module.width, dtype=torch.float64, device=order.device)
        rotate_attention(block.attn, one[order])


@torch.no_grad()
def _magnitude(model: Backbone, key: str, shape: tuple[int, ...]) -> Tensor:
    """Importance of one module by the magnitude of its weights, in the shape that importance_by() returns."""
    index, _ = key.split(".")
    block = blocks_of(model)[int(index)]
    if len(shape) == 1:
        rows = torch.cat([layer.weight for layer in first_layers(block.mlp).values()], 1)
        return rows.unflatten(0, (-1, *shape)).norm(dim=(0, 2)) * block.mlp.fc2.weight.norm(dim=0)
    size = value_layer(block.attn).weight.norm(dim=1)[-math.prod(shape) :].view(shape)
    size[-1] *= block.attn.proj.weight.norm(dim=0).view(shape[1:])
    return size


class EqualTokens(TokenCollector):
    """All tokens have the same weight."""

    def token_importance(self, x: Tensor, g: Tensor) -> Tensor:
        return torch.ones(x.shape[:-1], dtype=torch.float64, device=x.device)


class ClassTokenOnly(TokenCollector):
    """Only the first token of each image is weighted, by its importance; all others have weight 0."""

    def token_importance(self, x: Tensor, g: Tensor) -> Tensor:
        theta = super().token_importance(x, g)
        theta[:, 1:] = 0
        return theta
