"""The basis of each attention head and the order of hidden units, computed from moments in float64, batched over heads.

H heads, d dims per head, D embedding, M hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-4  # share of the mean variance that is added to the diagonal before a square root is inverted


def descending_eigenvectors(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecomposition of symmetric matrices (..., d, d), largest eigenvalue first.

    Returns the eigenvalues (..., d), clamped at 0, and the eigenvectors (..., d, d) in columns. The sign of an
    eigenvector is arbitrary: its largest entry is made positive, so that the result does not depend on the linear
    algebra library. Computed on the CPU, since not every device supports float64.
    """
    values, vectors = torch.linalg.eigh(covariance.cpu())
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    vectors = vectors * _column_signs(vectors)
    return values.to(covariance.device), vectors.to(covariance.device)


def variance_bases(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's bases: the eigenvectors of C_q + C_k, shared by q and k, and those of C_v.

    covariance: (3, H, d, d) of q, k and v, or (1, H, d, d) of v alone.
    Returns the transforms T (new = T old), in the shape of `covariance`, and the eigenvalues: (2, H, d), of q and k
    together and of v, or (1, H, d), of v alone.
    """
    if len(covariance) == 1:
        values, vectors = descending_eigenvectors(covariance)
        return vectors.mT, values
    values, vectors = descending_eigenvectors(torch.stack([covariance[0] + covariance[1], covariance[2]]))
    return vectors[[0, 0, 1]].mT, values


def score_bases(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Transforms of q and k whose first dims approximate the attention scores best.

    moments: (2, H, d, d), A_q of q about zero and A_k of k about its mean.
    Returns T_q and T_k (2, H, d, d), and the singular values (H, d), descending. With A_q^1/2 A_k^1/2 = U s V^T, the
    scores are q^T k = (U^T A_q^-1/2 q)^T s (V^T A_k^-1/2 k): a sum of uncorrelated terms, the largest first. Each of
    T_q and T_k takes a factor s^1/2, so that T_q^T T_k = 1 and both are equally well conditioned.
    """
    (root_q, root_k), (inverse_q, inverse_k) = square_roots(moments)
    left, values, right = torch.linalg.svd(root_q @ root_k)
    signs = _column_signs(left)
    scale = values.sqrt()[..., None]  # (H, d, 1)
    query = scale * ((left * signs).mT @ inverse_q)
    key = scale * ((right * signs.mT) @ inverse_k)
    return torch.stack([query, key]), values


def value_basis(proj: Tensor, covariance: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal transform of v whose first dims matter most to the loss.

    proj: (H, D, d), the columns W_h of the output projection for each head.  covariance: (H, d, d), S_h, of the inputs
    of the projection.  metric: (D, D), G, the second moment of the cost's gradient at the output of the module.
    Returns T_v (H, d, d) and the squared singular values (H, d), descending. With G^1/2 W_h S_h^1/2 = U s V^T, the best
    k directions of the input are the first k rows of V^T S_h^-1/2. Only their span matters, since compensation predicts
    the dropped dims from the kept ones; a QR decomposition gives an orthogonal basis of the same spans.
    """
    root, inverse = square_roots(covariance)
    effect = proj @ root  # (H, D, d)
    values, right = descending_eigenvectors(effect.mT @ _regularised(metric) @ effect)
    axes, _ = torch.linalg.qr(inverse @ right)  # (H, d, d), the new axes in columns
    return (axes * _column_signs(axes)).mT, values


def elimination_order(weight: Tensor, covariance: Tensor, metric: Tensor, rounds: int = 32) -> Tensor:
    """Orders the hidden units of an MLP by backward elimination; returns their indices (M,), most important first.

    weight: (D, M), of fc2.  covariance: S (M, M), of the hidden units, positive definite.  metric: G (D, D).
    Each of the `rounds` rounds drops the units whose removal raises the loss least once the remaining units compensate
    for it: |G^1/2 w|^2 / (S^-1)_ii, with w and S^-1 updated for the units that remain (optimal brain surgeon).
    """
    root, _ = square_roots(metric)
    weight, inverse = root @ weight, torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    remaining, dropped = torch.ones(weight.shape[1], dtype=torch.bool), []
    size = max(1, len(remaining) // rounds)
    while remaining.any():
        loss = weight.square().sum(0) / inverse.diagonal()
        out = torch.argsort(loss.where(remaining, torch.inf), stable=True)[: min(size, int(remaining.sum()))]
        dropped.append(out.flip(0))
        remaining[out] = False
        update = torch.linalg.solve(inverse[out][:, out], inverse[out])  # (size, M)
        weight = weight - weight[:, out] @ update  # the columns of dropped units become zero
        inverse.addmm_(inverse[:, out], update, alpha=-1)
    return torch.cat(dropped[::-1])


def square_roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of positive semi-definite (..., n, n), regularised by RIDGE, and their inverses."""
    values, vectors = torch.linalg.eigh(_regularised(moments))
    floor = RIDGE / 2 * values.mean(-1, keepdim=True)  # only rounding errors can lead below this
    root = values.clamp(min=floor).sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def _regularised(moments: Tensor) -> Tensor:
    """Adds RIDGE of the mean variance to the diagonal of (..., n, n).

    A matrix of zeros (a head whose outputs or gradients are all zero) becomes the identity.
    """
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    one = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    return torch.where(mean > 0, moments + RIDGE * mean * one, one)


def _column_signs(vectors: Tensor) -> Tensor:
    """Factors +1 or -1, (..., 1, d), that make the largest entry of each column positive."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)
