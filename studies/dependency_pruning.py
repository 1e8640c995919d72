"""Torch-Pruning and Isomorphic Pruning: the package torch-pruning with its recipes for ViTs.

Fang, Ma, Song, Mi, Wang: DepGraph: Towards Any Structural Pruning, CVPR 2023; Fang, Ma, Mi, Wang: Isomorphic Pruning
for Vision Models, ECCV 2024. Both rank by group Taylor importance here. Needs torch-pruning (requirements-studies.txt).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.macs import count_macs
from models.targets import COSTS, output_of
from utils import UserError

STEPS = 256  # of the ratio that is searched


@dataclass(frozen=True)
class Recipe:
    """What is pruned, each at the same ratio.

    bottleneck: only what is inside of the branches; otherwise the embedding as well.  isomorphic: units and dims are
    ranked over all blocks, and so are whole heads, which leave at the ratio, and dims of the heads at half of it; each
    block keeps at least one unit and one head. Otherwise each layer loses the same ratio, and of attention only dims.
    """

    bottleneck: bool = False
    isomorphic: bool = False


def prune(base: VisionTransformer, batches: Iterable[tuple[Tensor, Tensor]], max_macs: float) -> VisionTransformer:
    """Prunes a copy of a classifier by Torch-Pruning's own recipe. Raises UserError where it cannot be as small."""
    batches = list(batches)
    model = prune_within(base, gradients_of(base, batches, "ce", "logits"), batches[0][0][:1], max_macs, Recipe())
    if model is None:
        raise UserError(f"Torch-Pruning cannot prune this network to {max_macs:g} MACs")
    return model


def prune_within(
    base: VisionTransformer, gradients: list[Tensor | None], example: Tensor, max_macs: float, recipe: Recipe
) -> VisionTransformer | None:
    """Prunes a copy at the smallest ratio within max_macs, in steps of 1 / STEPS; None where no ratio is.

    gradients: see gradients_of().  example: an image (1, C, height, width).
    """
    low, high, best = 0, STEPS, None
    while low < high:
        middle = (low + high) // 2
        model = pruned(base, gradients, example, middle / STEPS, recipe)
        if count_macs(model) <= max_macs:
            high, best = middle, model
        else:
            low = middle + 1
    return best


def gradients_of(
    model: VisionTransformer, batches: Iterable[tuple[Tensor, Tensor]], cost: str, target: str
) -> list[Tensor | None]:
    """The gradient of a cost of the output `target`, see models.targets, summed over the batches, of each parameter."""
    model, seen = copy.deepcopy(model).eval(), 0
    for images, labels in batches:
        COSTS[cost](output_of(model, images, target), labels, range(seen, seen + len(images))).backward()
        seen += len(images)
    return [parameter.grad for parameter in model.parameters()]


def pruned(
    base: VisionTransformer, gradients: list[Tensor | None], example: Tensor, ratio: float, recipe: Recipe
) -> VisionTransformer:
    """A copy pruned at a ratio, by the Taylor importance of the gradients."""
    try:
        import torch_pruning
    except ImportError as error:
        raise UserError("torch-pruning is missing: pip install -r requirements-studies.txt") from error
    model = copy.deepcopy(base).eval()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    attentions, importance = [block.attn for block in model.blocks], torch_pruning.importance.GroupTaylorImportance()
    ignored = [model.head, *(layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2))]
    more: dict[str, Any] = {}
    if recipe.isomorphic:
        layers = tuple(attn.qkv for attn in attentions)
        more = {"global_pruning": True, "isomorphic": True, "pruning_ratio_dict": {layers: ratio / 2}}
        heads = sum(attn.num_heads for attn in attentions)
        most = (heads - len(attentions) - 0.5) / heads  # rounded up by the package, this leaves one head for each block
        more |= {"prune_num_heads": True, "head_pruning_ratio": min(ratio, most)}
        importance = keeping_one(importance)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=importance,
        pruning_ratio=ratio,
        ignored_layers=ignored if recipe.bottleneck else ignored[:1],
        num_heads={attn.qkv: attn.num_heads for attn in attentions},
        **more,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for attn in attentions:
        attn.num_heads = pruner.num_heads[attn.qkv]
        attn.head_dim = attn.qkv.out_features // (3 * attn.num_heads)
        attn.attn_dim = attn.num_heads * attn.head_dim
        attn.scale = attn.head_dim**-0.5
    model.embed_dim = model.num_features = model.pos_embed.shape[-1]
    model.zero_grad(set_to_none=True)
    return model


def keeping_one(importance: Callable[[Any], Tensor | None]) -> Callable[[Any], Tensor | None]:
    """The importance of a group of layers, but infinite for the group's most important part.

    Without this, the package prunes nothing of a group that should lose all of its parts.
    """

    def scores_of(group: Any) -> Tensor | None:
        scores = importance(group)
        if scores is not None:
            scores[scores.argmax()] = float("inf")
        return scores

    return scores_of
