"""What a sub-network is to keep of the whole network, and the costs whose gradients say how much each token matters.

B images, N tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from utils import UserError, mixed_seed

from .backbone import Backbone

# Target -> its shape in words.
TARGETS = {"logits": "(batch, classes)", "features": "(batch, dim)", "tokens": "(batch, tokens, dim)"}


def default_target(model: Backbone) -> str:
    """The target of a model that says none: "logits" where it has a head, else "tokens"."""
    return "logits" if model.num_classes else "tokens"


def check_target(model: Backbone, target: str) -> None:
    """Raises UserError for a target that the model does not have."""
    if target not in TARGETS:
        raise UserError(f"target {target!r} is not known: {', '.join(TARGETS)}")
    if target == "logits" and not model.num_classes:
        raise UserError("the model has no classifier head, so it has no logits: give the target features or tokens")


def output_of(model: Backbone, images: Tensor, target: str) -> Tensor:
    """The target of images (B, C, height, width).

    "logits": (B, classes).  "features": (B, D), what the head would get, pooled.  "tokens": (B, N, D), all tokens after
    the last norm.
    """
    return model(images) if target == "logits" else from_tokens(model, model.forward_features(images), target)


def from_tokens(model: Backbone, tokens: Tensor, target: str) -> Tensor:
    """The target of the tokens after the last norm, (B, N, D), of a Swin (B, H, W, D)."""
    return tokens.flatten(1, -2) if target == "tokens" else model.forward_head(tokens, pre_logits=target == "features")


def outputs_of(model: Backbone, images: Tensor, target: str) -> dict[str, Tensor]:
    """The target of images by its name; of the target "tokens" also the features, which are pooled from them."""
    if target != "tokens":
        return {target: output_of(model, images, target)}
    tokens = model.forward_features(images)
    return {name: from_tokens(model, tokens, name) for name in ("tokens", "features")}


# ---------------------------------------------------------------------------------------------------------------------
# Costs


def _sampled_class(logits: Tensor, keys: Sequence[int]) -> Tensor:
    """One class per image, (B,), drawn from the prediction of the model."""
    levels = torch.stack([torch.rand((), generator=_generator(key), dtype=torch.float64) for key in keys])
    cumulative = logits.detach().double().softmax(1).cumsum(1)
    drawn = torch.searchsorted(cumulative, levels.to(logits.device)[:, None])[:, 0]
    return drawn.clamp(max=logits.shape[1] - 1)  # rounding may leave the last sum below 1


def _signs(output: Tensor, keys: Sequence[int]) -> Tensor:
    """+1 or -1 for each value of the output, drawn for each image on its own."""
    drawn = [torch.randint(0, 2, output.shape[1:], generator=_generator(key), dtype=torch.int8) for key in keys]
    return torch.stack(drawn).to(output) * 2 - 1


def _generator(key: int) -> torch.Generator:
    return torch.Generator().manual_seed(mixed_seed(key))


# Name -> cost C of the target (B, ...), the labels (B,) and a key for each image, from which random numbers are drawn.
# C is summed over the batch.
COSTS: dict[str, Callable[[Tensor, Tensor, Sequence[int]], Tensor]] = {
    "logit": lambda logits, labels, _: logits.gather(1, labels[:, None]).sum(),
    "ce": lambda logits, labels, _: F.cross_entropy(logits, labels, reduction="sum"),
    "pred": lambda logits, *_: logits.amax(dim=1).sum(),
    "fisher": lambda logits, _, keys: F.cross_entropy(logits, _sampled_class(logits, keys), reduction="sum"),
    "signs": lambda output, _, keys: (output * _signs(output, keys)).sum(),
}
LABELLED = ("logit", "ce")  # the costs that use labels


def default_cost(target: str) -> str:
    """The cost of a target that needs no labels."""
    return "fisher" if target == "logits" else "signs"


def check_cost(cost: str, target: str) -> None:
    """Raises UserError for a cost that the target does not have."""
    if (cost == "signs") == (target == "logits"):
        fitting = "logit, ce, pred or fisher" if target == "logits" else "signs"
        raise UserError(f"the cost {cost} is not for the target {target}: give {fitting}")
