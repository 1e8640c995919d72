"""WPAC's transform: rotates and reorders the weights, most important dims first, without changing the function."""

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
    """Contracts the model in place: the dims of every module are ordered by importance and its outputs stay the same.

    The relative error of the outputs is below 1e-10 in float64. The weights are transformed in float64 and cast back.

    basis: of attention, "wpac" (the paper's principal axes) or "fisher" (by their effect on the scores and the loss).
    order: of hidden units, "taylor" or "hessian" (descending statistics.importance, as it was collected) or "fisher"
    (by the loss without them once the remaining units compensate).
    "fisher" needs statistics.outputs. If the statistics have outputs, they and the token moments are transformed in
    place: outputs are then in cut order (see wpac.compensation).

    Returns the spectra, shares that sum to 1. For "<block>.attn" (2, d): the share of variance (fisher: of effect) of
    each dim, summed over heads, of q and k together and of v; (1, d) where only v is cut. For "<block>.mlp" (M,): the
    share of importance of each hidden unit.
    Raises KeyError if the statistics belong to another model.
    """
    spectra = {}
    for key, module in modules_of(model).items():
        if module.kind == "attn":
            spectra[key] = _contract_attention(model, module, statistics, basis)
        else:
            spectra[key] = _contract_mlp(model, module, statistics, order, damping)
    return spectra


def _contract_attention(model: Backbone, module: Module, statistics: Statistics, basis: str) -> Tensor:
    """Contracts one attention module; returns its spectrum as contract() does."""
    key, attn = module.key, blocks_of(model)[module.block].attn
    outputs, tokens = statistics.outputs.get(key), statistics.tokens[key]
    if basis == "wpac":
        transforms, spectrum = variance_bases(tokens.covariance())
    else:
        transforms, spectrum = _fisher_bases(attn, module, tokens, outputs)
    rotate_attention(attn, transforms)
    if outputs:
        statistics.tokens[key] = tokens.transformed(transforms)
        cut_order = torch.arange(module.heads * module.width).view(module.heads, -1).T.flatten()
        statistics.outputs[key] = outputs.transformed(torch.block_diag(*transforms[-1])).reordered(cut_order)
    return torch.stack([_shares(values.sum(0)) for values in spectrum])


def _contract_mlp(model: Backbone, module: Module, statistics: Statistics, order: str, damping: float) -> Tensor:
    """Contracts one MLP; returns its spectrum as contract() does."""
    key, mlp = module.key, blocks_of(model)[module.block].mlp
    outputs, importance = statistics.outputs.get(key), statistics.importance[key]
    indices = torch.argsort(importance, descending=True, stable=True)
    if order == "fisher":
        weight, _ = ordered_layer(model, module)
        indices = elimination_order(weight.cpu(), outputs.damped(damping).cpu(), outputs.metric.cpu())
        indices = indices.to(weight.device)
    permute_mlp(mlp, indices)
    if outputs:
        statistics.outputs[key] = outputs.reordered(indices)
    return _shares(importance[indices])


def _fisher_bases(
    attn: nn.Module, module: Module, tokens: TokenMoments, outputs: OutputMoments
) -> tuple[Tensor, Tensor]:
    """Transforms (P, H, d, d), and the effects of q and k together and of v (2, H, d), or of v alone (1, H, d)."""
    H, d = module.heads, module.width
    proj = attn.proj.weight.double().cpu().unflatten(1, (H, d)).transpose(0, 1)  # (H, D, d)
    heads = torch.arange(H)
    covariance = outputs.covariance.cpu().view(H, d, H, d)[heads, :, heads]  # (H, d, d)
    transform_v, effect_v = value_basis(proj, covariance, outputs.metric.cpu())
    device = attn.proj.weight.device
    if module.parts == 1:
        return transform_v[None].to(device), effect_v[None]
    transforms_qk, effect_qk = score_bases(tokens.score_moments().cpu())
    return torch.cat([transforms_qk, transform_v[None]]).to(device), torch.stack([effect_qk, effect_v]).to(device)


@torch.no_grad()
def rotate_attention(attn: nn.Module, transforms: Tensor) -> None:
    """Replaces q, k, v of each head by T_q q, T_k k, T_v v, and applies the inverse of T_v in `proj`; in float64.

    transforms: (3, H, d, d), or (1, H, d, d) for v alone. The function does not change if T_q^T T_k = 1, which holds
    for one orthogonal transform of both.
    """
    P, H, d, _ = transforms.shape
    for parameter in (value_layer(attn).weight, value_bias(attn)):
        if parameter is not None:
            rows = parameter[-P * H * d :]  # all rows, or those of v, which are the last ones
            _assign(rows, transforms @ rows.double().view(P, H, d, -1))
    proj = attn.proj.weight.double().view(-1, H, d).transpose(0, 1)  # (H, D, d)
    _assign(attn.proj.weight, (proj @ torch.linalg.inv(transforms[-1])).transpose(0, 1))


@torch.no_grad()
def permute_mlp(mlp: nn.Module, order: Tensor) -> None:
    """Reorders the hidden units, and the gates of a gated MLP, by the indices `order` (M,)."""
    for layer in first_layers(mlp).values():
        for parameter in layer.parameters():
            _assign(parameter, parameter.unflatten(0, (-1, len(order)))[:, order])
    _assign(mlp.fc2.weight, mlp.fc2.weight[:, order])


def _shares(values: Tensor) -> Tensor:
    """Scales the values to sum 1; equal shares if all are 0."""
    total = values.sum()
    return values / total if total > 0 else torch.full_like(values, 1 / values.numel())


def _assign(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.reshape(parameter.shape))
