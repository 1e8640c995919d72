"""Least squares for linear layers, from sums that are collected batch by batch; damping is chosen on held-out images.

T tokens, n inputs x and m outputs r of the map that is fitted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from utils import reduce_sum

from .compensation import COLUMN_CHUNK, ROUNDING_FACTOR

DAMPINGS = (0.0, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)  # shares of each input's variance that are tried


class Moments:
    """Sums over tokens of the products of (x, 1) with (x, 1, r), apart for the images to fit on and the held-out ones.

    Products are taken in float32 (of a float64 model in float64) and summed in float64. x is taken relative to the
    mean of the first batch, so that little is lost to rounding where means are far larger than deviations.
    All ranks call update() at least once, and then fit().
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device):
        self.n, self.epsilon = inputs, 0.0
        self.sums = torch.zeros(2, inputs + 1, inputs + 1 + outputs, dtype=torch.float64, device=device)
        self.shift: Tensor | None = None  # (n,), the same on all ranks

    def update(self, x: Tensor, r: Tensor, weight: Tensor, held_out: bool) -> None:
        """Adds x (T, n) and r (T, m); weight: of each token, (T,)."""
        if self.shift is None:
            total = torch.cat([x.sum(0, dtype=torch.float64), x.new_full((1,), len(x), dtype=torch.float64)])
            reduce_sum(total)
            self.shift = total[:-1] / total[-1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.epsilon = torch.finfo(dtype).eps
        x = x.to(dtype) - self.shift.to(dtype)
        rows = torch.cat([x, torch.ones_like(x[:, :1]), r.to(dtype)], 1)
        weighted = rows[:, : self.n + 1] * weight[:, None].to(dtype)
        for start in range(0, self.n + 1, COLUMN_CHUNK):  # products of x with x are symmetric: half of them do
            columns = slice(start, min(start + COLUMN_CHUNK, self.n + 1))
            self.sums[int(held_out), columns, start:] += weighted[:, columns].mT @ rows[:, start:]

    def finalize(self) -> None:
        """Sums over the ranks; fit() may be called from then on."""
        reduce_sum(self.sums)
        sums, n = self.sums.cpu(), self.n
        sums = sums / sums[:, n, n].view(2, 1, 1)
        square = sums[:, :, : n + 1].triu()
        self.square = square + square.triu(1).mT  # (2, n + 1, n + 1): second moments of (x - shift, 1)
        self.cross = sums[:, :, n + 1 :]  # (2, n + 1, m): products with r

    def fit(self, metric: Tensor, constant: bool) -> tuple[Tensor, Tensor] | None:
        """The map r = D^T x + c that is best on the held-out images, as D (n, m) and c (m,); None if none is.

        "None" means that r = 0 has a lower squared error there. metric: of the error, (m, m), or its diagonal, (m,).
        constant: whether c may differ from 0. Each map is the damped least-squares solution on the other images.
        Damping adds a share of the variance of each input to that variance: an input that is scaled gets the inversely
        scaled weights, however large it is beside the others.
        """
        metric, shift, n = metric.cpu().double(), self.shift.cpu(), self.n
        if constant:
            square, cross = self.square, self.cross
            mean, mean_out = square[0, n, :n], cross[0, n]
            covariance, target = square[0, :n, :n] - torch.outer(mean, mean), cross[0, :n] - torch.outer(mean, mean_out)
        else:
            unshift = torch.cat([torch.eye(n, dtype=torch.float64), shift[:, None]], 1)  # x of (x - shift, 1)
            square, cross = unshift @ self.square @ unshift.mT, unshift @ self.cross
            covariance, target = square[0], cross[0]
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        deviation = torch.where(deviation > 0, deviation, 1.0)[:, None]
        correlation, target = covariance / deviation / deviation.mT, target / deviation
        best, lowest = None, 0.0
        for damping in DAMPINGS:
            floor = max(damping, ROUNDING_FACTOR * self.epsilon)
            factor, failed = torch.linalg.cholesky_ex(correlation + floor * torch.eye(n, dtype=torch.float64))
            if failed:
                continue
            solution = torch.cholesky_solve(target, factor) / deviation
            offset = mean_out - mean @ solution if constant else None
            full = torch.cat([solution, offset[None]]) if constant else solution
            change = full @ metric if metric.ndim == 2 else full * metric
            error = (change * (square[1] @ full - 2 * cross[1])).sum().item()  # beside that of r = 0
            if error < lowest:
                c = offset - shift @ solution if constant else torch.zeros_like(solution[0])
                best, lowest = (solution, c), error
        return best
