"""Cutting a sub-network out of a super-network: timm's modules, physically smaller, on their own."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .backbone import Backbone, blocks_of, check_widths, cuts_v_alone, family_of, first_layers, value_layer_name
from .elastic import ELASTIC, ValueLayer, ValueProjection, set_value_width
from .parts import BYPASS, children_of
from .slices import attention_slices, mlp_slices

BRANCHES = ("attn", "mlp")
STOCK = {elastic: stock for stock, elastic in ELASTIC.items()}


@torch.no_grad()
def extract(model: Backbone, widths: dict[str, int], share_memory: bool = False) -> Backbone:
    """The sub-network of `model` at `widths`, on memory of its own.

    With share_memory it reads the super-network's memory wherever a cut is a contiguous view: faster and smaller, but
    not to be trained. It takes images (B, C, height, width) and gives logits (B, classes), as the model does. Its
    blocks, attentions and MLPs are timm's; only a block with a bypassed branch is one of ours, and, where v alone is
    cut (backbone.cuts_v_alone), the two layers that v goes through. Works on the meta device too, where it gives the
    structure without weights. Raises UserError for widths that do not fit.
    """
    check_widths(model, widths)
    family = family_of(model)
    # deepcopy takes what the memo holds instead of copying it: so the big weights are copied once, already cut.
    memo: dict[int, object] = {id(p): p for p in model.parameters()} if share_memory else {}
    for index, block in enumerate(blocks_of(model)):
        for kind, cut in (("attn", _cut_attention), ("mlp", _cut_mlp)):
            branch, width = getattr(block, kind, None), widths[f"{index}.{kind}"]
            if branch is not None:
                memo[id(branch)] = cut(branch, width, share_memory) if width else nn.Identity()
    small = copy.deepcopy(model, memo)
    for index, block in enumerate(blocks_of(small)):
        bypassed = frozenset(kind for kind in BRANCHES if not widths[f"{index}.{kind}"])
        block.__class__ = BYPASS[family.block] if bypassed else family.block
        for name in ("bypassed", "family"):
            block.__dict__.pop(name, None)
        if bypassed:
            block.bypassed = bypassed
        for kind in bypassed:
            for name in children_of(family, block, kind):
                delattr(block, name)
    return small.train(model.training)


def _cut_attention(attn: nn.Module, width: int, share_memory: bool) -> nn.Module:
    whole = attn.proj.in_features // attn.num_heads
    head_dim = getattr(attn.proj, "head_dim", whole)
    weights = attention_slices(attn, width) if width != whole else None
    name, v_alone = value_layer_name(attn), cuts_v_alone(attn)
    kinds = {name: ValueLayer, "proj": ValueProjection} if v_alone and width < head_dim else {}
    small = _with_layers(attn, (name, "proj"), weights, kinds, share_memory)
    small.__dict__.pop("bias_separate_when_whole", None)
    if kinds:
        set_value_width(small, width, head_dim)
    elif not v_alone:
        for key, value in {"head_dim": width, "attn_dim": attn.num_heads * width, "scale": width**-0.5}.items():
            if hasattr(small, key):
                setattr(small, key, value)
    return small


def _cut_mlp(mlp: nn.Module, width: int, share_memory: bool) -> nn.Module:
    return _with_layers(mlp, (*first_layers(mlp), "fc2"), mlp_slices(mlp, width), {}, share_memory)


def _with_layers(
    branch: nn.Module,
    names: tuple[str, ...],
    weights: dict[str, Tensor] | None,
    kinds: dict[str, type[nn.Linear]],
    share_memory: bool,
) -> nn.Module:
    """A copy of the branch, of timm's class, whose linear layers `names` have the weights; None: those they have.

    kinds: name -> class of the layer, where it is not nn.Linear.
    """
    memo: dict[int, object] = {id(p): p for p in branch.parameters()} if share_memory else {}
    for name in names:
        layer = getattr(branch, name)
        found = {kind: p if weights is None else weights[f"{name}.{kind}"] for kind, p in layer.named_parameters()}
        memo[id(layer)] = _linear(kinds.get(name, nn.Linear), layer, found, share_memory)
    compensation = getattr(branch, "compensation", None)
    if compensation is not None:
        memo[id(compensation)] = None
    small = copy.deepcopy(branch, memo)
    small.__class__ = STOCK.get(type(branch), type(branch))
    for name in ("width", "compensation"):
        small.__dict__.pop(name, None)
        small._modules.pop(name, None)
    return small


def _linear(kind: type[nn.Linear], source: nn.Linear, weights: dict[str, Tensor], share_memory: bool) -> nn.Linear:
    """A layer with the weights, contiguous; copied unless they already are off `source`'s memory."""
    borrowed = {p.untyped_storage().data_ptr() for p in source.parameters()}
    own = {}
    for key, value in weights.items():
        own[key] = value.detach().contiguous()
        if not share_memory and own[key].untyped_storage().data_ptr() in borrowed:
            own[key] = own[key].clone()
    with torch.device("meta"):
        layer = kind(own["weight"].shape[1], own["weight"].shape[0], bias="bias" in own)
    layer.load_state_dict(own, assign=True)
    return layer.train(source.training).requires_grad_(True)
