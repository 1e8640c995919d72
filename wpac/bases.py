"""In which basis, and in which order, the dims of a module stand: float64, on the CPU, all heads at once."""

from __future__ import annotations

import torch
from torch import Tensor

SHARE = 1e-4  # of the mean variance, added to every direction before a square root is inverted


def descending_eigenvectors(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., d), descending and not below 0, and eigenvectors (..., d, d) in columns.

    An eigenvector's sign is free: its largest entry is made positive, so that the result does not hang on the
    library. Solved on the CPU, where float64 is at home on every machine.
    """
    values, vectors = torch.linalg.eigh(covariance.cpu())
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    vectors = vectors * _signs(vectors)
    return values.to(covariance.device), vectors.to(covariance.device)


def variance_bases(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's: eigenvectors of C_q + C_k, for q and k alike, and of C_v.

    covariance: (3, H, d, d) of q, k, v. Returns new = T old for q, k, v, (3, H, d, d), and the variances of q and k
    together and of v, (2, H, d). Of v alone, (1, H, d, d): its own.
    """
    if len(covariance) == 1:
        values, vectors = descending_eigenvectors(covariance)
        return vectors.mT, values
    values, vectors = descending_eigenvectors(torch.stack([covariance[0] + covariance[1], covariance[2]]))
    return vectors[[0, 0, 1]].mT, values


def score_bases(moments: Tensor) -> tuple[Tensor, Tensor]:
    """T_q and T_k, (2, H, d, d), and the singular values (H, d): the first dims give the best guess of the scores.

    moments: (2, H, d, d), of q about zero and of k about its mean, A_q and A_k. With A_q^1/2 A_k^1/2 = U s V^T the
    scores are q^T k = (U^T A_q^-1/2 q)^T s (V^T A_k^-1/2 k): a sum of uncorrelated terms, largest first. s is shared
    between the two, so that T_q^T T_k = 1 and neither is badly scaled.
    """
    (root_q, root_k), (inverse_q, inverse_k) = square_roots(moments)
    left, values, right = torch.linalg.svd(root_q @ root_k)
    signs = _signs(left)
    scale = values.sqrt()[..., None]  # (H, d, 1)
    query = scale * ((left * signs).mT @ inverse_q)
    key = scale * ((right * signs.mT) @ inverse_k)
    return torch.stack([query, key]), values


def value_basis(proj: Tensor, covariance: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """T_v (H, d, d), orthogonal, and the squared singular values (H, d): the first dims of v keep the most of the loss.

    proj: (H, D, d), each head's columns of the output projection.  covariance: (H, d, d) of what enters it, S_h.
    metric: (D, D), the second moment G of the cost's gradient at the module's output.
    With G^1/2 W_h S_h^1/2 = U s V^T the best k directions of the input are the first k rows of V^T S_h^-1/2. Only
    their span matters, since what is dropped is guessed from what is kept; QR gives the same spans orthogonally.
    """
    root, inverse = square_roots(covariance)
    effect = proj @ root  # (H, D, d)
    values, right = descending_eigenvectors(effect.mT @ _positive(metric) @ effect)
    axes, _ = torch.linalg.qr(inverse @ right)  # (H, d, d); columns are the new axes
    return (axes * _signs(axes)).mT, values


def elimination_order(weight: Tensor, covariance: Tensor, metric: Tensor, rounds: int = 32) -> Tensor:
    """The order (M,) in which hidden units are worth keeping, the most needed first.

    weight: fc2's (D, M).  covariance: (M, M) of the units, positive definite.  metric: (D, D), G.
    Backward: each round drops the 1/rounds of the units whose loss, once the rest makes up for them as well as it
    can, is least: |G^1/2 w|^2 / (S^-1)_ii, with w and S^-1 those of the units that are left.
    """
    root, _ = square_roots(metric)
    weight, inverse = root @ weight, torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    left, dropped = torch.ones(weight.shape[1], dtype=torch.bool), []
    size = max(1, len(left) // rounds)
    while left.any():
        loss = weight.square().sum(0) / inverse.diagonal()
        out = torch.argsort(loss.where(left, torch.inf), stable=True)[: min(size, int(left.sum()))]
        dropped.append(out.flip(0))
        left[out] = False
        guess = torch.linalg.solve(inverse[out][:, out], inverse[out])  # (size, M); what is dropped becomes zero
        weight = weight - weight[:, out] @ guess
        inverse.addmm_(inverse[:, out], guess, alpha=-1)
    return torch.cat(dropped[::-1])


def square_roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of (..., n, n), made positive, and their inverses."""
    values, vectors = torch.linalg.eigh(_positive(moments))
    floor = SHARE / 2 * values.mean(-1, keepdim=True)  # below this by rounding alone
    root = values.clamp(min=floor).sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def _positive(moments: Tensor) -> Tensor:
    """With a little of the mean variance added; the identity where there is none (a dead head, no gradient)."""
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    one = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    return torch.where(mean > 0, moments + SHARE * mean * one, one)


def _signs(vectors: Tensor) -> Tensor:
    """(..., 1, d): what makes the largest entry of each column positive."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)
