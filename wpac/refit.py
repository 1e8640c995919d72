"""Refitting a sub-network to the whole network, layer by layer, on images without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from models.backbone import Backbone, cuts_v_alone, first_layers
from models.parts import attention_branch, embed, mlp_branch
from utils import UserError, progress_bar, reduce_sum

from .compensation import DAMPING, EVEN

RUN: dict[str, Callable[[Block, Tensor], Tensor]] = {"attn": attention_branch, "mlp": mlp_branch}


@torch.no_grad()
def refit(
    model: VisionTransformer, small: VisionTransformer, images: Iterable[Tensor], damping: float = DAMPING
) -> None:
    """Solves the linear layers of every branch of `small` anew, in place, in running order, by damped least squares.

    model: the whole network that `small` was cut from.  images: batches (B, C, height, width).  The inputs of a layer
    are those that the refitted layers before it really give. The target of a branch's first layer (qkv, fc1) is what
    it gave on the whole network's residual stream; of its last (proj, fc2), that stream after the branch, so that it
    makes up for the drift so far too. Both networks run block by block, with activations kept for one at a time.
    """
    check_refit(model)
    device = next(small.parameters()).device
    model, small = model.to(device).eval(), small.eval()
    wide = [embed(model, batch.to(device)) for batch in images]  # the residual streams, (B, N, D) a batch
    narrow = list(wide)
    for whole, cut in progress_bar(list(zip(model.blocks, small.blocks, strict=True)), "refit"):
        for kind, run in RUN.items():
            before, wide = wide, [x + run(whole, x) for x in wide]
            if not hasattr(cut, kind):
                continue
            weights = _token_weights(getattr(whole, kind), wide[0])
            norm, first, last = _layers(cut, kind)
            for layer in first:
                _solve(layer, [norm(x) for x in narrow], [layer(norm(x)) for x in before], weights, damping)
            scale = _layer_scale(cut, kind, last)
            targets = [(target - x).double() / scale for x, target in zip(narrow, wide, strict=True)]
            _solve(last, _inputs_of(last, partial(run, cut), narrow), targets, weights, damping)
            narrow = [x + run(cut, x) for x in narrow]


def check_refit(model: Backbone) -> None:
    """Raises UserError for a model that refit() does not know."""
    if not isinstance(model, VisionTransformer):
        raise UserError(f"refitting knows vision transformers alone, not a {type(model).__name__}: leave --refit out")
    if any(cuts_v_alone(block.attn) for block in model.blocks):
        raise UserError("refitting does not know attention with norms of q and k (qk_norm): leave --refit out")


def _layers(block: Block, kind: str) -> tuple[nn.Module, list[nn.Linear], nn.Linear]:
    """The norm, the first linear layers (a SwiGLU may have two) and the last one of a branch."""
    if kind == "attn":
        return block.norm1, [block.attn.qkv], block.attn.proj
    return block.norm2, list(first_layers(block.mlp).values()), block.mlp.fc2


def _layer_scale(block: Block, kind: str, last: nn.Linear) -> Tensor:
    """(D,), in float64: what the last layer's outputs are multiplied by; inf where that is nothing, so no target."""
    gamma = getattr(block.ls1 if kind == "attn" else block.ls2, "gamma", last.weight.new_ones(last.out_features))
    return torch.where(gamma == 0, torch.inf, gamma.double())


def _inputs_of(layer: nn.Linear, run: Callable[[Tensor], Tensor], stream: list[Tensor]) -> Iterator[Tensor]:
    """What enters the layer while the branch runs, batch by batch."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    for x in stream:
        run(x)
        yield seen.pop()
    hook.remove()


def _token_weights(branch: nn.Module, x: Tensor) -> Tensor:
    """(N,): as in the statistics, by where in a sequence the gradient lies; even where that is not known."""
    even = torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
    known = getattr(branch, "compensation", None)
    return even if known is None else EVEN + (1 - EVEN) * known.positions.to(even)


def _solve(
    layer: nn.Linear, inputs: Iterable[Tensor], targets: Iterable[Tensor], token_weights: Tensor, damping: float
) -> None:
    """Weighted least squares from inputs (B, N, n) to targets (B, N, out); damping draws to the weights it has."""
    n, out = layer.in_features, layer.out_features
    moments = torch.zeros(n + 1, n + 1 + out, dtype=torch.float64, device=layer.weight.device)
    for x, y in zip(inputs, targets, strict=True):
        left = torch.cat([x.double(), torch.ones_like(x[..., :1], dtype=torch.float64)], -1).flatten(0, 1)
        weighted = left * token_weights.repeat(len(x))[:, None]  # (B N, n + 1)
        moments += weighted.mT @ torch.cat([left, y.double().flatten(0, 1)], 1)
    reduce_sum(moments)
    moments /= moments[n, n].clone()
    mean, mean_out = moments[n, :n], moments[n, n + 1 :]
    if layer.bias is None:  # then nothing can take up a mean
        mean, mean_out = torch.zeros_like(mean), torch.zeros_like(mean_out)
    covariance = moments[:n, :n] - torch.outer(mean, mean)
    cross = moments[:n, n + 1 :] - torch.outer(mean, mean_out)
    before = layer.weight.double()
    floor = covariance.diagonal().mean() * damping
    damped = covariance + torch.where(floor > 0, floor, 1.0) * torch.eye(n, dtype=torch.float64, device=floor.device)
    weight = before + torch.linalg.solve(damped.cpu(), (cross - covariance @ before.mT).cpu()).mT.to(before.device)
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(mean_out - weight @ mean)
