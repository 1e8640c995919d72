"""Compensation: the last layer of a module predicts the inputs that were cut from those that were kept.

Cutting a module removes inputs x of its last linear layer, `proj` or `fc2`. With mean mu and covariance S of x on the
proxy set, the least-squares prediction of the removed inputs r from the first k is mu_r + S_rk S_kk^-1 (x_k - mu_k).
The layer absorbs it, so the sub-network has no additional parameters:

    W_k = W_:k + W_r S_rk S_kk^-1        b_k = b + W mu - W_k mu_k

With the Cholesky factorisation S = L L^T, S_rk S_kk^-1 = L_rk L_kk^-1, so one factor serves every width.

D embedding, n inputs of the last layer (H heads times d dims per head, or M hidden units), B images, N tokens. Inputs
are "in cut order" when the last ones leave first: dim 0 of all heads, dim 1 of all heads, ..., or the hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from files import atomic_file, load_checkpoint
from models.backbone import Backbone, Module, blocks_of, last_layer, modules_of
from utils import UserError, exact_float32, reduce_sum

COMPENSATION = "compensation.safetensors"
DAMPING = 1e-2  # share of the mean variance added to the diagonal of S; studies/contraction.py measures others
UNIFORM_SHARE = 0.5  # share of a token's weight that is the same for all tokens; the rest depends on its gradient
ROUNDING_FACTOR = 8  # times the machine epsilon: bound on the relative error, in norm, of a sum of products
COLUMN_CHUNK = 128  # columns per product in OutputCollector: S is symmetric, so almost half of it need not be computed


@dataclass
class OutputMoments:
    """Moments at the last layer of a module.

    mean (n,), covariance (n, n): of its inputs, each token weighted (see OutputCollector).
    metric (D, D): G, the second moment of the cost's gradient at its output.
    positions (N,): mean squared norm of that gradient at each position of the sequence, divided by its mean over N.
    rounding: bound on the rounding error of the covariance, in norm.
    """

    mean: Tensor
    covariance: Tensor
    metric: Tensor
    positions: Tensor
    rounding: float = 0.0

    def damped(self, damping: float = DAMPING) -> Tensor:
        """The covariance with `damping` times the mean variance added to its diagonal: always positive definite.

        At least the rounding error is added; an all-zero covariance becomes the identity.
        """
        mean = self.covariance.diagonal().mean()
        damped = self.covariance.clone()
        damped.diagonal().add_((damping * mean).clamp(min=self.rounding) if mean > 0 else torch.ones_like(mean))
        return damped

    def transformed(self, transform: Tensor) -> OutputMoments:
        """The moments of transform @ x; transform: (n, n)."""
        return replace(self, mean=transform @ self.mean, covariance=transform @ self.covariance @ transform.mT)

    def reordered(self, order: Tensor) -> OutputMoments:
        """The moments of x[order]; order: (n,)."""
        return replace(self, mean=self.mean[order], covariance=self.covariance[order][:, order])


class OutputCollector:
    """Accumulates the OutputMoments of a module over batches; see models.taylor.feed_collectors for how it is called.

    The weight of a token is UNIFORM_SHARE, plus the rest times |g|^2 relative to its mean over the image: the
    prediction should be best where the loss is most sensitive. The weights of an image's tokens average to 1, so the
    result does not depend on the batch size or the number of processes.
    Products are taken in the dtype of the model, which halves the time in float32, and summed in float64; the rounding
    error is far smaller than any sensible damping (see OutputMoments.damped).
    """

    def __init__(self, module: Module, device: torch.device):
        n = module.heads * module.width

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.second, self.first, self.tokens = zeros(n, n), zeros(n), zeros()
        self.metric = zeros(module.dim, module.dim)
        self.epsilon = 0.0  # machine epsilon of the dtype of the products
        self.positions: Tensor | None = None  # (N,); N is known from the first batch on

    @torch.no_grad()
    def update(self, x: Tensor, g: Tensor) -> None:
        """Adds a batch: x (B, N, n), the inputs of the layer, and g (B, N, D), the cost's gradient at its output."""
        self.epsilon = torch.finfo(x.dtype).eps
        energy = g.double().square().sum(-1)  # (B, N)
        share = energy / energy.mean(1, keepdim=True)
        weight = UNIFORM_SHARE + (1 - UNIFORM_SHARE) * torch.where(share.isfinite(), share, 1.0)
        self.positions = energy.sum(0) + (0 if self.positions is None else self.positions)
        self.tokens += energy.numel()
        rows, weighted = x.flatten(0, 1), (x * weight[..., None].to(x.dtype)).flatten(0, 1)  # (B N, n)
        for start in range(0, len(self.first), COLUMN_CHUNK):
            columns = slice(start, start + COLUMN_CHUNK)
            self.second[columns, start:] += weighted[:, columns].mT @ rows[:, start:]
        self.first += weighted.sum(0, dtype=torch.float64)
        g = g.flatten(0, 1)
        self.metric += g.mT @ g

    def finalize(self) -> OutputMoments:
        """The moments over the tokens of all ranks; to be called once.

        They take the place of the sums: the sums of all modules together are too large to be held twice.
        """
        reduce_sum(self.second, self.first, self.tokens, self.metric, self.positions)
        mean, second = self.first / self.tokens, self.second.triu_().div_(self.tokens)
        second += second.triu(1).mT
        rounding = ROUNDING_FACTOR * self.epsilon * second.norm().item()
        total = self.positions.mean()
        positions = self.positions / total if total > 0 else torch.ones_like(self.positions)
        second -= torch.outer(mean, mean)
        return OutputMoments(mean, second, self.metric.div_(self.tokens), positions, rounding)


class Compensation(nn.Module):
    """Cuts the last layer of a module to its first k inputs so that it predicts the inputs it no longer has.

    mean (n,), lower (n, n): mean and Cholesky factor L of the inputs, in cut order.  positions (N,): see OutputMoments.
    These are non-persistent buffers: they move with the model and are not in its state dict.
    """

    def __init__(self, mean: Tensor, lower: Tensor, positions: Tensor):
        super().__init__()
        for name, value in (("mean", mean), ("lower", lower), ("positions", positions)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Weight (D, n), with its inputs in cut order, and bias (D,) to weight (D, k) and bias (D,).

        Computed in float64, or in training, where that would take too long, in float32 at least (on CUDA, gradients
        are in TF32 where the other ones are); returned in the dtypes of weight and bias. k = n returns the layer
        unchanged.
        """
        if k == weight.shape[1]:
            return weight, bias
        training = torch.is_grad_enabled() and weight.requires_grad
        dtype = torch.promote_types(weight.dtype, torch.float32) if training else torch.float64
        W, mean, lower = weight.to(dtype), self.mean.to(dtype), self.lower.to(dtype)
        with torch.autocast(weight.device.type, enabled=False), exact_float32():
            update = torch.linalg.solve_triangular(lower[:k, :k], W[:, k:] @ lower[k:, :k], upper=False, left=False)
            kept = W[:, :k] + update
            return kept.to(weight.dtype), (bias.to(dtype) + W @ mean - kept @ mean[:k]).to(bias.dtype)


def compensate(model: Backbone, moments: dict[str, OutputMoments], damping: float = DAMPING) -> list[str]:
    """Attaches a Compensation to modules of the model, in place; later cuts of these modules use it.

    moments: module key -> OutputMoments, in cut order, as contract() leaves them. To hold less at the same time, call
    this with one module after another. The factors are on the CPU, in the dtype of the weights or in float32.
    A module keeps none if compensation would be worse than a plain cut on the proxy set; the keys of those modules are
    returned. Raises UserError for a last layer without a bias.
    """
    refused, modules = [], modules_of(model)
    for key, moment in moments.items():
        module = modules[key]
        dtype = last_layer(blocks_of(model)[module.block], module.kind).weight.dtype
        lower = torch.linalg.cholesky(moment.damped(damping).cpu()).to(torch.promote_types(dtype, torch.float32))
        compensation = Compensation(moment.mean.cpu(), lower, moment.positions.cpu())
        weight, bias = ordered_layer(model, module)
        n = weight.shape[1]
        errors = [_cut_errors(weight, bias, moment, compensation, k) for k in (n // 4, n // 2)]
        if not all(compensated <= cut for compensated, cut in errors):  # "not all", so that NaN is refused as well
            refused.append(key)
            compensation = None
        _attach(model, module, compensation)
    return refused


def ordered_layer(model: Backbone, module: Module) -> tuple[Tensor, Tensor]:
    """Weight (D, n), with its inputs in cut order, and bias (D,) of a module's last layer, in float64.

    In attention, that is dim 0 of all heads, dim 1 of all heads, ... Raises UserError for a layer without a bias.
    """
    layer = last_layer(blocks_of(model)[module.block], module.kind)
    if layer.bias is None:
        raise UserError(f"{module.key}: its last layer has no bias, which compensation needs")
    weight = layer.weight.detach().double().unflatten(1, (module.heads, module.width))
    return weight.transpose(1, 2).flatten(1), layer.bias.detach().double()


def _cut_errors(
    weight: Tensor, bias: Tensor, moment: OutputMoments, compensation: Compensation, k: int
) -> tuple[float, float]:
    """Squared error, in the metric of the loss, of a layer cut to k inputs: with compensation and without."""
    errors = []
    for cut_weight, cut_bias in (compensation.to(weight.device)(weight, bias, k), (weight[:, :k], bias)):
        lost = weight.clone()
        lost[:, :k] -= cut_weight
        constant = lost @ moment.mean + bias - cut_bias
        square = lost @ moment.covariance @ lost.mT + torch.outer(constant, constant)
        errors.append((moment.metric * square).sum().item())
    return errors[0], errors[1]


def _branch_of(model: Backbone, module: Module) -> nn.Module:
    return getattr(blocks_of(model)[module.block], module.kind)


def _attach(model: Backbone, module: Module, compensation: Compensation | None) -> None:
    _branch_of(model, module).compensation = compensation


# ---------------------------------------------------------------------------------------------------------------------
# compensation.safetensors: per module, mean, positions and the lower triangle of L, row by row; a checksum of the model


def save_compensation(path: Path, model: Backbone, stamp: str) -> int:
    """Writes the Compensation of each module that has one, atomically; returns the size of the file in bytes.

    stamp: hexadecimal, of the weights that the file belongs to.
    """
    tensors = {"stamp": torch.tensor(int(stamp, 16))}
    for key, module in modules_of(model).items():
        compensation = getattr(_branch_of(model, module), "compensation", None)
        if compensation is not None:
            mean, lower, n = compensation.mean, compensation.lower, len(compensation.mean)
            tensors |= {f"{key}.mean": mean.float(), f"{key}.positions": compensation.positions.float()}
            tensors[f"{key}.lower"] = lower.to(_stored_dtype(lower))[tuple(torch.tril_indices(n, n))]
    with atomic_file(path) as temporary:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary)
    return path.stat().st_size


def _stored_dtype(lower: Tensor) -> torch.dtype:
    """float16 (measured in docs/RESULTS.md: no loss of accuracy) unless the factor's values exceed its range."""
    fits = lower.diagonal().min() > 1e-3 and lower.abs().max() < 6e4
    return torch.float16 if fits else torch.float32


def load_compensation(path: Path, model: Backbone, stamp: str) -> None:
    """Reads a file of save_compensation() and attaches what it holds to the model, in place.

    stamp: of the weights of the model. Raises UserError if the file is damaged, or was made for another model or for
    other weights.
    """
    tensors = load_checkpoint(path)
    found_stamp = tensors.pop("stamp", None)
    modules = modules_of(model)
    for name, value in tensors.items():
        key, _, part = name.rpartition(".")
        n = modules[key].heads * modules[key].width if key in modules else 0
        positions = modules[key].keys if n and modules[key].kind == "attn" else modules[key].tokens if n else 0
        length = {"mean": n, "lower": n * (n + 1) // 2, "positions": positions}.get(part, -1)
        if n == 0 or value.shape != (length,) or value.dtype not in (torch.float16, torch.float32):
            found = f"shape {tuple(value.shape)} and type {value.dtype}"
            raise UserError(f"{path} is not a compensation of this model: {name} has {found}")
    if found_stamp is None or found_stamp.numel() != 1 or found_stamp.item() != int(stamp, 16):
        raise UserError(f"{path} was made for other weights; make it again with reparam.py, or give --no-compensate")
    for key, module in modules.items():
        names = [f"{key}.{part}" for part in ("mean", "lower", "positions")]
        missing = [name for name in names if name not in tensors]
        if len(missing) == len(names):
            continue
        if missing:
            raise UserError(f"{path} is incomplete: {missing[0]} is missing")
        mean = tensors[f"{key}.mean"]
        lower = mean.new_zeros(len(mean), len(mean))
        lower[tuple(torch.tril_indices(*lower.shape))] = tensors[f"{key}.lower"].float()
        _attach(model, module, Compensation(mean, lower, tensors[f"{key}.positions"]))
