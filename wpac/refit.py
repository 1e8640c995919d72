"""Refitting a sub-network to the whole network, layer by layer, on images without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from models.backbone import attention_branch, embed, last_layer, mlp_branch
from utils import progress_bar, reduce_sum

from .compensation import DAMPING, EVEN

RUN: dict[str, Callable[[Block, Tensor], Tensor]] = {"attn": attention_branch, "mlp": mlp_branch}


@torch.no_grad()
def refit(
    model: VisionTransformer, small: VisionTransformer, images: Iterable[Tensor], damping: float = DAMPING
) -> None:
    """Solves the last layer of every branch of `small` anew, in place and in running order, by damped least squares.

    model: the whole network that `small` was cut from.  images: batches (B, C, height, width).  A branch's inputs are
    those that the refitted layers before it really give; its target is what the whole network has in the residual
    stream after the branch, so that it makes up for the drift so far too. Both networks run once, block by block.
    """
    device = next(small.parameters()).device
    model, small = model.to(device).eval(), small.eval()
    wide = [embed(model, batch.to(device)) for batch in images]  # the residual streams, (B, N, D) a batch
    narrow = list(wide)
    for whole, cut in progress_bar(list(zip(model.blocks, small.blocks, strict=True)), "refit"):
        for kind, run in RUN.items():
            weights = _token_weights(getattr(whole, kind), wide[0])
            wide = [x + run(whole, x) for x in wide]
            if not hasattr(cut, kind):
                continue
            _solve(cut, kind, narrow, wide, weights, damping)
            narrow = [x + run(cut, x) for x in narrow]


def _token_weights(branch: nn.Module, x: Tensor) -> Tensor:
    """(N,): as in the statistics, by where in a sequence the gradient lies; even where that is not known."""
    even = torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
    known = getattr(branch, "compensation", None)
    return even if known is None else EVEN + (1 - EVEN) * known.positions.to(even)


def _solve(
    cut: Block, kind: str, narrow: list[Tensor], wide: list[Tensor], token_weights: Tensor, damping: float
) -> None:
    """Least squares for one last layer: its inputs to `wide` less `narrow`; damping draws to the weights it has."""
    layer = last_layer(cut, kind)
    n, D = layer.in_features, layer.out_features
    gamma = getattr(cut.ls1 if kind == "attn" else cut.ls2, "gamma", layer.weight.new_ones(D)).double()
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    moments = torch.zeros(n + 1, n + 1 + D, dtype=torch.float64, device=layer.weight.device)
    for x, target in zip(narrow, wide, strict=True):
        RUN[kind](cut, x)
        inputs = seen.pop().flatten(0, 1).double()  # (B N, n)
        outputs = (target - x).flatten(0, 1).double() / torch.where(gamma == 0, 1.0, gamma)  # (B N, D)
        one = torch.ones(len(inputs), 1, dtype=torch.float64, device=inputs.device)
        left = torch.cat([inputs, one], 1)
        moments += (left * token_weights.repeat(len(x))[:, None]).mT @ torch.cat([left, outputs], 1)
    hook.remove()
    reduce_sum(moments)
    moments /= moments[n, n].clone()
    mean, mean_out = moments[n, :n], moments[n, n + 1 :]
    covariance = moments[:n, :n] - torch.outer(mean, mean)
    cross = moments[:n, n + 1 :] - torch.outer(mean, mean_out)
    before = layer.weight.double()
    floor = covariance.diagonal().mean() * damping
    damped = covariance + torch.where(floor > 0, floor, 1.0) * torch.eye(n, dtype=torch.float64, device=floor.device)
    weight = before + torch.linalg.solve(damped.cpu(), (cross - covariance @ before.mT).cpu()).mT.to(before.device)
    heard = gamma != 0  # an output that LayerScale silences stays what it was
    layer.weight[heard] = weight[heard].to(layer.weight.dtype)
    layer.bias[heard] = (mean_out - weight @ mean)[heard].to(layer.bias.dtype)
