"""Refitting: fits the linear layers of a sub-network to the whole network, one after another, on unlabelled images.

B images, N tokens, D embedding, n inputs of the last layer of a branch. A Swin arranges its N tokens as (H, W).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone
from models.parts import apply_part, parts_of
from models.targets import default_target, from_tokens
from utils import UserError, checksum, gather_over_ranks, mixed_seed, progress_bar, reduce_sum, say

from .branches import Branch, in_order, spread, tokens_of
from .least_squares import Moments

Replaced = list[tuple[nn.Module, str, nn.Parameter]]  # module, name, and what it was

HELD_OUT = 8  # one image in so many is never fitted: damping is chosen on these, and they say whether a fit helps


@dataclass(frozen=True)
class Refit:
    """What refitting did to the output of a sub-network on the held-out images.

    before, after: mean KL divergence of its logits from those of the whole network, or, for features and tokens, mean
    of 1 - cosine, before refitting and after.  error: standard error of their difference over the images.
    helped: whether it is lower after by more than that; if not, the sub-network is as before.
    """

    before: float
    after: float
    error: float

    @property
    def helped(self) -> bool:
        return self.before - self.after > self.error


@dataclass
class _Batch:
    """The residual streams of the same images in the whole network and in the cut one, (B, N, D) or (B, H, W, D)."""

    whole: Tensor
    cut: Tensor
    held_out: bool


@torch.no_grad()
def refit(model: Backbone, small: Backbone, images: Iterable[Tensor], target: str | None = None) -> Refit:
    """Refits the linear layers of every branch of `small`, in place and in forward order, by damped least squares.

    model: the whole network that `small` was cut from.  images: batches (B, C, height, width), read once.  target: see
    models.targets (default: that of default_target()).
    Each layer is fitted on the inputs that it receives after the layers before it have been refitted. The targets of
    the first layers of a branch (such as qkv, fc1) are the outputs of those layers for the whole network's residual
    stream. The targets of the last layer (proj, fc2) are that stream after the branch, so that errors of earlier
    layers are corrected, too. One image in HELD_OUT is not fitted: a layer whose fit does not lower the error on those
    images keeps what it had, and so does the sub-network if its output is not nearer to the whole network's there.
    The residual streams of all images are kept in memory, once for each of the two networks, and at most as much again.
    Raises UserError where there are fewer than two different images.
    """
    device, target = next(small.parameters()).device, target or default_target(model)
    training, model, small = (model.training, small.training), model.to(device).eval(), small.eval()
    whole_parts, cut_parts, batches = _streams(model, small, images, device)
    held_out = [batch for batch in batches if batch.held_out]
    before = [_run(cut_parts, small, batch.cut, target) for batch in held_out]
    replaced: Replaced = []
    cut_runs = {key: run for key, run in cut_parts if key}
    for key, run in progress_bar(whole_parts, "refit"):
        if key is None:
            for batch in batches:
                batch.whole, batch.cut = run(batch.whole), run(batch.cut)
        elif key in cut_runs:
            replaced += _refit_branch(Branch(model, key, run), Branch(small, key, cut_runs[key]), batches)
        else:
            for batch in batches:
                batch.whole = batch.whole + run(batch.whole)
    expected = [from_tokens(model, model.norm(batch.whole), target) for batch in held_out]
    after = [from_tokens(small, small.norm(batch.cut), target) for batch in held_out]
    distances = [[_distance(target, *pair) for pair in zip(expected, found, strict=True)] for found in (before, after)]
    result = _compared(*(torch.cat([torch.zeros(0, dtype=torch.float64, device=device), *part]) for part in distances))
    if not result.helped:
        for module, name, parameter in replaced:
            setattr(module, name, parameter)
        say(f"refitting did not help on held-out images ({result.before:.3g} -> {result.after:.3g}): left as it was")
    model.train(training[0])
    small.train(training[1])
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Images


def _streams(
    model: Backbone, small: Backbone, images: Iterable[Tensor], device: torch.device
) -> tuple[list, list, list[_Batch]]:
    """The parts of both networks (see models.parts.parts_of) and the first block's inputs, held-out images apart."""
    streams, keys, whole_parts, cut_parts = [], [], [], []
    for batch in images:
        x, parts = parts_of(model, batch.to(device))
        if not streams:
            whole_parts, cut_parts = parts, parts_of(small, batch[:1].to(device))[1]
        streams.append(x)
        keys.append([image_key(image) for image in batch])
    limit = held_out_limit([key for batch in keys for key in batch])
    masks = [torch.tensor([key <= limit for key in batch], device=device) for batch in keys]
    held_out = [x[mask] for x, mask in zip(streams, masks, strict=True)]
    fitted = [x[~mask] for x, mask in zip(streams, masks, strict=True)]
    size = max(map(len, streams))
    batches = [_Batch(x, x, held_out=False) for x in fitted if len(x)]
    batches += [_Batch(x, x, held_out=True) for x in torch.cat(held_out).split(size) if len(x)]
    return whole_parts, cut_parts, batches


def image_key(image: Tensor) -> float:
    """A number that depends on every bit of the image and on nothing else; those of other images are spread evenly."""
    return float(mixed_seed(checksum([image])) >> 11)  # of 52 bits, which float64 holds


def held_out_limit(keys: list[float]) -> float:
    """The largest key of a held-out image. keys: of this rank's images.

    So the choice does not depend on the order of the images, on the batch size or on the number of processes, and the
    same image is never on both sides.
    """
    most = int(max(row[0] for row in gather_over_ranks([float(len(keys))])))
    rows = gather_over_ranks(keys + [math.inf] * (most - len(keys)))
    found = sorted({key for row in rows for key in row} - {math.inf})
    if len(found) < 2:
        raise UserError(f"refitting needs at least two different images, and there are {len(found)}")
    return found[max(1, len(found) // HELD_OUT) - 1]


def _run(parts: list, model: Backbone, x: Tensor, target: str) -> Tensor:
    """The target of the model for the first block's input."""
    for part in parts:
        x = apply_part(x, part)
    return from_tokens(model, model.norm(x), target)


def _distance(target: str, expected: Tensor, found: Tensor) -> Tensor:
    """KL divergence of logits, 1 - cosine of features, mean of 1 - cosine of tokens: (B,), in float64."""
    expected, found = expected.double(), found.double()
    if target == "logits":
        return F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return (1 - F.cosine_similarity(expected, found, -1)).view(len(found), -1).mean(1)


def _compared(before: Tensor, after: Tensor) -> Refit:
    """Compares the distances of this rank's held-out images, together with those of all ranks."""
    change = after - before
    sums = torch.stack([before.sum(), after.sum(), change.square().sum(), change.new_tensor(len(change))])
    reduce_sum(sums)
    first, second, square, _ = (sums / sums[3]).tolist()
    variance = max(square - (second - first) ** 2, 0.0)
    return Refit(first, second, math.sqrt(variance / sums[3].item()))


# ---------------------------------------------------------------------------------------------------------------------
# A branch


def _refit_branch(whole: Branch, cut: Branch, batches: list[_Batch]) -> Replaced:
    """Refits a branch, and moves both streams past it. Returns the parameters that were replaced."""
    dim, device = cut.last.out_features, cut.last.weight.device
    order = cut.order(batches[0].cut)
    weights = whole.token_weights(order)
    first, same = Moments(dim, dim, device), all(batch.cut is batch.whole for batch in batches)
    spreads = []
    for batch in batches:
        if not same:
            x = cut.inputs(batch.cut)
            _add(first, x, whole.inputs(batch.whole) - x, weights, batch.held_out)
        with whole.watched() as seen:
            batch.whole = batch.whole + whole.run(batch.whole)
        if whole.norm_after is not None:
            spreads.append(spread(tokens_of(in_order(seen["y"], order, len(batch.whole))), whole.norm_after))
    replaced = [] if same else _fold_first(cut, first)
    scale = cut.scale()
    inverse = torch.where(scale == 0, 0.0, 1 / scale).to(cut.last.weight.dtype)
    last, kept = Moments(cut.last.in_features, dim, device), []
    for number, batch in enumerate(batches):
        with cut.watched() as seen:
            change = cut.run(batch.cut)
        x, missing = in_order(seen["x"], order, len(batch.cut)), tokens_of(batch.whole - batch.cut)
        if cut.norm_after is None:
            _add(last, x, (missing - tokens_of(change)) * inverse, weights, batch.held_out)
        else:
            mean, deviation = spreads[number]
            y = in_order(seen["y"], order, len(batch.cut))
            target = mean + deviation * (missing - cut.norm_after.bias) * inverse
            residual = torch.where(scale == 0, 0.0, target - y)
            _add(last, x, residual, weights / deviation[..., 0].square(), batch.held_out)
        if x.shape[-1] <= dim:  # no more memory than a residual stream, and the branch need not run again
            kept.append(x)
    replaced += _fold_last(cut, last, scale.square())
    for number, batch in enumerate(batches):
        batch.cut = batch.cut + (cut.finish(kept[number]).view_as(batch.cut) if kept else cut.run(batch.cut))
    return replaced


def _add(moments: Moments, x: Tensor, r: Tensor, weights: Tensor, held_out: bool) -> None:
    """x: (B, N, n).  r: (B, N, m).  weights: (N,) or (B, N)."""
    moments.update(x.flatten(0, 1), r.flatten(0, 1), weights.expand(x.shape[:2]).flatten(), held_out)


def _fold_first(branch: Branch, moments: Moments) -> Replaced:
    """Predicts the whole network's inputs of the first layers from the cut network's, inside the layers.

    The layers are linear, so with x + D^T x + c for x, their weight W becomes W + W D^T and their bias gets W c more.
    Rows without a bias get a prediction without c.
    """
    moments.finalize()
    new: dict[tuple[nn.Module, str], Tensor] = {}
    for constant in (True, False):
        groups = [rows for rows in branch.first() if (rows.module is not None) == constant]
        if not groups:
            continue
        joined = torch.cat([group.layer.weight[group.rows].double() for group in groups])
        found = moments.fit(joined.mT @ joined, constant)
        if found is None:
            continue
        solution, offset = (value.to(joined) for value in found)
        for group, weight in zip(groups, joined.split([len(g.layer.weight[g.rows]) for g in groups]), strict=True):
            value = new.setdefault((group.layer, "weight"), group.layer.weight.double().clone())
            value[group.rows] += weight @ solution.mT
            if constant:
                value = new.setdefault((group.module, group.bias), getattr(group.module, group.bias).double().clone())
                value[group.places] += weight @ offset
    return [_replace(module, name, value) for (module, name), value in new.items()]


def _fold_last(branch: Branch, moments: Moments, metric: Tensor) -> Replaced:
    """Adds the fitted map from the layer's inputs to what its outputs lack."""
    moments.finalize()
    layer = branch.last
    found = moments.fit(metric, layer.bias is not None)
    if found is None:
        return []
    solution, offset = (value.to(layer.weight.device) for value in found)
    replaced = [_replace(layer, "weight", layer.weight.double() + solution.mT)]
    if layer.bias is not None:
        replaced.append(_replace(layer, "bias", layer.bias.double() + offset))
    return replaced


def _replace(module: nn.Module, name: str, value: Tensor) -> tuple[nn.Module, str, nn.Parameter]:
    """Gives the module a new parameter, since the old one may be the whole network's; returns the old one."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype), old.requires_grad))
    return module, name, old
