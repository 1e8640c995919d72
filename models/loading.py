"""Loading weights, of this project or from elsewhere, into a backbone."""

from __future__ import annotations

from functools import partial

import torch
from timm.models import eva, swin_transformer, swin_transformer_v2, vision_transformer
from torch import Tensor, nn

from utils import UserError, say

from .backbone import Backbone

HEADS = ("head.weight", "head.fc.weight")  # of a vision transformer, of a Swin
FIRST = "patch_embed.proj.weight"  # every supported model has it
# timm's functions that bring weights of other layouts and sizes to a model.
FILTERS = {
    vision_transformer.VisionTransformer: partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True),
    eva.Eva: eva.checkpoint_filter_fn,
    swin_transformer.SwinTransformer: swin_transformer.checkpoint_filter_fn,
    swin_transformer_v2.SwinTransformerV2: swin_transformer_v2.checkpoint_filter_fn,
}


def prepared(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the prefix that all their names share ("model.", "backbone."), in float32 at least."""
    first = next((key for key in weights if key == FIRST or key.endswith(f".{FIRST}")), FIRST)
    prefix = first.removesuffix(FIRST)
    if all(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return {key: value.float() if _is_short(value) else value for key, value in weights.items()}


def _is_short(value: Tensor) -> bool:
    return value.is_floating_point() and value.itemsize < 4


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], source: str, assign: bool = False, convert: bool = False
) -> None:
    """Strict load; `assign` takes the tensors themselves, for a model on the meta device.

    convert: where the weights do not fit, timm's function for weights of other layouts is tried, which also resamples
    position embeddings (and patch embeddings, and position biases) of another size. A line says so.
    Raises UserError that names the first key that differs, with both shapes, or a tensor that is not finite.
    """
    difference = _difference(model, weights)
    if difference and convert:
        weights = _converted(model, weights, source)
        difference = _difference(model, weights)
    if difference:
        raise UserError(f"{source} is of another architecture: {difference}")
    for key, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{source}: {key} holds {'NaN' if value.isnan().any() else 'infinity'}")
    model.load_state_dict(weights, assign=assign)


def _difference(model: nn.Module, weights: dict[str, Tensor]) -> str | None:
    """The first key that differs between a model and weights, with both shapes."""
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    for key in [*own, *(key for key in given if key not in own)]:
        if own.get(key) != given.get(key):
            return f"{key} is {given.get(key, 'absent')} there, {own.get(key, 'absent')} in the model"
    return None


@torch.no_grad()
def _converted(model: nn.Module, weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights as timm would load them into the model, or as they are where timm cannot convert them."""
    convert = next(function for kind, function in FILTERS.items() if isinstance(model, kind))
    try:
        found = convert(weights, model)
    except Exception:  # many types, for weights of another architecture
        return weights
    resampled = [key for key, value in found.items() if key in weights and value.shape != weights[key].shape]
    if resampled and not _difference(model, found):
        shapes = [f"{key} {tuple(weights[key].shape)} -> {tuple(found[key].shape)}" for key in resampled[:2]]
        more = f", and {len(resampled) - 2} more" if len(resampled) > 2 else ""
        say(f"{source}: resampled to the size of the model, as timm does: {', '.join(shapes)}{more}")
    return found


def head_size(weights: dict[str, Tensor]) -> int:
    """The number of classes of the head in the weights; 0 where they have none."""
    return next((len(weights[key]) for key in HEADS if key in weights), 0)


def fit_head(model: Backbone, num_classes: int, *, remake: bool) -> None:
    """Makes the head one of num_classes: a new one if `remake`, else a UserError where it differs."""
    if model.num_classes == num_classes:
        return
    if remake:
        say(f"new head: {model.num_classes or 'no'} classes in the weights, {num_classes} in the data")
        model.reset_classifier(num_classes)
        return
    if model.num_classes == 0:
        raise UserError(
            f"the model has no classifier head, the data has {num_classes} classes: train one with main.py --stage "
            "pretrain"
        )
    raise UserError(f"the model has {model.num_classes} classes, the data has {num_classes}: give the data it is for")
