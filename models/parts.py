"""Running a backbone branch by branch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models.eva import Eva, EvaBlock
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

from .backbone import Backbone
from .subnetwork import blocks_of, branch_children

Part = tuple[str | None, Callable[[Tensor], Tensor]]


def attention_branch(block: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    """What the attention of a block adds to the residual stream: (B, N, D) -> (B, N, D); of a Swin (B, H, W, D)."""
    if isinstance(block, SwinTransformerV2Block):
        return block.drop_path1(block.norm1(block._attn(x)))
    if isinstance(block, SwinTransformerBlock):
        return block.drop_path1(block._attn(block.norm1(x)))
    return block.drop_path1(_layer_scale(block, "1", block.attn(block.norm1(x), **kwargs)))


def mlp_branch(block: nn.Module, x: Tensor) -> Tensor:
    """What the MLP of a block adds to the residual stream, shapes as in attention_branch()."""
    if isinstance(block, SwinTransformerV2Block):
        return block.drop_path2(block.norm2(block.mlp(x)))
    return block.drop_path2(_layer_scale(block, "2", block.mlp(block.norm2(x))))


def _layer_scale(block: nn.Module, number: str, x: Tensor) -> Tensor:
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f"gamma_{number}")
        return x if gamma is None else gamma * x
    scale = getattr(block, f"ls{number}", None)
    return x if scale is None else scale(x)


# The parameters that embed() uses have names that begin with one of these.
EMBEDDING = ("patch_embed.", "pos_embed", "cls_token", "dist_token", "reg_token", "norm_pre.")


def embed(model: Backbone, images: Tensor) -> Tensor:
    """Images (B, C, height, width) to the first block's input: (B, N, D), of a Swin (B, H, W, D)."""
    return _embed(model, images)[0]


def _embed(model: Backbone, images: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The first block's input, and the keyword arguments that each block is called with: rotary embeddings."""
    x, count = model.patch_embed(images), len(blocks_of(model))
    if isinstance(model, SwinTransformer | SwinTransformerV2):
        return x, [{}] * count
    if not isinstance(model, Eva):
        return model.norm_pre(model.patch_drop(model._pos_embed(x))), [{}] * count
    x, rope = model._pos_embed(x)
    mixed = getattr(model, "rope_mixed", False) and rope is not None  # then each block has its own
    return model.norm_pre(x), [{"rope": rope[index] if mixed else rope} for index in range(count)]


def parts_of(model: Backbone, images: Tensor) -> tuple[Tensor, list[Part]]:
    """The first block's input, and the parts that run after it in order, up to classify().

    A part is (module key, function that gives what the branch adds to the stream) for each branch that is not
    bypassed, or (None, function that gives the next stream) where a Swin merges patches.
    """
    x, kwargs = _embed(model, images)
    parts, index = [], 0
    stages = model.layers if isinstance(model, SwinTransformer | SwinTransformerV2) else [model]
    for stage in stages:
        if stage is not model and not isinstance(stage.downsample, nn.Identity):
            parts.append((None, stage.downsample))
        for block in stage.blocks:
            if "attn" in branch_children(block, "attn"):
                parts.append((f"{index}.attn", partial(attention_branch, block, **kwargs[index])))
            if "mlp" in branch_children(block, "mlp"):
                parts.append((f"{index}.mlp", partial(mlp_branch, block)))
            index += 1
    return x, parts


def apply_part(x: Tensor, part: Part) -> Tensor:
    """The stream after a part."""
    key, run = part
    return run(x) if key is None else x + run(x)


def classify(model: Backbone, x: Tensor) -> Tensor:
    """The last block's output to logits (B, classes)."""
    return model.forward_head(model.norm(x))
