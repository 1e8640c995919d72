"""Refitting by gradient descent: the blocks of a sub-network learn, one after another, what the whole network's give.

It sees through the activations, where least squares cannot: all weights of a block move together. B images, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.parts import Part, apply_part
from utils import mixed_seed, reduce_sum, world

from .branches import Branch, Replaced, replaced_by, tokens_of
from .streams import Batch

# studies/encoders.py measures them.
IMAGES = 8  # per step and process
RATE, WARMUP = 4e-4, 0.1  # the highest learning rate of Adam, and the share of the steps until it is reached
BETAS = (0.9, 0.99)
CLASS_SHARE = 0.05  # of the loss, for the class token, where all tokens are the target: it is one of hundreds


def weights_of_tokens(model: Backbone, part: Part, x: Tensor, target: str) -> Tensor:
    """Weights (N,) of the tokens of the stream x: all alike where they are the target, else as in the statistics.

    part: the last part of the block.
    """
    if target != "tokens":
        branch = Branch(model, *part)
        return branch.token_weights(branch.order(x))
    weights = torch.ones(tokens_of(x).shape[1], dtype=torch.float64)
    if getattr(model, "cls_token", None) is not None:
        weights[0] += CLASS_SHARE * len(weights)
    return weights


def descend(
    block: nn.Module, parts: list[Part], batches: list[Batch], weights: Tensor, steps: int, *key: int
) -> Replaced:
    """Trains a block of the cut network, and moves its stream past it. Returns the parameters that were replaced.

    With several processes, each step takes IMAGES images of every process and the mean of their gradients: all of them
    end with the same weights, bit for bit. These are not those of one process with all the images, which takes other
    images in other steps; what holds for both is that the error of the block falls.

    Args:
        block: The block.
        parts: What it consists of.
        batches: The whole network's stream after the block, and the cut one's before it.
        weights: (N,), of the tokens.
        steps: Of Adam, each on IMAGES images per process.
        key: Numbers that decide, with the rank, which images a step takes.
    """

    def run(x: Tensor) -> Tensor:
        for part in parts:
            x = apply_part(x, part)
        return x

    replaced: Replaced = []
    for module in block.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            replaced.append(replaced_by(module, name, parameter.detach().clone()))
    _train([*block.parameters()], run, [b for b in batches if not b.held_out], weights, steps, *key)
    for batch in batches:
        batch.cut = run(batch.cut)
    return replaced


def _train(
    parameters: list[nn.Parameter],
    run: Callable[[Tensor], Tensor],
    batches: list[Batch],
    weights: Tensor,
    steps: int,
    *key: int,
) -> None:
    """Trains the parameters of a block, in place, so that run(batch.cut) becomes batch.whole.

    The loss is the weighted squared error, relative to what it was at the start.
    """
    weights = weights.to(batches[0].cut)[:, None]
    places = [(batch, row) for batch in batches for row in range(len(batch.cut))]
    rank, ranks = world()
    generator = torch.Generator().manual_seed(mixed_seed(*key, rank))

    def loss_of(x: Tensor, target: Tensor) -> Tensor:
        return (tokens_of(run(x) - target).square() * weights).mean()

    total = torch.stack([loss_of(batch.cut, batch.whole) for batch in batches]).double().mean()
    reduce_sum(total)
    if not total > 0:
        return
    optimizer = torch.optim.Adam(parameters, lr=RATE, betas=BETAS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=WARMUP)
    for _ in range(steps):
        chosen = [places[place] for place in torch.randperm(len(places), generator=generator)[:IMAGES].tolist()]
        x = torch.stack([batch.cut[row] for batch, row in chosen])
        target = torch.stack([batch.whole[row] for batch, row in chosen])
        with torch.enable_grad():
            loss = loss_of(x, target) * (ranks / total.item())
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                reduce_sum(gradient)
                parameter.grad = gradient / ranks
        optimizer.step()
        schedule.step()
    for parameter in parameters:
        parameter.grad = None
