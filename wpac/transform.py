"""WPAC's transform: rotate and sort the weights so that knowledge sits first, without changing the function."""

from __future__ import annotations

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .statistics import Statistics


@torch.no_grad()
def contract(model: VisionTransformer, statistics: Statistics) -> dict[str, Tensor]:
    """Contracts the model in place; its logits stay what they were (relative error < 1e-10 in float64).

    Returns the spectra: for "<block>.attn" (2, d), the share of weighted variance of each dim of q and k together
    and of v, over all heads; for "<block>.mlp" (M,), the share of importance of each hidden unit; both descending.
    """
    spectra = {}
    for key, covariance in statistics.covariance.items():
        block, _ = key.split(".")
        spectra[key] = rotate_attention(model.blocks[int(block)].attn, covariance)
    for key, importance in statistics.importance.items():
        block, _ = key.split(".")
        spectra[key] = sort_mlp(model.blocks[int(block)].mlp, importance)
    return spectra


@torch.no_grad()
def rotate_attention(attn: Attention, covariance: Tensor) -> Tensor:
    """Rotates q and k of each head by one basis, v by another and `proj` back, in float64.

    covariance: (3, H, d, d) of q, k, v. The bases are the eigenvectors of C_q + C_k and of C_v, eigenvalues
    descending; q^T k does not change under a common rotation, and proj takes up v's (paper, WPAC).
    Returns the shares of variance (2, d).
    """
    H, d = attn.num_heads, attn.head_dim
    qk_values, qk_basis = descending_eigenvectors(covariance[0] + covariance[1])
    v_values, v_basis = descending_eigenvectors(covariance[2])
    bases = torch.stack([qk_basis, qk_basis, v_basis])  # (3, H, d, d); columns are the new axes

    weight = attn.qkv.weight.double().view(3, H, d, -1)
    _assign(attn.qkv.weight, bases.mT @ weight)
    if attn.qkv.bias is not None:
        bias = attn.qkv.bias.double().view(3, H, d, 1)
        _assign(attn.qkv.bias, bases.mT @ bias)
    proj = attn.proj.weight.double().view(-1, H, d).transpose(0, 1)  # (H, D, d)
    _assign(attn.proj.weight, (proj @ v_basis).transpose(0, 1))
    return torch.stack([_shares(qk_values.sum(0)), _shares(v_values.sum(0))])


@torch.no_grad()
def sort_mlp(mlp: Mlp, importance: Tensor) -> Tensor:
    """Permutes the hidden units by importance (M,), descending, equal ones in their old order.

    Returns the shares of importance (M,) in the new order.
    """
    order = torch.argsort(importance, descending=True, stable=True)
    _assign(mlp.fc1.weight, mlp.fc1.weight[order])
    if mlp.fc1.bias is not None:
        _assign(mlp.fc1.bias, mlp.fc1.bias[order])
    _assign(mlp.fc2.weight, mlp.fc2.weight[:, order])
    return _shares(importance[order])


def descending_eigenvectors(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., d), descending and not below 0, and eigenvectors (..., d, d) in columns.

    An eigenvector's sign is free: its largest entry is made positive, so that the result does not hang on the
    library. Solved on the CPU, where float64 is at home on every machine.
    """
    values, vectors = torch.linalg.eigh(covariance.cpu())
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    return values.to(covariance.device), vectors.to(covariance.device)


def _shares(values: Tensor) -> Tensor:
    total = values.sum()
    return values / total if total > 0 else torch.full_like(values, 1 / values.numel())


def _assign(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value.reshape(parameter.shape))
