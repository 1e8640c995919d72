"""Cutting a sub-network out of a super-network: plain timm modules, physically smaller, on their own."""

from __future__ import annotations

import copy

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .backbone import BRANCHES, BypassBlock, check_widths
from .elastic import attention_slices, mlp_slices


@torch.no_grad()
def extract(model: VisionTransformer, widths: dict[str, int], share_memory: bool = False) -> VisionTransformer:
    """The sub-network of `model` at `widths`, on memory of its own.

    With share_memory it reads the super-network's memory wherever a cut is a contiguous view: faster and smaller, but
    not to be trained. Its blocks are timm's Block, Attention and Mlp; only a block with a bypassed branch is a
    BypassBlock. It takes images (B, C, height, width) and gives logits (B, classes), as the model does. Works on the
    meta device too, where it gives the structure without weights. Raises UserError for widths that do not fit.
    """
    check_widths(model, widths)
    # deepcopy takes what the memo holds instead of copying it: so the big weights are copied once, already cut.
    memo: dict[int, object] = {id(p): p for p in model.parameters()} if share_memory else {}
    for index, block in enumerate(model.blocks):
        attn, mlp = widths[f"{index}.attn"], widths[f"{index}.mlp"]
        if hasattr(block, "attn"):
            memo[id(block.attn)] = _cut_attention(block.attn, attn, share_memory) if attn else nn.Identity()
        if hasattr(block, "mlp"):
            memo[id(block.mlp)] = _cut_mlp(block.mlp, mlp, share_memory) if mlp else nn.Identity()
    small = copy.deepcopy(model, memo)
    for index, block in enumerate(small.blocks):
        bypassed = frozenset(name for name in BRANCHES if not widths[f"{index}.{name}"])
        block.__class__ = BypassBlock if bypassed else Block
        block.__dict__.pop("bypassed", None)
        if bypassed:
            block.bypassed = bypassed
        for child in (child for name in bypassed for child in BRANCHES[name] if hasattr(block, child)):
            delattr(block, child)
    return small.train(model.training)


def _cut_attention(attn: Attention, width: int, share_memory: bool) -> Attention:
    with torch.device("meta"):
        small = Attention(
            attn.qkv.in_features,
            num_heads=attn.num_heads,
            attn_head_dim=width,
            dim_out=attn.proj.out_features,
            qkv_bias=attn.qkv.bias is not None,
            proj_bias=attn.proj.bias is not None,
            attn_drop=attn.attn_drop.p,
            proj_drop=attn.proj_drop.p,
        )
    small.fused_attn = attn.fused_attn
    weights = attention_slices(attn, width) if width != attn.head_dim else dict(attn.named_parameters())
    return _filled(small, weights, attn, share_memory)


def _cut_mlp(mlp: Mlp, width: int, share_memory: bool) -> Mlp:
    with torch.device("meta"):
        small = Mlp(
            mlp.fc1.in_features,
            hidden_features=width,
            out_features=mlp.fc2.out_features,
            act_layer=lambda: copy.deepcopy(mlp.act),
            bias=(mlp.fc1.bias is not None, mlp.fc2.bias is not None),
            drop=(mlp.drop1.p, mlp.drop2.p),
        )
    return _filled(small, mlp_slices(mlp, width), mlp, share_memory)


def _filled(small: nn.Module, weights: dict[str, Tensor], source: nn.Module, share_memory: bool) -> nn.Module:
    """The meta module `small` with the weights, contiguous; copied unless they already are off `source`'s memory."""
    borrowed = {p.untyped_storage().data_ptr() for p in source.parameters()}
    own = {}
    for key, value in weights.items():
        own[key] = value.detach().contiguous()
        if not share_memory and own[key].untyped_storage().data_ptr() in borrowed:
            own[key] = own[key].clone()
    small.load_state_dict(own, assign=True)
    return small.requires_grad_(True)
