"""Variance-based pruning of hidden units, written from the description of its paper.

Berisha, Mehnert, Condurache: Variance-Based Pruning for Accelerating and Compressing Trained Networks, ICCV 2025. The
hidden units of all MLPs are ranked by the variance of their activation, after the activation function, and those with
the lowest variance are removed. Each is replaced by its mean, which goes into the next bias. Attention stays whole.
"""

from __future__ import annotations

import copy

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from studies.rivals_cut import check_plain, keep_units, watched
from studies.rivals_task import Cutter, Size, Task, macs_without, smallest_cut
from wpac.compensation import Compensation


class Spread:
    """Mean and variance of each input of a layer, (n,), over all tokens; sums in float64."""

    def __init__(self, layer: nn.Linear):
        self._sums = torch.zeros(2, layer.in_features, dtype=torch.float64, device=layer.weight.device)
        self._tokens = 0

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Adds the inputs (B, N, n) of a batch."""
        x = inputs.flatten(0, -2).double()
        self._sums += torch.stack([x.sum(0), x.square().sum(0)])
        self._tokens += len(x)

    @property
    def mean(self) -> Tensor:
        return self._sums[0] / self._tokens

    @property
    def variance(self) -> Tensor:
        return (self._sums[1] / self._tokens - self.mean.square()).clamp(min=0)


def kept_units(variances: list[Tensor], share: float) -> list[int]:
    """How many units each MLP keeps if this share of all units, those of the lowest variance, is removed.

    variances: of the units of each MLP, (M,). An MLP keeps one unit at least.
    """
    scores = torch.stack(variances)
    scores[torch.arange(len(scores)), scores.argmax(1)] = torch.inf
    count = min(int(share * scores.numel()), scores.numel() - len(scores))
    kept = torch.ones(scores.numel(), dtype=torch.bool)
    kept[scores.flatten().argsort(stable=True)[:count].cpu()] = False
    return kept.view(scores.shape).sum(1).tolist()


@torch.no_grad()
def vbp(task: Task) -> Cutter:
    """Takes the statistics; see the top of this file."""
    model = task.model
    check_plain(model)
    spreads = {block.mlp.fc2: Spread(block.mlp.fc2) for block in model.blocks}
    with watched(spreads):
        for images in task.images:
            model.forward_features(images)
    spreads = list(spreads.values())
    variances, total = [spread.variance for spread in spreads], sum(len(spread.mean) for spread in spreads)

    def removed(share: float) -> int:
        return total - sum(kept_units(variances, share))

    def cut(size: Size) -> VisionTransformer | None:
        if size.qk or size.heads:
            return None
        share = size.mlp
        if size.macs is not None:
            limit = size.macs * macs_without(model)
            share = smallest_cut(lambda share: macs_without(model, units=removed(share)), limit)
        return None if share is None else without_units(model, spreads, kept_units(variances, share))

    return cut


def without_units(model: VisionTransformer, spreads: list[Spread], kept: list[int]) -> VisionTransformer:
    """A copy of the model whose MLPs keep these numbers of units, and the means of the others in their last bias."""
    small = copy.deepcopy(model)
    for block, spread, count in zip(small.blocks, spreads, kept, strict=True):
        order = spread.variance.argsort(descending=True, stable=True)
        mean = spread.mean[order]
        # No unit predicts another: what is left of the prediction is its mean.
        keep_units(block.mlp, order, count, Compensation(mean, torch.eye(len(mean)).to(mean), torch.ones(1)))
    return small
