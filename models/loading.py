"""Loading weights, of this project or from elsewhere, into a backbone."""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from timm.models import eva, swin_transformer, swin_transformer_v2, vision_transformer
from torch import Tensor, nn

from utils import UserError, say

from .backbone import Backbone
from .layouts import BUFFERS, NOT_TAKEN, from_transformers, say_not_taken

HEADS = ("head.weight", "head.fc.weight")  # of a vision transformer, of a Swin
FIRST = "patch_embed.proj.weight"  # every supported model has it
RESAMPLED = ("pos_embed", FIRST, "relative_position_bias_table")  # where sizes of image, patch or window differ
# timm's functions that bring weights of other layouts and sizes to a model.
FILTERS = {
    vision_transformer.VisionTransformer: partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True),
    eva.Eva: eva.checkpoint_filter_fn,
    swin_transformer.SwinTransformer: swin_transformer.checkpoint_filter_fn,
    swin_transformer_v2.SwinTransformerV2: swin_transformer_v2.checkpoint_filter_fn,
}


def prepared(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float32 at least, under timm's names where they are in a layout of Hugging Face transformers.

    The prefix that all names share ("model.", "backbone.") is taken off.
    """
    weights = {key: value.float() if _is_short(value) else value for key, value in weights.items()}
    if "class_embedding" in weights or f"trunk.{FIRST}" in weights:  # the vision tower of a CLIP alone
        weights = {f"visual.{key}": value for key, value in weights.items()}
    first = next((key for key in weights if key == FIRST or key.endswith(f".{FIRST}")), None)
    if first is None:
        return from_transformers(weights)
    prefix = first.removesuffix(FIRST)
    if all(key.startswith(prefix) for key in weights):
        return {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _is_short(value: Tensor) -> bool:
    return value.is_floating_point() and value.itemsize < 4


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], source: str, assign: bool = False, convert: bool = False
) -> None:
    """Strict load; `assign` takes the tensors themselves, for a model on the meta device.

    convert: where the weights do not fit, what a model of timm has no part for is left out (see NOT_TAKEN), and timm's
    function for weights of other layouts is tried, which also resamples position embeddings (and patch embeddings, and
    position biases) of another size. A line says each.
    Raises UserError that names the first key that differs, with both shapes, or a tensor that is not finite.
    """
    difference, left_out = _difference(model, weights), []
    if difference and convert:
        weights, left_out = _converted(model, weights, source)
        difference = _difference(model, weights)
    if difference:
        raise UserError(f"{source} is of another architecture: {difference}")
    for key, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{source}: {key} holds {'NaN' if value.isnan().any() else 'infinity'}")
    model.load_state_dict(weights, assign=assign)
    say_not_taken(left_out, source)


def _difference(model: nn.Module, weights: dict[str, Tensor]) -> str | None:
    """The first key that differs between a model and weights, with both shapes."""
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    for key in [*own, *(key for key in given if key not in own)]:
        if own.get(key) != given.get(key):
            return f"{key} is {given.get(key, 'absent')} there, {own.get(key, 'absent')} in the model"
    return None


@torch.no_grad()
def _converted(model: nn.Module, weights: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights as timm would load them into the model, and the names of those that are not taken.

    Where timm cannot convert them: the weights as they are.
    """
    own, is_tower = model.state_dict().keys(), any(key.startswith("visual.") for key in weights)
    foreign = [key for key in weights if key not in own]
    left_out = [key for key in foreign if NOT_TAKEN.fullmatch(key) or (is_tower and not key.startswith("visual."))]
    computed = {key for key in foreign if BUFFERS.fullmatch(key)}
    taken = {key: value for key, value in weights.items() if key not in {*left_out, *computed}}
    # Without a bias is what a bias of zeros gives: DINOv3's are, and timm has models without them.
    zeros = {key for key in taken if key not in own and key.endswith(("q_bias", "v_bias")) and not taken[key].any()}
    taken = {key: value for key, value in taken.items() if key not in zeros}
    if not _difference(model, taken):
        return taken, left_out
    convert = next(function for kind, function in FILTERS.items() if isinstance(model, kind))
    by_its_mask = {key: weights[key] for key in left_out if key == "mask_token"}  # timm knows a DINOv2 by it
    try:
        with contextlib.redirect_stdout(None):  # timm prints a line for each bias that the model does not have
            found = convert(taken | by_its_mask, model)
        found = {key: value for key, value in found.items() if key not in by_its_mask} | _lost(model, weights, found)
    except Exception:  # many types, for weights of another architecture
        return weights, []
    if not _difference(model, found):
        _say_resampled(taken, found, source)
    return found, left_out


def _lost(model: nn.Module, weights: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What timm's function for DINOv3 drops although it changes the output: biases, and other periods than timm's."""
    lost: dict[str, Tensor] = {}
    if "storage_tokens" not in weights:
        return lost
    for key, value in weights.items():
        if key.endswith("attn.qkv.bias") and key not in found:
            q, k, v = value.chunk(3)
            has_bias, is_masked = key.replace("qkv.bias", "q_bias") in found, f"{key}_mask" in weights
            if (not has_bias and (q.any() or v.any())) or (not is_masked and k.any()):
                lost[key] = value
    periods = weights.get("rope_embed.periods")
    if periods is not None and not torch.allclose(periods, model.rope.periods, rtol=0.02):  # bfloat16's are rounded
        lost["rope_embed.periods"] = periods
    return lost


def _say_resampled(weights: dict[str, Tensor], found: dict[str, Tensor], source: str) -> None:
    """Says which tensors were resampled: they are new ones, all others are parts of those in the file."""
    given = {value.untyped_storage().data_ptr() for value in weights.values()}
    resampled = [
        key for key in found if key.endswith(RESAMPLED) and found[key].untyped_storage().data_ptr() not in given
    ]
    if resampled:
        old = {key: f" {tuple(weights[key].shape)}" if key in weights else "" for key in resampled}
        shapes = [f"{key}{old[key]} -> {tuple(found[key].shape)}" for key in resampled[:2]]
        more = f", and {len(resampled) - 2} more" if len(resampled) > 2 else ""
        say(f"{source}: resampled to the size of the model, as timm does: {', '.join(shapes)}{more}")


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
