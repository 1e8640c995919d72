"""Making up for what is cut: the last layer of a module guesses the inputs it lost from those it kept.

A module ends in a linear layer, `proj` or `fc2`, whose inputs x are what is cut. With mean mu and covariance S of x on
the proxy set, the best linear guess of the rest r from the first k is mu_r + S_rk S_kk^-1 (x_k - mu_k), and the layer

    W_k = W_:k + W_r S_rk S_kk^-1        b_k = b + W mu - W_k mu_k

takes it in: nothing is added to the model. With S = L L^T, S_rk S_kk^-1 = L_rk L_kk^-1: one factor serves every size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from files import atomic_file, load_checkpoint
from models.backbone import Backbone, Module, blocks_of, last_layer, modules_of
from utils import UserError, checksum, reduce_sum

COMPENSATION = "compensation.safetensors"
DAMPING = 1e-2  # share of the mean variance added to S; studies/contraction.py chooses it on held-out images
EVEN = 0.5  # share of a token's weight that all tokens have alike; the rest follows the gradient at the token
ROUNDING = 8  # times the machine epsilon: how far products may be off, as a share of the norm of what they add up to
BLOCK = 128  # columns multiplied at once: S is symmetric, so about half of it is left out


@dataclass
class OutputMoments:
    """What is known of a module's last layer.

    mean (n,), covariance (n, n): of its inputs, in the order in which they are kept.  metric (D, D): G, the second
    moment of the cost's gradient at its output.  positions (N,): how much the gradient's energy lies at each token, 1
    on average.  rounding: how far the covariance may be off, in norm.
    """

    mean: Tensor
    covariance: Tensor
    metric: Tensor
    positions: Tensor
    rounding: float = 0.0

    def damped(self, damping: float = DAMPING) -> Tensor:
        """S with `damping` of the mean variance added to each input's; positive definite, whatever the inputs.

        What is added is never less than what rounding may have taken away.
        """
        mean = self.covariance.diagonal().mean()
        floor = (damping * mean).clamp(min=self.rounding) if mean > 0 else torch.ones_like(mean)
        return self.covariance + floor * torch.eye(len(self.mean), dtype=mean.dtype, device=mean.device)

    def moved(self, transform: Tensor) -> OutputMoments:
        """The moments of transform @ x."""
        return replace(self, mean=transform @ self.mean, covariance=transform @ self.covariance @ transform.mT)

    def ordered(self, order: Tensor) -> OutputMoments:
        """The moments of x[order]."""
        return replace(self, mean=self.mean[order], covariance=self.covariance[order][:, order])


class OutputCollector:
    """Streams the moments of a module's last layer; it reads (x (B, N, n), g (B, N, D)), see models.taylor.

    A batch's products are taken in the model's own type and added up in float64: float32 halves the time, and what it
    rounds off is far below any damping (see OutputMoments.damped).
    Within an image a token's weight is EVEN, and the rest by its share of the gradient's energy |g|^2: a guess has to
    be good where the loss looks. An image's tokens weigh 1 on average, so nothing depends on batches or ranks.
    """

    def __init__(self, module: Module, device: torch.device):
        n = module.heads * module.width

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.second, self.first, self.tokens = zeros(n, n), zeros(n), zeros()
        self.metric = zeros(module.dim, module.dim)
        self.epsilon = 0.0  # of the type in which products are taken
        self.positions: Tensor | None = None  # as long as a sequence is, which the first batch says

    @torch.no_grad()
    def update(self, x: Tensor, g: Tensor) -> None:
        """x: (B, N, n), g: (B, N, D)."""
        self.epsilon = torch.finfo(x.dtype).eps
        energy = g.double().square().sum(-1)  # (B, N)
        share = energy / energy.mean(1, keepdim=True)
        weight = EVEN + (1 - EVEN) * torch.where(share.isfinite(), share, 1.0)
        self.positions = energy.sum(0) + (0 if self.positions is None else self.positions)
        self.tokens += energy.numel()
        rows, weighted = x.flatten(0, 1), (x * weight[..., None].to(x.dtype)).flatten(0, 1)  # (B N, n)
        for start in range(0, len(self.first), BLOCK):
            columns = slice(start, start + BLOCK)
            self.second[columns, start:] += weighted[:, columns].mT @ rows[:, start:]
        self.first += weighted.sum(0, dtype=torch.float64)
        g = g.flatten(0, 1)
        self.metric += g.mT @ g

    def finalize(self) -> OutputMoments:
        """The moments of all ranks' tokens together."""
        reduce_sum(self.second, self.first, self.tokens, self.metric, self.positions)
        mean = self.first / self.tokens
        upper = self.second.triu() / self.tokens
        second = upper + upper.triu(1).mT
        rounding = ROUNDING * self.epsilon * second.norm().item()
        total = self.positions.mean()
        positions = self.positions / total if total > 0 else torch.ones_like(self.positions)
        covariance = second - torch.outer(mean, mean)
        return OutputMoments(mean, covariance, self.metric / self.tokens, positions, rounding)


class Compensation(nn.Module):
    """Mean (n,) and Cholesky factor L (n, n) of the inputs of a last layer, in the order in which they are kept.

    positions (N,): see OutputMoments. Its tensors move with the model and are not in its state dict.
    """

    def __init__(self, mean: Tensor, lower: Tensor, positions: Tensor):
        super().__init__()
        for name, value in (("mean", mean), ("lower", lower), ("positions", positions)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Weight (D, n), its columns in the order in which they are kept, and bias (D,) -> (D, k) and (D,).

        In float64 inside, in the weight's own type outside; the whole layer comes back as it is.
        """
        if k == weight.shape[1]:
            return weight, bias
        W, mean, lower = weight.double(), self.mean.double(), self.lower.double()
        guess = torch.linalg.solve_triangular(lower[:k, :k], W[:, k:] @ lower[k:, :k], upper=False, left=False)
        kept = W[:, :k] + guess
        return kept.to(weight.dtype), (bias.double() + W @ mean - kept @ mean[:k]).to(bias.dtype)


def compensate(model: Backbone, moments: dict[str, OutputMoments], damping: float = DAMPING) -> list[str]:
    """Gives each module of the model its Compensation, from moments in the order in which its dims are kept.

    From then on its slices, in training and in extraction, are compensated ones. A module for which that would be
    worse on the proxy set than to cut alone goes without; their keys are returned.
    """
    refused = []
    for key, module in modules_of(model).items():
        moment = moments[key]
        lower = torch.linalg.cholesky(moment.damped(damping).cpu())
        found = Compensation(moment.mean.cpu(), lower, moment.positions.cpu())
        weight, bias = ordered_layer(model, module)
        n = weight.shape[1]
        errors = [_errors(weight, bias, moment, found, k) for k in (n // 4, n // 2)]
        if not all(compensated <= cut for compensated, cut in errors):  # nor where either is no number
            refused.append(key)
            found = None
        _attach(model, module, found)
    return refused


def ordered_layer(model: Backbone, module: Module) -> tuple[Tensor, Tensor]:
    """Weight (D, n) and bias (D,) of a module's last layer, in float64, inputs in the order in which they are kept.

    Of an attention that is dim 0 of all heads, dim 1 of all heads, ...
    """
    layer = last_layer(blocks_of(model)[module.block], module.kind)
    if layer.bias is None:
        raise UserError(f"{module.key}: its last layer has no bias, which compensation needs")
    weight = layer.weight.detach().double().unflatten(1, (module.heads, module.width))
    return weight.transpose(1, 2).flatten(1), layer.bias.detach().double()


def _errors(weight: Tensor, bias: Tensor, moment: OutputMoments, found: Compensation, k: int) -> tuple[float, float]:
    """The error of a layer cut to k inputs, compensated and not, in the metric of the loss, on the proxy set."""
    errors = []
    for cut_weight, cut_bias in (found.to(weight.device)(weight, bias, k), (weight[:, :k], bias)):
        lost = weight.clone()
        lost[:, :k] -= cut_weight
        constant = lost @ moment.mean + bias - cut_bias
        square = lost @ moment.covariance @ lost.mT + torch.outer(constant, constant)
        errors.append((moment.metric * square).sum().item())
    return errors[0], errors[1]


def _attach(model: Backbone, module: Module, found: Compensation | None) -> None:
    branch = getattr(blocks_of(model)[module.block], module.kind)
    branch.compensation = found


# ---------------------------------------------------------------------------------------------------------------------
# compensation.safetensors: factors in float16, triangles packed, beside the weights that it is for


def save_compensation(path: Path, model: Backbone) -> int:
    """Writes what compensate() gave the model; whole or absent. Returns the size in bytes."""
    tensors = {"weights": torch.tensor(checksum(p.cpu() for p in model.parameters()))}
    for key, module in modules_of(model).items():
        found = getattr(blocks_of(model)[module.block], module.kind).compensation
        if found is not None:
            n = len(found.mean)
            tensors |= {f"{key}.mean": found.mean.float(), f"{key}.positions": found.positions.float()}
            tensors[f"{key}.lower"] = found.lower.to(_stored_type(found.lower))[tuple(torch.tril_indices(n, n))]
    with atomic_file(path) as temporary:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary)
    return path.stat().st_size


def _stored_type(lower: Tensor) -> torch.dtype:
    """float16, which is harmless (docs/RESULTS.md), but float32 where the factor does not lie well in its range."""
    fits = lower.diagonal().min() > 1e-3 and lower.abs().max() < 6e4
    return torch.float16 if fits else torch.float32


def load_compensation(path: Path, model: Backbone) -> None:
    """Reads the file into the model, in place. Raises UserError for one of other weights or of another model."""
    tensors = load_checkpoint(path)
    stamp = tensors.pop("weights", None)
    modules = modules_of(model)
    for name, value in tensors.items():
        key, _, part = name.rpartition(".")
        n = modules[key].heads * modules[key].width if key in modules else 0
        positions = modules[key].keys if n and modules[key].kind == "attn" else modules[key].tokens if n else 0
        length = {"mean": n, "lower": n * (n + 1) // 2, "positions": positions}.get(part, -1)
        if n == 0 or value.shape != (length,) or value.dtype not in (torch.float16, torch.float32):
            kind = f"shape {tuple(value.shape)} and type {value.dtype}"
            raise UserError(f"{path} is not a compensation of this model: {name} has {kind}")
    if stamp is None or stamp.numel() != 1 or stamp.item() != checksum(model.parameters()):
        raise UserError(f"{path} was made for other weights; make it again with reparam.py, or give --no-compensate")
    for key, module in modules.items():
        found = [f"{key}.{part}" for part in ("mean", "lower", "positions")]
        missing = [name for name in found if name not in tensors]
        if len(missing) == len(found):
            continue
        if missing:
            raise UserError(f"{path} is not whole: {missing[0]} is missing")
        mean = tensors[f"{key}.mean"]
        lower = mean.new_zeros(len(mean), len(mean))
        lower[tuple(torch.tril_indices(*lower.shape))] = tensors[f"{key}.lower"].float()
        _attach(model, module, Compensation(mean, lower, tensors[f"{key}.positions"]))


def compensate_from(checkpoint: Path, model: Backbone, wanted: bool | None = None) -> str:
    """Gives the model, of this checkpoint, the compensation that lies beside it; None: if there is one.

    Returns the grade of what is cut from it: "cut" or "compensated". Raises UserError where one is wanted and is not
    there, or is of other weights.
    """
    path = Path(checkpoint).parent / COMPENSATION
    if wanted is False or (wanted is None and not path.exists()):
        return "cut"
    if not path.exists():
        raise UserError(f"--compensate: {path} does not exist; reparam.py --method best writes it")
    load_compensation(path, model)
    return "compensated"
