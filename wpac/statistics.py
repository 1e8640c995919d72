"""What contraction has to know of a model, all of it in one forward and backward pass over the proxy images."""

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
    """Of the P parts of every head, q, k and v or v alone, theta the weight of a token; float64.

    second (P, H, d, d): sum theta x x^T.  first (P, H, d): sum theta x.  weight (P, H): sum theta.
    mean (P, H, d): the plain mean of x.  gradient (H, d, d): the plain mean of g g^T of q, zero where not asked for.
    """

    second: Tensor
    first: Tensor
    weight: Tensor
    mean: Tensor
    gradient: Tensor

    def covariance(self) -> Tensor:
        """sum theta (x - mean)(x - mean)^T, (P, H, d, d), symmetric (paper, WPAC)."""
        return self._about(self.mean)

    def scores(self) -> Tensor:
        """What the scores q^T k hang on, (2, H, d, d): weighted moments of q about zero, and of k about its mean.

        q is not centred: its mean times k differs from key to key. k is: a shift of all keys leaves the softmax as it
        is.
        """
        k_mean = self.first[1] / self.weight[1, :, None].clamp(min=torch.finfo(torch.float64).tiny)
        return self._about(torch.stack([torch.zeros_like(k_mean), k_mean, self.mean[2]]))[:2]

    def moved(self, transforms: Tensor) -> TokenMoments:
        """The moments of T x, transforms (P, H, d, d); a gradient moves with the inverse of T^T."""
        dual = torch.linalg.inv(transforms[0]).mT
        return TokenMoments(
            transforms @ self.second @ transforms.mT,
            (transforms @ self.first[..., None])[..., 0],
            self.weight,
            (transforms @ self.mean[..., None])[..., 0],
            dual @ self.gradient @ dual.mT,
        )

    def _about(self, center: Tensor) -> Tensor:
        cross = self.first[..., :, None] * center[..., None, :]
        square = self.weight[..., None, None] * center[..., :, None] * center[..., None, :]
        moments = self.second - cross - cross.mT + square
        return (moments + moments.mT) / 2


class TokenCollector:
    """Streams the TokenMoments of an attention in float64.

    theta is the importance of a token for one head: the mean over its d dims of |g * x| (first-order Taylor), of every
    token; weighting, which studies/truncation.py compares: "none" has 1 instead, "class" 0 for all but the
    first.  Nothing depends on how the tokens are cut into batches or spread over ranks.
    """

    def __init__(self, module: Module, device: torch.device, gradient: bool = False, weighting: str = "all"):
        """gradient: also of the gradients at q."""
        H, d = module.heads, module.width
        self.with_gradient, self.weighting = gradient, weighting

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        P = module.parts
        self.second, self.first, self.weight = zeros(P, H, d, d), zeros(P, H, d), zeros(P, H)
        self.plain, self.gradient, self.count = zeros(P, H, d), zeros(H, d, d), zeros()

    @torch.no_grad()
    def update(self, x: Tensor, g: Tensor) -> None:
        """x, g: (B, N, P, H, d)."""
        theta = (g * x).abs_().mean(-1, dtype=torch.float64)  # (B, N, P, H)
        if self.weighting == "none":
            theta.fill_(1)
        elif self.weighting == "class":
            theta[:, 1:] = 0
        tokens = x.flatten(0, 1).permute(1, 2, 0, 3).to(torch.float64)  # (P, H, T, d)
        weighted = tokens * theta.flatten(0, 1).permute(1, 2, 0)[..., None]  # (P, H, T, d)
        self.second += weighted.mT @ tokens
        self.first += weighted.sum(-2)
        self.weight += theta.sum((0, 1))
        self.plain += tokens.sum(-2)
        if self.with_gradient:
            gradients = g[:, :, 0].flatten(0, 1).transpose(0, 1).to(torch.float64)  # (H, T, d)
            self.gradient += gradients.mT @ gradients
        self.count += tokens.shape[-2]

    def finalize(self) -> TokenMoments:
        """The moments of all ranks' tokens together."""
        reduce_sum(self.second, self.first, self.weight, self.plain, self.gradient, self.count)
        return TokenMoments(self.second, self.first, self.weight, self.plain / self.count, self.gradient / self.count)


@dataclass
class Statistics:
    """tokens: "<block>.attn" -> TokenMoments; importance: "<block>.mlp" -> (M,) in float64, of hidden units.

    outputs: every module -> OutputMoments of its last layer, where asked for.
    """

    tokens: dict[str, TokenMoments]
    importance: dict[str, Tensor]
    outputs: dict[str, OutputMoments] = field(default_factory=dict)

    @property
    def covariance(self) -> dict[str, Tensor]:
        """ "<block>.attn" -> (P, H, d, d) (paper, WPAC)."""
        return {key: moments.covariance() for key, moments in self.tokens.items()}


def collect_statistics(
    model: Backbone,
    batches: Iterable[tuple[Tensor, Tensor]],
    cost: str = "logit",
    *,
    squared: bool = False,
    outputs: bool = False,
    weighting: str = "all",
) -> Statistics:
    """Runs the proxy batches (images (B, C, height, width), targets (B,)) once and reduces over the ranks.

    `cost` is C, whose gradient weighs the tokens: "logit", "ce" or "pred" (see models.taylor.COSTS).
    squared: importance is the mean of (g * h)^2, not of |g * h|.  outputs: also what compensation needs.  weighting: of
    the tokens, see TokenCollector.
    """
    device = next(model.parameters()).device
    modules = modules_of(model)
    tokens = {key: TokenCollector(m, device, outputs, weighting) for key, m in modules.items() if m.kind == "attn"}
    units = {key: TaylorImportance(m, device, squared) for key, m in modules.items() if m.kind == "mlp"}
    last = {key: OutputCollector(module, device) for key, module in modules.items()} if outputs else {}
    collect(model, {**tokens, **units}, batches, cost, last)
    return Statistics(
        {key: collector.finalize() for key, collector in tokens.items()},
        {key: collector.finalize() for key, collector in units.items()},
        {key: collector.finalize() for key, collector in last.items()},
    )
