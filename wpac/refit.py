"""Refitting: fits the layers or blocks of a sub-network to the whole network, one after another, without labels.

B images, N tokens, D embedding, n inputs of the last layer of a branch. A Swin arranges its N tokens as (H, W).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone, blocks_of, full_widths
from models.parts import Part, apply_part
from models.targets import default_target, from_tokens
from utils import UserError, gather_over_ranks, progress_bar, reduce_sum, say

from .branches import Branch, Replaced, in_order, replaced_by, spread, tokens_of
from .descent import descend, weights_of_tokens
from .least_squares import Moments
from .streams import Batch, streams_of


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


@torch.no_grad()
def refit(
    model: Backbone, small: Backbone, images: Iterable[Tensor], target: str | None = None, steps: int = 0, seed: int = 0
) -> Refit:
    """Refits every branch of `small` to the whole network, in place and in forward order.

    model: the whole network that `small` was cut from.  images: batches (B, C, height, width), read once.  target: see
    models.targets (default: that of default_target()).  steps: of gradient descent, which each block is trained for
    after its linear layers were solved by damped least squares (see wpac.descent), on images that `seed` decides.
    By least squares, each layer is fitted on the inputs that it receives after the layers before it have been refitted.
    The targets of the first layers of a branch (such as qkv, fc1) are the outputs of those layers for the whole
    network's residual stream. The targets of the last layer (proj, fc2) are that stream after the branch, so that
    errors of earlier layers are corrected, too. One image in HELD_OUT is not fitted: a layer whose fit does not lower
    the error on those images keeps what it had. By gradient descent, the target of a block is that stream after it.
    Either way the sub-network stays as it was if its output is not nearer to the whole network's on those images.
    The residual streams of all images are kept in memory, once for each of the two networks, and at most one more.
    Raises UserError where there are fewer than two different images, or with steps a process without any to fit.
    """
    if full_widths(small) == full_widths(model):  # nothing was cut
        return Refit(0.0, 0.0, 0.0)
    device, target = next(small.parameters()).device, target or default_target(model)
    training, model, small = (model.training, small.training), model.to(device).eval(), small.eval()
    whole_parts, cut_parts, batches = streams_of(model, small, images, device)
    held_out = [batch for batch in batches if batch.held_out]
    if steps and min(count for (count,) in gather_over_ranks([float(len(batches) - len(held_out))])) == 0:
        raise UserError("refitting by steps needs two images or more per process: give more images")
    before = [_run(cut_parts, small, batch.cut, target) for batch in held_out]
    replaced: Replaced = []
    cut_runs = {key: run for key, run in cut_parts if key}
    blocks = [(index, list(parts)) for index, parts in itertools.groupby(whole_parts, _block_of)]
    for index, parts in progress_bar(blocks, "refit"):
        if index is None:  # a Swin merges patches
            for batch in batches:
                batch.whole, batch.cut = parts[0][1](batch.whole), parts[0][1](batch.cut)
            continue
        inputs = [batch.cut for batch in batches]
        for key, run in parts:
            if key in cut_runs:
                whole, cut = Branch(model, key, run), Branch(small, key, cut_runs[key])
                replaced += _refit_branch(whole, cut, batches, keep=not steps)
            else:
                for batch in batches:
                    batch.whole = batch.whole + run(batch.whole)
        runs = [part for part in cut_parts if _block_of(part) == index]
        if steps and runs:
            for batch, x in zip(batches, inputs, strict=True):
                batch.cut = x
            weights = weights_of_tokens(model, parts[-1], batches[0].whole, target)
            replaced += descend(blocks_of(small)[index], runs, batches, weights, steps, seed, index)
    expected = [from_tokens(model, model.norm(batch.whole), target) for batch in held_out]
    after = [from_tokens(small, small.norm(batch.cut), target) for batch in held_out]
    distances = [[_distance(target, *pair) for pair in zip(expected, found, strict=True)] for found in (before, after)]
    result = _compared(*(torch.cat([torch.zeros(0, dtype=torch.float64, device=device), *part]) for part in distances))
    if not result.helped:
        for module, name, parameter in reversed(replaced):
            setattr(module, name, parameter)
        say(f"refitting did not help on held-out images ({result.before:.3g} -> {result.after:.3g}): left as it was")
    model.train(training[0])
    small.train(training[1])
    return result


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


def refit_grade(steps: int) -> str:
    """The grade of a sub-network that was refitted."""
    return f"refitted, {steps} steps per block" if steps else "refitted"


def _block_of(part: Part) -> int | None:
    """The block of a part of parts_of(); None for a Swin's merging of patches."""
    return None if part[0] is None else int(part[0].split(".")[0])


# ---------------------------------------------------------------------------------------------------------------------
# A branch, by least squares


def _refit_branch(whole: Branch, cut: Branch, batches: list[Batch], keep: bool) -> Replaced:
    """Refits a branch, and moves both streams past it. Returns the parameters that were replaced.

    keep: whether the inputs of the last layer may be kept in memory, so that the branch need not run again.
    """
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
        if keep and x.shape[-1] <= dim:  # no more memory than a residual stream
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
    return [replaced_by(module, name, value) for (module, name), value in new.items()]


def _fold_last(branch: Branch, moments: Moments, metric: Tensor) -> Replaced:
    """Adds the fitted map from the layer's inputs to what its outputs lack."""
    moments.finalize()
    layer = branch.last
    found = moments.fit(metric, layer.bias is not None)
    if found is None:
        return []
    solution, offset = (value.to(layer.weight.device) for value in found)
    replaced = [replaced_by(layer, "weight", layer.weight.double() + solution.mT)]
    if layer.bias is not None:
        replaced.append(replaced_by(layer, "bias", layer.bias.double() + offset))
    return replaced
