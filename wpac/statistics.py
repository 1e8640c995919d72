"""The statistics that contraction and compensation need, from one forward and backward pass over the proxy set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.backbone import Backbone, Module, modules_of
from models.taylor import TaylorImportance, collect
from utils import reduce_sum

from .compensation import OutputCollector, OutputMoments


@dataclass
class TokenMoments:
    """Sums over the tokens x of the parts of an attention module, weighted by token importance theta; float64.

    P is the number of parts: 3 (q, k, v), or 1 where only v is cut.
    second (P, H, d, d): sum theta x x^T.  first (P, H, d): sum theta x.  weight (P, H): sum theta.
    mean (P, H, d): unweighted mean of x.  gradient (H, d, d): unweighted mean of g g^T, g the cost's gradient at q, or
    zeros if it was not collected.
    """

    second: Tensor
    first: Tensor
    weight: Tensor
    mean: Tensor
    gradient: Tensor

    def covariance(self) -> Tensor:
        """C = sum theta (x - mean)(x - mean)^T, (P, H, d, d), symmetric: C_q, C_k and C_v of the paper."""
        return self._about(self.mean)

    def score_moments(self) -> Tensor:
        """Weighted second moments of q about zero and of k about its mean, (2, H, d, d).

        q is not centred, since its mean contributes a different score to each key. k is centred, since adding a
        constant to all keys does not change the softmax of the scores.
        """
        k_mean = self.first[1] / self.weight[1, :, None].clamp(min=torch.finfo(torch.float64).tiny)
        return self._about(torch.stack([torch.zeros_like(k_mean), k_mean, self.mean[2]]))[:2]

    def transformed(self, transforms: Tensor) -> TokenMoments:
        """The moments of T x, with T = transforms (P, H, d, d); gradients are transformed by the inverse of T^T."""
        dual = torch.linalg.inv(transforms[0]).mT
        return TokenMoments(
            transforms @ self.second @ transforms.mT,
            (transforms @ self.first[..., None])[..., 0],
            self.weight,
            (transforms @ self.mean[..., None])[..., 0],
            dual @ self.gradient @ dual.mT,
        )

    def _about(self, center: Tensor) -> Tensor:
        """sum theta (x - center)(x - center)^T, (P, H, d, d); center: (P, H, d)."""
        cross = self.first[..., :, None] * center[..., None, :]
        square = self.weight[..., None, None] * center[..., :, None] * center[..., None, :]
        moments = self.second - cross - cross.mT + square
        return (moments + moments.mT) / 2


class TokenCollector:
    """Accumulates the TokenMoments of an attention module over batches, in float64; see models.taylor.feed_collectors.

    The result does not depend on the batch size or the number of processes.
    """

    def __init__(self, module: Module, device: torch.device, gradient: bool = False):
        """gradient: whether to collect TokenMoments.gradient."""
        H, d = module.heads, module.width
        self.with_gradient = gradient

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        P = module.parts
        self.second, self.first, self.weight = zeros(P, H, d, d), zeros(P, H, d), zeros(P, H)
        self.total, self.gradient, self.count = zeros(P, H, d), zeros(H, d, d), zeros()

    def token_importance(self, x: Tensor, g: Tensor) -> Tensor:
        """theta (B, N, P, H): mean over the d dims of |g * x|, the first-order Taylor importance of the paper."""
        return (g * x).abs_().mean(-1, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Tensor, g: Tensor) -> None:
        """Adds a batch: x (B, N, P, H, d), and g = dC/dx in the same shape."""
        theta = self.token_importance(x, g)
        tokens = x.flatten(0, 1).permute(1, 2, 0, 3).to(torch.float64)  # (P, H, T, d)
        weighted = tokens * theta.flatten(0, 1).permute(1, 2, 0)[..., None]  # (P, H, T, d)
        self.second += weighted.mT @ tokens
        self.first += weighted.sum(-2)
        self.weight += theta.sum((0, 1))
        self.total += tokens.sum(-2)
        if self.with_gradient:
            gradients = g[:, :, 0].flatten(0, 1).transpose(0, 1).to(torch.float64)  # (H, T, d)
            self.gradient += gradients.mT @ gradients
        self.count += tokens.shape[-2]

    def finalize(self) -> TokenMoments:
        """The moments over the tokens of all ranks."""
        reduce_sum(self.second, self.first, self.weight, self.total, self.gradient, self.count)
        return TokenMoments(self.second, self.first, self.weight, self.total / self.count, self.gradient / self.count)


@dataclass
class Statistics:
    """What collect_statistics() returns.

    tokens: "<block>.attn" -> TokenMoments.  importance: "<block>.mlp" -> Taylor importance of the hidden units, (M,),
    float64.  outputs: module key -> OutputMoments of the module's last layer; empty if they were not collected.
    """

    tokens: dict[str, TokenMoments]
    importance: dict[str, Tensor]
    outputs: dict[str, OutputMoments] = field(default_factory=dict)

    @property
    def covariance(self) -> dict[str, Tensor]:
        """TokenMoments.covariance() of each attention module: "<block>.attn" -> (P, H, d, d)."""
        return {key: moments.covariance() for key, moments in self.tokens.items()}


def collect_statistics(
    model: Backbone,
    batches: Iterable[tuple[Tensor, Tensor]],
    cost: str = "logit",
    *,
    squared: bool = False,
    outputs: bool = False,
    token_collector: type[TokenCollector] = TokenCollector,
    target: str = "logits",
) -> Statistics:
    """Runs the model forward and backward on the batches and collects its Statistics, summed over all ranks.

    batches: the proxy set, as (images (B, C, height, width), labels (B,)).
    cost: C, whose gradient weighs the tokens, a key of models.targets.COSTS; target: what C is a function of.
    squared: whether the importance of hidden units is the mean of (g * h)^2 instead of |g * h|.
    outputs: whether to collect Statistics.outputs and TokenMoments.gradient, which compensation and the method "best"
    need.
    token_collector: class that accumulates the TokenMoments; a subclass may define token importance differently.
    """
    device = next(model.parameters()).device
    modules = modules_of(model)
    tokens = {key: token_collector(m, device, outputs) for key, m in modules.items() if m.kind == "attn"}
    units = {key: TaylorImportance(m, device, squared) for key, m in modules.items() if m.kind == "mlp"}
    last = {key: OutputCollector(module, device) for key, module in modules.items()} if outputs else {}
    collect(model, {**tokens, **units}, batches, cost, last, target)
    return Statistics(
        {key: collector.finalize() for key, collector in tokens.items()},
        {key: collector.finalize() for key, collector in units.items()},
        {key: collector.finalize() for key, collector in last.items()},
    )
