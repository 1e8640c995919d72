"""timm's transformers: which are supported, how one is created, and what modules it has."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
from timm.layers import Attention, AttentionPoolLatent, AttentionRope, GluMlp, Mlp, PatchEmbed, SwiGLU
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as CosineWindowAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from utils import UserError, first_line

from .subnetwork import blocks_of, cuts_v_alone, first_layers, resize, structure, value_layer_name

# The authors' names for the DeiT models.
ALIASES = {
    "vit_tiny": "deit_tiny_patch16_224",
    "vit_small": "deit_small_patch16_224",
    "vit_base": "deit_base_patch16_224",
}

Backbone = VisionTransformer | Eva | SwinTransformer | SwinTransformerV2


@dataclass(frozen=True)
class Family:
    """A kind of timm model: its classes and the files in which timm defines them."""

    names: str
    files: tuple[str, ...]
    model: type[nn.Module]
    block: type[nn.Module]
    attentions: tuple[type[nn.Module], ...]


# The supported families. Their blocks are in model.blocks, or, for Swin, in model.layers[stage].blocks.
FAMILIES = (
    Family(
        "vit_*, deit_*, deit3_*",
        files=("vision_transformer", "deit"),
        model=VisionTransformer,
        block=Block,
        attentions=(Attention,),
    ),
    Family(
        "vit_*_rope_*, vit_*_dinov3, eva02_*",
        files=("eva",),
        model=Eva,
        block=EvaBlock,
        attentions=(AttentionRope, EvaAttention),
    ),
    Family("swin_*", ("swin_transformer",), SwinTransformer, SwinTransformerBlock, (WindowAttention,)),
    Family("swinv2_*", ("swin_transformer_v2",), SwinTransformerV2, SwinTransformerV2Block, (CosineWindowAttention,)),
)
MLPS = (Mlp, GluMlp, SwiGLU)
SUPPORTED = "; ".join(family.names for family in FAMILIES)


@dataclass(frozen=True)
class Module:
    """One branch of one block of a model.

    width: dims per head (attn) or hidden units (mlp); 0 where the branch is bypassed.
    heads: 1 for an MLP.  dim: D, the embedding dimension at the block.
    tokens: N, the tokens that its layers process.  keys: the tokens that a query attends to: N, or those of its window.
    parts: for an attention, 3 (q, k, v), or 1 where v alone is cut (subnetwork.cuts_v_alone); for an MLP, the rows of
    its first layer per unit, 2 where it is gated.
    head_dim: dims per head of q and k, which differ from the width where v alone is cut.
    """

    key: str
    block: int
    kind: str
    width: int
    heads: int
    dim: int
    tokens: int = 1
    keys: int = 1
    parts: int = 1
    head_dim: int = 0


def family_named(name: str) -> Family:
    """The family of a model by its name in timm. Raises UserError for a model of no family."""
    name = ALIASES.get(name, name)
    for family in FAMILIES:
        if timm.models.is_model_in_modules(name, family.files):
            return family
    raise UserError(f"{name} is not supported; these are: {SUPPORTED}")


def create_backbone(
    name: str, *, pretrained: bool = False, pretrained_cfg: dict[str, Any] | None = None, **model_kwargs: Any
) -> Backbone:
    """timm.create_model for the transformers that this project supports.

    pretrained_cfg: timm's configuration of the weights, where it is not that of the name.
    Raises UserError for an unknown name (with near ones), bad arguments, or a model of another kind.
    """
    make = partial(timm.create_model, pretrained=pretrained, pretrained_cfg=pretrained_cfg, **model_kwargs)
    return _made_by(make, name, model_kwargs)


def create_subnetwork(name: str, model_kwargs: dict[str, Any], widths: dict[str, int]) -> Backbone:
    """The structure of a sub-network, for load_state_dict(..., assign=True); its weights may be on the meta device.

    Raises UserError as create_backbone() does, and for widths that do not fit the model.
    """
    model = _made_by(partial(structure, model_kwargs=model_kwargs), name, model_kwargs)
    check_widths(model, widths)
    resize(model, widths)
    return model


def _made_by(make: Callable[[str], nn.Module], name: str, model_kwargs: dict[str, Any]) -> Backbone:
    name = ALIASES.get(name, name)
    if not timm.is_model(name):
        files = [file for family in FAMILIES for file in family.files]
        known = [*ALIASES, *(model for file in files for model in timm.list_models(module=file))]
        near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or "deit_tiny_patch16_224"
        raise UserError(f"unknown model {name!r}; near names: {near}")
    try:
        model = make(name)
    except Exception as error:  # timm asserts, raises TypeError for unknown arguments, and hub errors of many types
        raise UserError(f"timm could not make {name} with {model_kwargs}: {first_line(error)}") from error
    check_supported(model, name)
    return model


def check_supported(model: nn.Module, name: str) -> None:
    """Raises UserError, with the reason, unless the model and all its blocks are of a supported family."""
    family = next((family for family in FAMILIES if isinstance(model, family.model)), None)
    reason = None
    if family is None:
        reason = f"it is a {type(model).__name__}"
    elif type(model.patch_embed) is not PatchEmbed:
        reason = f"its patches are embedded by a {type(model.patch_embed).__name__}"
    elif type(getattr(model, "attn_pool", None)) not in (type(None), AttentionPoolLatent):
        reason = f"it pools with {type(model.attn_pool).__name__}"
    else:
        for index, block in enumerate(blocks_of(model)):
            reason = reason or _unsupported(family, block, index)
    if reason:
        raise UserError(f"{name} is not supported ({reason}); these are: {SUPPORTED}")


def _unsupported(family: Family, block: nn.Module, index: int) -> str | None:
    if type(block) is not family.block:
        return f"block {index} is a {type(block).__name__}"
    attn, mlp = block.attn, block.mlp
    if type(attn) not in family.attentions or getattr(attn, "gate", None) is not None:
        return f"block {index} has a {type(attn).__name__} of another kind"
    if getattr(attn, "num_kv_groups", 1) != 1:
        return f"block {index} has fewer keys than queries"
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        return f"block {index} has a norm on the outputs of its attention"
    if type(mlp) not in MLPS or not isinstance(mlp.norm, nn.Identity) or not isinstance(mlp.fc2, nn.Linear):
        return f"block {index} has a {type(mlp).__name__} of another kind"
    return None


def modules_of(model: nn.Module) -> dict[str, Module]:
    """The modules of a backbone or a sub-network in running order; keys "0.attn", "0.mlp", "1.attn", ..."""
    found = {}
    for index, (block, tokens, padded, keys) in enumerate(_blocks_and_tokens(model)):
        dim = getattr(block, "dim", None) or model.embed_dim
        key, attn, mlp = f"{index}.attn", getattr(block, "attn", None), getattr(block, "mlp", None)
        if attn is None:
            found[key] = Module(key, index, "attn", 0, 0, dim, padded, keys)
        else:
            width, parts, head_dim = attention_width(attn)
            found[key] = Module(key, index, "attn", width, attn.num_heads, dim, padded, keys, parts, head_dim)
        key = f"{index}.mlp"
        hidden = mlp.fc2.in_features if mlp is not None else 0
        rows = sum(layer.out_features for layer in first_layers(mlp).values()) // hidden if hidden else 1
        found[key] = Module(key, index, "mlp", hidden, 1, dim, tokens, parts=rows)
    return found


def _blocks_and_tokens(model: nn.Module) -> Iterator[tuple[nn.Module, int, int, int]]:
    """(block, N of its MLP, N of its attention, keys per query); the attention of a Swin pads to whole windows."""
    if not isinstance(model, SwinTransformer | SwinTransformerV2):
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        yield from ((block, tokens, tokens, tokens) for block in model.blocks)
        return
    for block in blocks_of(model):
        sides = list(zip(block.input_resolution, block.window_size, strict=True))
        tokens, area = block.input_resolution[0] * block.input_resolution[1], block.window_area
        windows = -(-sides[0][0] // sides[0][1]) * -(-sides[1][0] // sides[1][1])
        yield block, tokens, windows * area, area


# ---------------------------------------------------------------------------------------------------------------------
# The layers of a module


def value_layer(attn: nn.Module) -> nn.Linear:
    """The layer whose last rows give v: `qkv`, or `v_proj`."""
    return getattr(attn, value_layer_name(attn))


def value_bias(attn: nn.Module) -> nn.Parameter | None:
    """The bias whose last entries belong to v: that of the layer, or a parameter that timm keeps beside it."""
    bias = getattr(attn, "v_bias", None)
    return value_layer(attn).bias if bias is None else bias


def attention_width(attn: nn.Module) -> tuple[int, int, int]:
    """(width, parts, head_dim) of Module for an attention."""
    layer = value_layer(attn)
    if not cuts_v_alone(attn):
        width = layer.out_features // (3 * attn.num_heads)
        return width, 3, width
    head_dim = attn.proj.head_dim if hasattr(attn.proj, "head_dim") else attn.proj.in_features // attn.num_heads
    return attn.proj.in_features // attn.num_heads, 1, head_dim


def last_layer(block: nn.Module, kind: str) -> nn.Linear:
    """The last linear layer of a branch, whose inputs a width cuts: `proj` or `fc2`."""
    return block.attn.proj if kind == "attn" else block.mlp.fc2


def heads_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """The classifier heads: one, which a model without a head has as an nn.Identity, or the two of a distilled DeiT."""
    head = model.get_classifier()
    return head if isinstance(head, tuple) else (head,)


def full_widths(model: nn.Module) -> dict[str, int]:
    """The widths of the model as it is: of a backbone, the full widths."""
    return {key: module.width for key, module in modules_of(model).items()}


def check_widths(model: nn.Module, widths: dict[str, int]) -> None:
    """Raises UserError unless `widths` names every module of the model and each width lies in 0..full."""
    full = full_widths(model)
    if widths.keys() != full.keys():
        odd = sorted(widths.keys() ^ full.keys())[0]
        raise UserError(f"widths: module {odd} is {'missing' if odd in full else 'not in the model'}")
    for key, width in widths.items():
        if not 0 <= width <= full[key]:
            raise UserError(f"widths: {key} is {width}, outside 0..{full[key]}")
