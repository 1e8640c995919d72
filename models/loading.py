"""Loading weights into a backbone."""

from __future__ import annotations

from torch import Tensor, nn

from utils import UserError, say

from .backbone import Backbone

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


def head_size(weights: dict[str, Tensor]) -> dict[str, int]:
    """{"num_classes": classes of the head in the weights}, or {} where they have none."""
    head = next((weights[key] for key in HEADS if key in weights), None)
    return {} if head is None else {"num_classes": len(head)}


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
