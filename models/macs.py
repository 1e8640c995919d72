"""MACs and parameters, counted from a model's own shapes, for one image."""

from __future__ import annotations

import math

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from .backbone import Backbone, Module, blocks_of, check_widths, family_of, first_layers, modules_of, value_layer
from .parts import parameters_of

CONVENTIONS = ("linear", "full")


def macs_per_dim(module: Module, convention: str = "linear") -> int:
    """MACs of one dim of a module: MACs grow in proportion to the width, from fixed_macs() on.

    `linear` counts linear layers (the paper's way); `full` adds the two products of attention, q k^T and scores v.
    """
    if module.kind == "mlp":
        return (module.parts + 1) * module.dim * module.tokens
    layers = (module.parts + 1) * module.dim * module.tokens
    products = 2 * module.tokens * module.keys if convention == "full" and module.parts == 3 else 0
    return module.heads * (layers + products)


def fixed_macs(module: Module, convention: str = "linear") -> int:
    """MACs that a module has at any width but 0: none, but of an attention of which v alone is cut those of q and k.

    Its products stay whole as well.
    """
    if module.kind == "mlp" or module.parts == 3:
        return 0
    products = 2 * module.tokens * module.keys if convention == "full" else 0
    return module.heads * module.head_dim * (2 * module.dim * module.tokens + products)


def count_macs(model: Backbone, widths: dict[str, int] | None = None, convention: str = "linear") -> int:
    """MACs for one image of the model as it stands, or of its sub-network at `widths`.

    Patch embedding and merging, blocks, attention pooling and head(s); `convention` is "linear" or "full", see
    macs_per_dim(). Raises ValueError for another convention, UserError for widths that do not fit. A Swin v2's small
    network for position biases is not counted: it does not hang on the image.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"MACs convention {convention!r} is not one of {CONVENTIONS}")
    if widths is not None:
        check_widths(model, widths)
    macs = model.patch_embed.num_patches * math.prod(model.patch_embed.proj.weight.shape)
    heads = [model.get_classifier()]
    heads = heads[0] if isinstance(heads[0], tuple) else heads
    macs += sum(head.weight.numel() for head in heads if isinstance(head, nn.Linear))
    macs += _merging_macs(model) + _pooling_macs(model, convention)
    for key, module in modules_of(model).items():
        width = module.width if widths is None else widths[key]
        if width:
            macs += fixed_macs(module, convention) + macs_per_dim(module, convention) * width
    return macs


def _merging_macs(model: Backbone) -> int:
    """Of a Swin's layers that merge four patches into one."""
    if not isinstance(model, SwinTransformer | SwinTransformerV2):
        return 0
    merging = [stage for stage in model.layers if not isinstance(stage.downsample, nn.Identity)]
    return sum(math.prod(s.blocks[0].input_resolution) * s.downsample.reduction.weight.numel() for s in merging)


def _pooling_macs(model: Backbone, convention: str) -> int:
    """Of an attention that pools: keys and values of all tokens, the rest for its latents."""
    pool = getattr(model, "attn_pool", None)
    if pool is None:
        return 0
    layers = [layer for layer in pool.modules() if isinstance(layer, nn.Linear) and layer is not pool.kv]
    prefix = model.num_prefix_tokens if getattr(model, "pool_include_prefix", True) else 0
    tokens = model.patch_embed.num_patches + prefix
    products = 2 * tokens * pool.kv.in_features if convention == "full" else 0
    return tokens * pool.kv.weight.numel() + pool.latent_len * (sum(q.weight.numel() for q in layers) + products)


def count_params(model: Backbone, widths: dict[str, int] | None = None) -> int:
    """Parameters of the model as it stands, or of its sub-network at `widths` (without extracting it).

    Raises UserError for widths that do not fit.
    """
    if widths is not None:
        check_widths(model, widths)
    params = sum(p.numel() for p in model.parameters())
    blocks, family = blocks_of(model), family_of(model)
    for module in modules_of(model).values() if widths is not None else ():
        block, width = blocks[module.block], widths[module.key]
        if module.width == 0:
            continue
        if width == 0:
            params -= sum(p.numel() for p in parameters_of(family, block, module.kind))
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
