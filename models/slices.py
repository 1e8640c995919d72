"""What is left of a module's weights at a width: made here, once, for training and for extraction.

A module keeps a prefix of its dims: the first w of every head for q, k and v alike (or of v alone, see
backbone.cuts_v_alone), or the first w hidden units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .backbone import cuts_v_alone, first_layers, value_layer, value_layer_name


def attention_slices(attn: nn.Module, width: int) -> dict[str, Tensor]:
    """Weights of an attention of `width` dims per head that gives what `attn` gives when cut to that prefix.

    Attention of head dim d divides scores by sqrt(d) and goes on doing so when cut, but a library's attention divides
    by the sqrt of its own width; so sqrt(width / d) is folded into the q rows and the q bias. Where v alone is cut,
    q and k are left as they are.
    """
    name, layer, H = value_layer_name(attn), value_layer(attn), attn.num_heads
    d, D = attn.proj.in_features // H, layer.in_features
    if cuts_v_alone(attn):
        slices = {f"{name}.weight": first_of_v(layer.weight, H, d, width)}
        if layer.bias is not None:
            slices[f"{name}.bias"] = first_of_v(layer.bias, H, d, width)
        return slices | last_layer_slices("proj", attn, H, width)
    scale = layer.weight.new_tensor([math.sqrt(width / d), 1.0, 1.0])
    qkv = layer.weight.view(3, H, d, D)[:, :, :width] * scale.view(3, 1, 1, 1)
    slices = {"qkv.weight": qkv.reshape(3 * H * width, D)}
    if layer.bias is not None:
        bias = layer.bias.view(3, H, d)[:, :, :width] * scale.view(3, 1, 1)
        slices["qkv.bias"] = bias.reshape(3 * H * width)
    return slices | last_layer_slices("proj", attn, H, width)


def first_of_v(parameter: Tensor, heads: int, head_dim: int, width: int) -> Tensor:
    """Rows of (q, k and) v, with the first `width` of each head of v."""
    others, v = parameter.split([len(parameter) - heads * head_dim, heads * head_dim])
    return torch.cat([others, v.unflatten(0, (heads, head_dim))[:, :width].flatten(0, 1)])


def mlp_slices(mlp: nn.Module, width: int) -> dict[str, Tensor]:
    """Weights of an MLP of the first `width` hidden units; of a gated one each unit with its gate."""
    slices, hidden = {}, mlp.fc2.in_features
    for name, layer in first_layers(mlp).items():
        for kind, parameter in layer.named_parameters():
            if layer.out_features == hidden:
                slices[f"{name}.{kind}"] = parameter[:width]
            else:  # units and gates in one layer
                slices[f"{name}.{kind}"] = parameter.unflatten(0, (-1, hidden))[:, :width].flatten(0, 1)
    return slices | last_layer_slices("fc2", mlp, 1, width)


def last_layer_slices(name: str, branch: nn.Module, heads: int, width: int) -> dict[str, Tensor]:
    """Weight and bias of the layer that ends a module, for the first `width` inputs of each head.

    Where the module has a `compensation` (wpac/compensation.py), what is kept makes up for what is cut.
    """
    layer, compensation = getattr(branch, name), getattr(branch, "compensation", None)
    weight, bias = layer.weight.unflatten(1, (heads, -1)), layer.bias  # (D, H, d)
    if compensation is None or width == weight.shape[2]:
        weight = weight[:, :, :width].flatten(1)
    else:
        weight, bias = compensation(weight.transpose(1, 2).flatten(1), bias, heads * width)
        weight = weight.unflatten(1, (width, heads)).transpose(1, 2).flatten(1)
    return {f"{name}.weight": weight} | ({f"{name}.bias": bias} if bias is not None else {})
