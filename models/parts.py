"""Running a backbone branch by branch, and blocks that leave a branch out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models.eva import Eva, EvaBlock
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .backbone import Backbone, Family, blocks_of, family_of

Part = tuple[str | None, Callable[[Tensor], Tensor]]


def attention_branch(block: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    """What the block's attention adds to the residual stream: (B, N, D) -> (B, N, D); of a Swin (B, H, W, D)."""
    if isinstance(block, SwinTransformerV2Block):
        return block.drop_path1(block.norm1(block._attn(x)))
    if isinstance(block, SwinTransformerBlock):
        return block.drop_path1(block._attn(block.norm1(x)))
    return block.drop_path1(_scaled(block, "1", block.attn(block.norm1(x), **kwargs)))


def mlp_branch(block: nn.Module, x: Tensor) -> Tensor:
    """What the block's MLP adds to the residual stream, shapes as of attention_branch()."""
    if isinstance(block, SwinTransformerV2Block):
        return block.drop_path2(block.norm2(block.mlp(x)))
    return block.drop_path2(_scaled(block, "2", block.mlp(block.norm2(x))))


def _scaled(block: nn.Module, number: str, x: Tensor) -> Tensor:
    """Layer scale, as the block has it."""
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f"gamma_{number}")
        return x if gamma is None else gamma * x
    scale = getattr(block, f"ls{number}", None)
    return x if scale is None else scale(x)


class Bypass:
    """Before timm's block in a class: a branch ("attn" or "mlp") may be bypassed: it adds nothing and costs nothing."""

    bypassed: frozenset[str] = frozenset()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x: (B, N, D), of a Swin (B, H, W, D) -> the same."""
        if not self.bypassed:
            return super().forward(x, **kwargs)
        if "attn" not in self.bypassed:
            x = x + attention_branch(self, x, **kwargs)
        if "mlp" not in self.bypassed:
            x = x + mlp_branch(self, x)
        return x


class BypassBlock(Bypass, Block):
    """timm's Block that may leave a branch out."""


class BypassEvaBlock(Bypass, EvaBlock):
    """timm's EvaBlock that may leave a branch out."""


class BypassSwinBlock(Bypass, SwinTransformerBlock):
    """timm's SwinTransformerBlock that may leave a branch out."""


class BypassSwinV2Block(Bypass, SwinTransformerV2Block):
    """timm's SwinTransformerV2Block that may leave a branch out."""


BYPASS: dict[type[nn.Module], type[Bypass]] = {
    Block: BypassBlock,
    EvaBlock: BypassEvaBlock,
    SwinTransformerBlock: BypassSwinBlock,
    SwinTransformerV2Block: BypassSwinV2Block,
}


def children_of(family: Family, block: nn.Module, kind: str) -> dict[str, nn.Module | nn.Parameter]:
    """Those of a block that make up its branch, as far as they are there."""
    found = {name: getattr(block, name, None) for name in getattr(family, kind)}
    return {name: child for name, child in found.items() if child is not None}


def parameters_of(family: Family, block: nn.Module, kind: str) -> list[nn.Parameter]:
    """All that a branch holds."""
    children = children_of(family, block, kind).values()
    return [p for child in children for p in ([child] if isinstance(child, nn.Parameter) else child.parameters())]


def embed(model: Backbone, images: Tensor) -> Tensor:
    """Images (B, C, height, width) to the first block's input: (B, N, D), of a Swin (B, H, W, D)."""
    return _embed(model, images)[0]


def _embed(model: Backbone, images: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """And what else each block is called with: rotary embeddings."""
    x, count = model.patch_embed(images), len(blocks_of(model))
    if isinstance(model, SwinTransformer | SwinTransformerV2):
        return x, [{}] * count
    if not isinstance(model, Eva):
        return model.norm_pre(model.patch_drop(model._pos_embed(x))), [{}] * count
    x, rope = model._pos_embed(x)
    mixed = getattr(model, "rope_mixed", False) and rope is not None  # then each block has its own
    return model.norm_pre(x), [{"rope": rope[index] if mixed else rope} for index in range(count)]


def parts_of(model: Backbone, images: Tensor) -> tuple[Tensor, list[Part]]:
    """The first block's input, and what follows in running order, up to classify().

    (module key, what the branch adds to the stream), where the branch is not bypassed; (None, what the stream
    becomes) where a Swin merges patches.
    """
    x, kwargs = _embed(model, images)
    family, parts, index = family_of(model), [], 0
    stages = model.layers if isinstance(model, SwinTransformer | SwinTransformerV2) else [model]
    for stage in stages:
        if stage is not model and not isinstance(stage.downsample, nn.Identity):
            parts.append((None, stage.downsample))
        for block in stage.blocks:
            if children_of(family, block, "attn").get("attn") is not None:
                parts.append((f"{index}.attn", partial(attention_branch, block, **kwargs[index])))
            if children_of(family, block, "mlp").get("mlp") is not None:
                parts.append((f"{index}.mlp", partial(mlp_branch, block)))
            index += 1
    return x, parts


def follow(x: Tensor, part: Part) -> Tensor:
    """The stream after a part."""
    key, run = part
    return run(x) if key is None else x + run(x)


def classify(model: Backbone, x: Tensor) -> Tensor:
    """The last block's output to logits (B, classes)."""
    return model.forward_head(model.norm(x))
