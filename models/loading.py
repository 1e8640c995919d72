"""Weights into a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from files import load_checkpoint, weights_of
from utils import UserError, say

from .backbone import Backbone, create_backbone

HEADS = ("head.weight", "head.fc.weight")  # of a vision transformer, of a Swin


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str, assign: bool = False) -> None:
    """Strict load; `assign` takes the tensors themselves, for a model on the meta device.

    Raises UserError that names the first key that differs, with both shapes.
    """
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    for key in [*own, *(key for key in given if key not in own)]:
        if own.get(key) != given.get(key):
            there, here = given.get(key, "absent"), own.get(key, "absent")
            raise UserError(f"{source} is of another architecture: {key} is {there} there, {here} in the model")
    model.load_state_dict(weights, assign=assign)


def load_backbone(
    name: str,
    model_kwargs: dict[str, Any],
    *,
    num_classes: int,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    use_ema: bool = False,
) -> Backbone:
    """A backbone with the head of its weights: of the checkpoint, of timm's pretrained ones, else new weights.

    num_classes counts only where no weights say otherwise. Raises UserError for weights of another architecture.
    """
    if checkpoint is None:
        classes = {} if pretrained else {"num_classes": num_classes}
        return create_backbone(name, pretrained=pretrained, **classes | model_kwargs)
    weights = weights_of(load_checkpoint(checkpoint), checkpoint, use_ema)
    head = next((weights[key] for key in HEADS if key in weights), None)
    classes = {"num_classes": num_classes if head is None else len(head)}
    model = create_backbone(name, **classes | model_kwargs)
    load_weights(model, weights, f"checkpoint {checkpoint}")
    return model


def fit_head(model: Backbone, num_classes: int, *, remake: bool) -> None:
    """Makes the head one of num_classes: a new one if `remake`, else a UserError where it differs."""
    if model.num_classes == num_classes:
        return
    if not remake:
        raise UserError(
            f"the model has {model.num_classes} classes, the data has {num_classes}: give the data it is for"
        )
    say(f"new head: {model.num_classes} classes in the weights, {num_classes} in the data")
    model.reset_classifier(num_classes)
