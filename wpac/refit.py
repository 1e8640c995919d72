"""Refitting: fits the linear layers of a sub-network to the whole network, one after another, on unlabelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from models.backbone import Backbone, cuts_v_alone, first_layers
from models.parts import attention_branch, embed, mlp_branch
from utils import UserError, progress_bar, reduce_sum

from .compensation import DAMPING, UNIFORM_SHARE

BRANCHES: dict[str, Callable[[Block, Tensor], Tensor]] = {"attn": attention_branch, "mlp": mlp_branch}


@torch.no_grad()
def refit(
    model: VisionTransformer, small: VisionTransformer, images: Iterable[Tensor], damping: float = DAMPING
) -> None:
    """Refits the linear layers of every branch of `small`, in place and in forward order, by damped least squares.

    model: the whole network that `small` was cut from.  images: batches (B, C, height, width).
    Each layer is fitted on the inputs that it receives after the layers before it have been refitted. The targets of
    the first layer of a branch (qkv, fc1) are the outputs of that layer for the whole network's residual stream. The
    targets of the last layer (proj, fc2) are that stream after the branch, so that errors of earlier layers are
    corrected, too. Both networks run block by block, and only the activations of one block are kept.
    Raises UserError as check_refit() does.
    """
    check_refit(model)
    device = next(small.parameters()).device
    model, small = model.to(device).eval(), small.eval()
    whole = [embed(model, batch.to(device)) for batch in images]  # residual stream per batch, (B, N, D)
    cut = list(whole)
    for whole_block, cut_block in progress_bar(list(zip(model.blocks, small.blocks, strict=True)), "refit"):
        for kind, branch in BRANCHES.items():
            before, whole = whole, [x + branch(whole_block, x) for x in whole]
            if not hasattr(cut_block, kind):
                continue
            weights = _token_weights(getattr(whole_block, kind), whole[0])
            norm, first, last = _layers(cut_block, kind)
            for layer in first:
                _fit(layer, [norm(x) for x in cut], [layer(norm(x)) for x in before], weights, damping)
            scale = _layer_scale(cut_block, kind, last)
            targets = [(target - x).double() / scale for x, target in zip(cut, whole, strict=True)]
            _fit(last, _inputs_of(last, partial(branch, cut_block), cut), targets, weights, damping)
            cut = [x + branch(cut_block, x) for x in cut]


def check_refit(model: Backbone) -> None:
    """Raises UserError for a model that refit() does not support."""
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"refitting supports only timm's VisionTransformer, not a {type(model).__name__}: leave --refit out"
        )
    if any(cuts_v_alone(block.attn) for block in model.blocks):
        raise UserError("refitting does not support attention with norms of q and k (qk_norm): leave --refit out")


def _layers(block: Block, kind: str) -> tuple[nn.Module, list[nn.Linear], nn.Linear]:
    """The norm, the first linear layers (SwiGLU may have two) and the last linear layer of a branch."""
    if kind == "attn":
        return block.norm1, [block.attn.qkv], block.attn.proj
    return block.norm2, list(first_layers(block.mlp).values()), block.mlp.fc2


def _layer_scale(block: Block, kind: str, last: nn.Linear) -> Tensor:
    """LayerScale of a branch, (D,), in float64; inf where it is 0, which makes the targets of such outputs 0."""
    gamma = getattr(block.ls1 if kind == "attn" else block.ls2, "gamma", last.weight.new_ones(last.out_features))
    return torch.where(gamma == 0, torch.inf, gamma.double())


def _inputs_of(layer: nn.Linear, run: Callable[[Tensor], Tensor], stream: list[Tensor]) -> Iterator[Tensor]:
    """Runs the branch on each batch of the residual stream and yields the inputs of the layer, (B, N, n)."""
    captured: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _module, inputs: captured.append(inputs[0]))
    for x in stream:
        run(x)
        yield captured.pop()
    hook.remove()


def _token_weights(branch: nn.Module, x: Tensor) -> Tensor:
    """Weights (N,) of the positions of a sequence: as in the statistics if the branch is compensated, else equal."""
    equal = torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
    compensation = getattr(branch, "compensation", None)
    if compensation is None:
        return equal
    return UNIFORM_SHARE + (1 - UNIFORM_SHARE) * compensation.positions.to(equal)


def _fit(
    layer: nn.Linear, inputs: Iterable[Tensor], targets: Iterable[Tensor], token_weights: Tensor, damping: float
) -> None:
    """Fits the layer, in place, by weighted least squares from inputs (B, N, n) to targets (B, N, out).

    Damping penalises the difference from the weights before.
    """
    n, out = layer.in_features, layer.out_features
    moments = torch.zeros(n + 1, n + 1 + out, dtype=torch.float64, device=layer.weight.device)
    for x, y in zip(inputs, targets, strict=True):
        rows = torch.cat([x.double(), torch.ones_like(x[..., :1], dtype=torch.float64)], -1).flatten(0, 1)
        weighted = rows * token_weights.repeat(len(x))[:, None]  # (B N, n + 1); the ones give the means
        moments += weighted.mT @ torch.cat([rows, y.double().flatten(0, 1)], 1)
    reduce_sum(moments)
    moments /= moments[n, n].clone()
    mean, mean_out = moments[n, :n], moments[n, n + 1 :]
    if layer.bias is None:  # then no bias can absorb the means
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
