"""WPAC's statistics: token-weighted covariances of q, k and v, and the importance of hidden units, in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.backbone import Module, modules_of
from models.taylor import TaylorImportance, collect
from utils import reduce_sum


class WeightedCovariance:
    """Streaming sum_t theta_t (x_t - mu)(x_t - mu)^T of q, k and v of every head, in float64.

    theta is the importance of a token for one head: the mean over its d dims of |g * x| (first-order Taylor); mu is
    the plain mean over all tokens. Nothing depends on how the tokens are cut into batches or spread over ranks.
    """

    def __init__(self, module: Module, device: torch.device):
        H, d = module.heads, module.width

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.second = zeros(3, H, d, d)  # sum theta x x^T
        self.first = zeros(3, H, d)  # sum theta x
        self.weight = zeros(3, H)  # sum theta
        self.plain = zeros(3, H, d)  # sum x
        self.count = zeros()

    @torch.no_grad()
    def update(self, x: Tensor, g: Tensor) -> None:
        """x, g: (B, N, 3, H, d)."""
        theta = (g * x).abs_().mean(-1, dtype=torch.float64)  # (B, N, 3, H)
        tokens = x.flatten(0, 1).permute(1, 2, 0, 3).to(torch.float64)  # (3, H, T, d)
        weighted = tokens * theta.flatten(0, 1).permute(1, 2, 0)[..., None]  # (3, H, T, d)
        self.second += weighted.transpose(-1, -2) @ tokens
        self.first += weighted.sum(-2)
        self.weight += theta.sum((0, 1))
        self.plain += tokens.sum(-2)
        self.count += tokens.shape[-2]

    def finalize(self) -> Tensor:
        """The covariances (3, H, d, d), symmetric, of all ranks' tokens together."""
        reduce_sum(self.second, self.first, self.weight, self.plain, self.count)
        mu = self.plain / self.count
        cross = self.first[..., :, None] * mu[..., None, :]
        covariance = self.second - cross - cross.mT + self.weight[..., None, None] * mu[..., :, None] * mu[..., None, :]
        return (covariance + covariance.mT) / 2


@dataclass
class Statistics:
    """covariance: "<block>.attn" -> (3, H, d, d) for q, k, v; importance: "<block>.mlp" -> (M,); float64."""

    covariance: dict[str, Tensor]
    importance: dict[str, Tensor]


def collect_statistics(
    model: VisionTransformer, batches: Iterable[tuple[Tensor, Tensor]], cost: str = "logit"
) -> Statistics:
    """Runs the proxy batches (images (B, C, height, width), targets (B,)) once and reduces over the ranks.

    `cost` is C, whose gradient weighs the tokens: "logit", "ce" or "pred" (see models.taylor.COSTS).
    """
    device = next(model.parameters()).device
    collectors = {
        key: WeightedCovariance(module, device) if module.kind == "attn" else TaylorImportance(module, device)
        for key, module in modules_of(model).items()
    }
    collect(model, collectors, batches, cost)
    results = {key: collector.finalize() for key, collector in collectors.items()}
    return Statistics(
        covariance={key: value for key, value in results.items() if key.endswith(".attn")},
        importance={key: value for key, value in results.items() if key.endswith(".mlp")},
    )
