"""MACs and parameters, counted from a model's own shapes, for one image."""

from __future__ import annotations

import math

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .backbone import BRANCHES, Module, modules_of

CONVENTIONS = ("linear", "full")


def tokens_of(model: VisionTransformer) -> int:
    """N: patches and prefix tokens."""
    return model.patch_embed.num_patches + model.num_prefix_tokens


def macs_per_dim(module: Module, tokens: int, convention: str = "linear") -> int:
    """MACs of one dim of a module: MACs are proportional to the width.

    `linear` counts linear layers (the paper's way); `full` adds the two products of attention, q k^T and scores v.
    """
    if module.kind == "mlp":
        return 2 * module.dim * tokens
    products = 2 * tokens**2 if convention == "full" else 0
    return module.heads * (4 * module.dim * tokens + products)


def count_macs(model: VisionTransformer, widths: dict[str, int] | None = None, convention: str = "linear") -> int:
    """MACs for one image of the model as it stands, or of its sub-network at `widths`.

    Patch embedding, blocks and head(s); `convention` is "linear" or "full" (see macs_per_dim).
    Raises ValueError for another convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"MACs convention {convention!r} is not one of {CONVENTIONS}")
    tokens = tokens_of(model)
    macs = model.patch_embed.num_patches * math.prod(model.patch_embed.proj.weight.shape)
    heads = [model.head, getattr(model, "head_dist", None)]
    macs += sum(head.weight.numel() for head in heads if isinstance(head, nn.Linear))
    for key, module in modules_of(model).items():
        macs += macs_per_dim(module, tokens, convention) * (module.width if widths is None else widths[key])
    return macs


def count_params(model: VisionTransformer, widths: dict[str, int] | None = None) -> int:
    """Parameters of the model as it stands, or of its sub-network at `widths` (without extracting it)."""
    params = sum(p.numel() for p in model.parameters())
    for module in modules_of(model).values() if widths is not None else ():
        block, width = model.blocks[module.block], widths[module.key]
        if module.width == 0:
            continue
        if width == 0:
            parts = [getattr(block, name) for name in BRANCHES[module.kind]]
            params -= sum(p.numel() for part in parts for p in part.parameters())
        else:
            params -= (module.width - width) * _params_per_dim(block, module)
    return params


def _params_per_dim(block: nn.Module, module: Module) -> int:
    if module.kind == "attn":
        qkv = module.dim + (block.attn.qkv.bias is not None)
        return module.heads * (3 * qkv + block.attn.proj.out_features)
    return module.dim + (block.mlp.fc1.bias is not None) + block.mlp.fc2.out_features
