"""The weights of a module at a smaller width. Training and extraction both take them from here.

A module keeps a prefix of its dims: the first w dims per head of q, k and v (or of v alone, see
backbone.cuts_v_alone), or the first w hidden units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .backbone import value_layer
from .subnetwork import cuts_v_alone, first_layers, value_layer_name


def attention_slices(attn: nn.Module, width: int, fold_scale: bool = True) -> dict[str, Tensor]:
    """Weights of a timm attention with `width` dims per head that computes what `attn` computes when cut to them.

    Scores are always divided by sqrt(d) of the original head dim d, whereas a timm attention divides by the sqrt of its
    own head dim. Therefore sqrt(width / d) is folded into the rows of q and the bias of q, unless the caller scales the
    scores itself. If v alone is cut, q and k stay as they are.

    Returns:
        Parameter name, such as "qkv.weight" (3 * H * width, D) -> tensor that autograd connects to `attn`.
    """
    name, layer, H = value_layer_name(attn), value_layer(attn), attn.num_heads
    d, D = attn.proj.in_features // H, layer.in_features
    if cuts_v_alone(attn):
        slices = {f"{name}.weight": first_of_v(layer.weight, H, d, width)}
        if layer.bias is not None:
            slices[f"{name}.bias"] = first_of_v(layer.bias, H, d, width)
        return slices | last_layer_slices("proj", attn, H, width)
    slices = {"qkv.weight": layer.weight.view(3, H, d, D)[:, :, :width].reshape(3 * H * width, D)}
    if layer.bias is not None:
        slices["qkv.bias"] = layer.bias.view(3, H, d)[:, :, :width].reshape(3 * H * width)
    if fold_scale:
        for key, rows in slices.items():
            q, k_and_v = rows.split([H * width, 2 * H * width])
            slices[key] = torch.cat([q * math.sqrt(width / d), k_and_v])
    return slices | last_layer_slices("proj", attn, H, width)


def first_of_v(parameter: Tensor, heads: int, head_dim: int, width: int) -> Tensor:
    """Cuts v in a weight or bias whose last heads * head_dim rows are v; rows before them (q and k) are kept."""
    q_and_k, v = parameter.split([len(parameter) - heads * head_dim, heads * head_dim])
    return torch.cat([q_and_k, v.unflatten(0, (heads, head_dim))[:, :width].flatten(0, 1)])


def mlp_slices(mlp: nn.Module, width: int) -> dict[str, Tensor]:
    """Weights of an MLP with the first `width` hidden units: parameter name -> tensor.

    In a gated MLP each unit keeps its gate.
    """
    slices, hidden = {}, mlp.fc2.in_features
    for name, layer in first_layers(mlp).items():
        for kind, parameter in layer.named_parameters():
            if layer.out_features == hidden:
                slices[f"{name}.{kind}"] = parameter[:width]
            else:  # a gated MLP with units and gates in one layer
                slices[f"{name}.{kind}"] = parameter.unflatten(0, (-1, hidden))[:, :width].flatten(0, 1)
    return slices | last_layer_slices("fc2", mlp, 1, width)


def last_layer_slices(name: str, branch: nn.Module, heads: int, width: int) -> dict[str, Tensor]:
    """Weight and bias of the last linear layer of a module, for the first `width` inputs per head (1 head for an MLP).

    If the module has a `compensation` (wpac/compensation.py), the weights also make up for the inputs that are cut.
    """
    layer, compensation = getattr(branch, name), getattr(branch, "compensation", None)
    weight, bias = layer.weight.unflatten(1, (heads, -1)), layer.bias  # (D, H, d)
    if compensation is None or width == weight.shape[2]:
        weight = weight[:, :, :width].flatten(1)
    else:
        weight, bias = compensation(weight.transpose(1, 2).flatten(1), bias, heads * width)
        weight = weight.unflatten(1, (width, heads)).transpose(1, 2).flatten(1)
    return {f"{name}.weight": weight} | ({f"{name}.bias": bias} if bias is not None else {})
