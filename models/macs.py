"""MACs per image and parameters, counted from a model's own shapes."""

from __future__ import annotations

import math

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from .backbone import Backbone, Module, check_widths, heads_of, modules_of, value_layer
from .subnetwork import blocks_of, branch_parameters, first_layers

CONVENTIONS = ("linear", "full")


def macs_per_dim(module: Module, convention: str = "linear") -> int:
    """MACs per dim: a module of width w > 0 has fixed_macs() + w * macs_per_dim() MACs per image.

    Args:
        module: The module, see models.backbone.modules_of().
        convention: "linear" counts linear layers (the paper's), "full" adds the attention products q k^T and scores v.
    """
    if module.kind == "mlp":
        return (module.parts + 1) * module.dim * module.tokens
    layers = (module.parts + 1) * module.dim * module.tokens
    products = 2 * module.tokens * module.keys if convention == "full" and module.parts == 3 else 0
    return module.heads * (layers + products)


def fixed_macs(module: Module, convention: str = "linear") -> int:
    """MACs per image that a module has at any width above 0.

    They are 0 unless v alone is cut: then the layers of q and k, and in the "full" convention both attention products,
    do not depend on the width.
    """
    if module.kind == "mlp" or module.parts == 3:
        return 0
    products = 2 * module.tokens * module.keys if convention == "full" else 0
    return module.heads * module.head_dim * (2 * module.dim * module.tokens + products)


def module_macs(module: Module, width: int, convention: str = "linear") -> int:
    """MACs per image of a module at a width: 0 at width 0."""
    return fixed_macs(module, convention) + macs_per_dim(module, convention) * width if width else 0


def count_macs(model: Backbone, widths: dict[str, int] | None = None, convention: str = "linear") -> int:
    """MACs per image of a model, or of its sub-network at `widths` (without extracting it).

    Counts patch embedding, patch merging, blocks, attention pooling and heads. The small network of Swin v2 that makes
    position biases is not counted, because its result does not depend on the image.

    Args:
        model: A backbone or a sub-network.
        widths: Module key -> width; None for the model as it is.
        convention: "linear" or "full", see macs_per_dim().

    Raises:
        ValueError: If the convention is unknown.
        UserError: If the widths do not fit the model.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"MACs convention {convention!r} is not one of {CONVENTIONS}")
    if widths is not None:
        check_widths(model, widths)
    macs = model.patch_embed.num_patches * math.prod(model.patch_embed.proj.weight.shape)
    macs += sum(head.weight.numel() for head in heads_of(model) if isinstance(head, nn.Linear))
    macs += _merging_macs(model) + _pooling_macs(model, convention)
    for key, module in modules_of(model).items():
        macs += module_macs(module, module.width if widths is None else widths[key], convention)
    return macs


def _merging_macs(model: Backbone) -> int:
    """MACs of the layers of a Swin that merge four patches into one."""
    if not isinstance(model, SwinTransformer | SwinTransformerV2):
        return 0
    merging = [stage for stage in model.layers if not isinstance(stage.downsample, nn.Identity)]
    return sum(math.prod(s.blocks[0].input_resolution) * s.downsample.reduction.weight.numel() for s in merging)


def _pooling_macs(model: Backbone, convention: str) -> int:
    """MACs of attention pooling: keys and values of all tokens, the other layers for the latents only."""
    pool = getattr(model, "attn_pool", None)
    if pool is None:
        return 0
    layers = [layer for layer in pool.modules() if isinstance(layer, nn.Linear) and layer is not pool.kv]
    prefix = model.num_prefix_tokens if getattr(model, "pool_include_prefix", True) else 0
    tokens = model.patch_embed.num_patches + prefix
    products = 2 * tokens * pool.kv.in_features if convention == "full" else 0
    return tokens * pool.kv.weight.numel() + pool.latent_len * (sum(q.weight.numel() for q in layers) + products)


def count_params(model: Backbone, widths: dict[str, int] | None = None) -> int:
    """Number of parameters of a model, or of its sub-network at `widths` (without extracting it).

    Raises UserError if the widths do not fit the model.
    """
    if widths is not None:
        check_widths(model, widths)
    params = sum(p.numel() for p in model.parameters())
    blocks = blocks_of(model)
    for module in modules_of(model).values() if widths is not None else ():
        block, width = blocks[module.block], widths[module.key]
        if module.width == 0:
            continue
        if width == 0:
            params -= sum(p.numel() for p in branch_parameters(block, module.kind))
        else:
            params -= (module.width - width) * _params_per_dim(block, module)
    return params


def _params_per_dim(block: nn.Module, module: Module) -> int:
    if module.kind == "attn":
        layer, last = value_layer(block.attn), block.attn.proj
        first = module.parts * (module.dim + (layer.bias is not None))
        return module.heads * (first + last.out_features)
    biases = next(iter(first_layers(block.mlp).values())).bias is not None
    return module.parts * (module.dim + biases) + block.mlp.fc2.out_features
