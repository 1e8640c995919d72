"""WPAC's transform: rotate and sort the weights so that knowledge sits first, without changing the function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.backbone import Backbone, Module, blocks_of, first_layers, modules_of, value_bias, value_layer

from .bases import elimination_order, score_bases, value_basis, variance_bases
from .compensation import DAMPING, OutputMoments, ordered_layer
from .statistics import Statistics, TokenMoments

BASES = ("wpac", "fisher")
ORDERS = ("taylor", "hessian", "fisher")


@torch.no_grad()
def contract(
    model: Backbone,
    statistics: Statistics,
    basis: str = "wpac",
    order: str = "taylor",
    damping: float = DAMPING,
) -> dict[str, Tensor]:
    """Contracts the model in place; its logits stay what they were (relative error < 1e-10 in float64).

    basis: "wpac", the paper's principal axes, or "fisher", by their effect on the scores and on the loss.  order, of
    hidden units: by the importance in the statistics (Taylor or Hessian, as collected), or "fisher", by the loss
    without them, what is left making up for it.  What is "fisher" needs statistics.outputs; they move into the new
    coordinates.

    Returns the spectra: for "<block>.attn" (2, d), the share of variance (fisher: of the effect) of each dim of q and
    k together and of v, over all heads, or (1, d), v's, where v alone is cut; for "<block>.mlp" (M,), the share of
    importance of each hidden unit.
    Raises KeyError for statistics of another model.
    """
    spectra, blocks = {}, blocks_of(model)
    for key, module in modules_of(model).items():
        block, outputs = blocks[module.block], statistics.outputs.get(key)
        if module.kind == "attn" and basis == "wpac":
            transforms, spectrum = variance_bases(statistics.tokens[key].covariance())
        elif module.kind == "attn":
            transforms, spectrum = _fisher_bases(block.attn, module, statistics.tokens[key], outputs)
        if module.kind == "attn":
            spectra[key] = torch.stack([_shares(values.sum(0)) for values in spectrum])
            rotate_attention(block.attn, transforms)
            if outputs:
                statistics.tokens[key] = statistics.tokens[key].moved(transforms)
                statistics.outputs[key] = outputs.moved(torch.block_diag(*transforms[-1])).ordered(
                    torch.arange(module.heads * module.width).view(module.heads, -1).T.flatten()
                )
            continue
        importance = statistics.importance[key]
        indices = torch.argsort(importance, descending=True, stable=True)
        if order == "fisher":
            weight, _ = ordered_layer(model, module)
            indices = elimination_order(weight.cpu(), outputs.damped(damping).cpu(), outputs.metric.cpu())
            indices = indices.to(weight.device)
        spectra[key] = _shares(importance[indices])
        permute_mlp(block.mlp, indices)
        if outputs:
            statistics.outputs[key] = outputs.ordered(indices)
    return spectra


def _fisher_bases(
    attn: nn.Module, module: Module, tokens: TokenMoments, outputs: OutputMoments
) -> tuple[Tensor, Tensor]:
    """Transforms of the parts (P, H, d, d), and the effects of q and k together and of v (2, H, d), or of v alone."""
    H, d = module.heads, module.width
    proj = attn.proj.weight.double().cpu().unflatten(1, (H, d)).transpose(0, 1)  # (H, D, d)
    heads = torch.arange(H)
    covariance = outputs.covariance.cpu().view(H, d, H, d)[heads, :, heads]  # (H, d, d)
    values, value_values = value_basis(proj, covariance, outputs.metric.cpu())
    device = attn.proj.weight.device
    if module.parts == 1:
        return values[None].to(device), value_values[None]
    scores, score_values = score_bases(tokens.scores().cpu())
    return torch.cat([scores, values[None]]).to(device), torch.stack([score_values, value_values]).to(device)


@torch.no_grad()
def rotate_attention(attn: nn.Module, transforms: Tensor) -> None:
    """q, k, v of each head become T_q q, T_k k, T_v v, and `proj` takes v back, in float64.

    transforms: (3, H, d, d), or (1, H, d, d) for v alone. The function stays where T_q^T T_k = 1, as it is for one
    orthogonal transform of both.
    """
    P, H, d, _ = transforms.shape
    for parameter in (value_layer(attn).weight, value_bias(attn)):
        if parameter is not None:
            last = parameter[-P * H * d :]  # what comes before is not rotated
            _assign(last, transforms @ last.double().view(P, H, d, -1))
    proj = attn.proj.weight.double().view(-1, H, d).transpose(0, 1)  # (H, D, d)
    _assign(attn.proj.weight, (proj @ torch.linalg.inv(transforms[-1])).transpose(0, 1))


@torch.no_grad()
def permute_mlp(mlp: nn.Module, order: Tensor) -> None:
    """Puts the hidden units in the order (M,), with their gates where there are such."""
    for layer in first_layers(mlp).values():
        for parameter in layer.parameters():
            _assign(parameter, parameter.unflatten(0, (-1, len(order)))[:, order])
    _assign(mlp.fc2.weight, mlp.fc2.weight[:, order])


@torch.no_grad()
def centre_values(model: Backbone, statistics: Statistics) -> None:
    """Shifts v of each head so that what enters `proj` has mean zero; `proj`'s bias takes it up, in float64.

    Exact, as the rows of an attention sum to 1. (k could be shifted too, but that changes nothing even when dims are
    cut: the softmax does not see it.) Compensation contains it. Without compensation it does harm where the cut is
    deep, so nothing but studies/contraction.py uses it. statistics: as contract() leaves them; their means
    follow.
    """
    for key, module in modules_of(model).items():
        attn = getattr(blocks_of(model)[module.block], "attn", None)
        if module.kind != "attn" or attn.qkv.bias is None or attn.proj.bias is None:
            continue
        outputs = statistics.outputs[key]
        mean = outputs.mean.view(module.width, module.heads).T  # (H, d)
        bias = attn.qkv.bias.double().view(3, *mean.shape).clone()
        bias[2] -= mean
        _assign(attn.qkv.bias, bias)
        _assign(attn.proj.bias, attn.proj.bias.double() + attn.proj.weight.double() @ mean.flatten())
        outputs.mean.zero_()


def _shares(values: Tensor) -> Tensor:
    total = values.sum()
    return values / total if total > 0 else torch.full_like(values, 1 / values.numel())


def _assign(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.reshape(parameter.shape))
