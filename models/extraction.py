"""Cutting a sub-network out of a super-network: timm's modules, physically smaller, on their own."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .backbone import Backbone, check_widths
from .elastic import make_plain
from .slices import attention_slices, mlp_slices
from .subnetwork import blocks_of, first_layers, resize, value_layer_name


@torch.no_grad()
def extract(model: Backbone, widths: dict[str, int], share_memory: bool = False) -> Backbone:
    """The sub-network of `model` at `widths`, on memory of its own.

    With share_memory it reads the super-network's memory wherever a cut is a contiguous view: faster and smaller, but
    not to be trained. It takes images (B, C, height, width) and gives what the model gives. Its blocks, attentions and
    MLPs are timm's; only a block with a bypassed branch, and the two layers that v goes through where v alone is cut,
    are classes of models/subnetwork.py. Works on the meta device, too, where it gives the structure without weights.
    Raises UserError for widths that do not fit the model.
    """
    check_widths(model, widths)
    # deepcopy takes what the memo holds instead of copying it, so that the weights to be cut are never copied whole.
    memo: dict[int, object] = {id(p): p for p in model.parameters()} if share_memory else {}
    weights: dict[tuple[int, str, str], dict[str, torch.Tensor]] = {}
    for index, block in enumerate(blocks_of(model)):
        for kind, slices_of in (("attn", attention_slices), ("mlp", mlp_slices)):
            branch, width = getattr(block, kind, None), widths[f"{index}.{kind}"]
            if branch is None or width == _width(branch):
                continue
            slices = slices_of(branch, width) if width else {}
            for name in _cut_layers(branch):
                layer = getattr(branch, name)
                memo |= {id(parameter): parameter for parameter in layer.parameters()}
                if width:
                    weights[index, kind, name] = _own(layer, name, slices, share_memory)
    memo |= {id(module): None for name, module in model.named_modules() if name.endswith(".compensation")}
    small = copy.deepcopy(model, memo)
    make_plain(small)
    resize(small, widths)
    blocks = blocks_of(small)
    for (index, kind, name), tensors in weights.items():
        getattr(getattr(blocks[index], kind), name).load_state_dict(tensors, assign=True)
    return small.train(model.training)


def _cut_layers(branch: nn.Module) -> tuple[str, ...]:
    """The names of the layers whose weights a width cuts."""
    if hasattr(branch, "fc2"):
        return (*first_layers(branch), "fc2")
    return value_layer_name(branch), "proj"


def _width(branch: nn.Module) -> int:
    return branch.fc2.in_features if hasattr(branch, "fc2") else branch.proj.in_features // branch.num_heads


def _own(layer: nn.Linear, name: str, slices: dict[str, torch.Tensor], share_memory: bool) -> dict[str, torch.Tensor]:
    """A layer's cut weight and bias, contiguous; copied unless they already are off the layer's memory."""
    borrowed = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    own = {}
    for key, _ in layer.named_parameters():
        own[key] = slices[f"{name}.{key}"].detach().contiguous()
        if not share_memory and own[key].untyped_storage().data_ptr() in borrowed:
            own[key] = own[key].clone()
    return own
