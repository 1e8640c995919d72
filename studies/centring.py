"""Centring of v, which studies/contraction.py compares with WPAC; it was not adopted."""

from __future__ import annotations

import torch

from models.backbone import Backbone, blocks_of, modules_of
from wpac.statistics import Statistics


@torch.no_grad()
def centre_values(model: Backbone, statistics: Statistics) -> None:
    """Shifts v of each head so that the inputs of `proj` have mean zero, and corrects the bias of `proj`; in place.

    The outputs of the model do not change, since the rows of an attention matrix sum to 1. (Shifting k would have no
    effect even when dims are cut, since the softmax does not depend on it.) Compensation has the same effect as
    centring and more; without compensation, centring reduces the accuracy when many dims are cut.

    statistics: with outputs, after contract(); their means are set to zero. Computed in float64. Attention without
    biases is left unchanged.
    """
    for key, module in modules_of(model).items():
        attn = getattr(blocks_of(model)[module.block], "attn", None)
        if module.kind != "attn" or attn.qkv.bias is None or attn.proj.bias is None:
            continue
        outputs = statistics.outputs[key]
        mean = outputs.mean.view(module.width, module.heads).T  # (H, d)
        bias = attn.qkv.bias.double().view(3, *mean.shape).clone()
        bias[2] -= mean
        attn.qkv.bias.copy_(bias.flatten())
        attn.proj.bias.copy_(attn.proj.bias.double() + attn.proj.weight.double() @ mean.flatten())
        outputs.mean.zero_()
