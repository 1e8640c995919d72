"""Running a backbone at any widths by slicing its weights: the super-network as it is trained.

A module keeps a prefix of its dims: the first w of every head for q, k and v alike, or the first w hidden units.
The slices are made here, once, for training and for extraction.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import BRANCHES, BypassBlock, check_widths, full_widths


def attention_slices(attn: Attention, width: int) -> dict[str, Tensor]:
    """Weights of a plain Attention of `width` dims per head that gives what `attn` gives when cut to that prefix.

    Attention of head dim d divides scores by sqrt(d) and goes on doing so when cut, but a library's attention divides
    by the sqrt of its own width; so sqrt(width / d) is folded into the q rows and the q bias.
    """
    H, d, D = attn.num_heads, attn.head_dim, attn.qkv.in_features
    scale = attn.qkv.weight.new_tensor([math.sqrt(width / d), 1.0, 1.0])
    qkv = attn.qkv.weight.view(3, H, d, D)[:, :, :width] * scale.view(3, 1, 1, 1)
    slices = {"qkv.weight": qkv.reshape(3 * H * width, D)}
    if attn.qkv.bias is not None:
        bias = attn.qkv.bias.view(3, H, d)[:, :, :width] * scale.view(3, 1, 1)
        slices["qkv.bias"] = bias.reshape(3 * H * width)
    return slices | _last_layer_slices("proj", attn, H, width)


def mlp_slices(mlp: Mlp, width: int) -> dict[str, Tensor]:
    """Weights of a plain Mlp of the first `width` hidden units."""
    slices = {"fc1.weight": mlp.fc1.weight[:width]}
    if mlp.fc1.bias is not None:
        slices["fc1.bias"] = mlp.fc1.bias[:width]
    return slices | _last_layer_slices("fc2", mlp, 1, width)


def _last_layer_slices(name: str, branch: nn.Module, heads: int, width: int) -> dict[str, Tensor]:
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


class ElasticAttention(Attention):
    """timm's Attention at the first `width` dims of each head; at full width it is timm's own forward."""

    width: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.width == self.head_dim:
            return super().forward(x, attn_mask=attn_mask, **kwargs)
        if any(kwargs.values()):
            raise NotImplementedError(f"a cut attention does not know {kwargs}")
        B, N, _ = x.shape
        H, w = self.num_heads, self.width
        weights = attention_slices(self, w)
        qkv = F.linear(x, weights["qkv.weight"], weights.get("qkv.bias"))
        q, k, v = qkv.view(B, N, 3, H, w).permute(2, 0, 3, 1, 4)  # each (B, H, N, w)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=self.attn_drop.p if self.training else 0.0
            )
        else:
            scores = (q * w**-0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, float("-inf"))
            elif attn_mask is not None:
                scores = scores + attn_mask
            x = self.attn_drop(scores.softmax(dim=-1)) @ v
        x = x.transpose(1, 2).reshape(B, N, H * w)
        return self.proj_drop(F.linear(x, weights["proj.weight"], weights.get("proj.bias")))


class ElasticMlp(Mlp):
    """timm's Mlp at the first `width` hidden units; at full width it is timm's own forward."""

    width: int

    def forward(self, x: Tensor) -> Tensor:
        if self.width == self.fc1.out_features:
            return super().forward(x)
        weights = mlp_slices(self, self.width)
        x = self.drop1(self.act(F.linear(x, weights["fc1.weight"], weights.get("fc1.bias"))))
        return self.drop2(F.linear(x, weights["fc2.weight"], weights.get("fc2.bias")))


class ElasticBlock(BypassBlock):
    """A block of a super-network: its parameters always have a gradient, zero where a branch is bypassed."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        if self.bypassed and torch.is_grad_enabled():
            x = _ZeroGradients.apply(x, *self.bypassed_parameters())
        return super().forward(x, **kwargs)

    def bypassed_parameters(self) -> list[nn.Parameter]:
        """The parameters of the branches that add nothing now."""
        parts = [getattr(self, part) for name in sorted(self.bypassed) for part in BRANCHES[name]]
        return [parameter for part in parts for parameter in part.parameters()]


class _ZeroGradients(torch.autograd.Function):
    """Gives x back, and the parameters a gradient of zero.

    DDP waits for a gradient of every parameter, and a bypassed branch has none. This way costs a fill with zeros where
    a branch is bypassed, and nothing elsewhere. DDP's own `find_unused_parameters=True` searches the graph at each
    step; on two CPU processes both ways measure alike (benchmarks/ddp_bypass.py). What decides is that here one
    process and many agree: out of the slice the gradient is zero, never absent, so the optimizer treats all alike.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def make_elastic(model: VisionTransformer) -> VisionTransformer:
    """Turns a backbone into a super-network, in place: same parameters, same state dict, full width until told."""
    for block in model.blocks:
        block.__class__ = ElasticBlock
        block.attn.__class__, block.mlp.__class__ = ElasticAttention, ElasticMlp
    set_widths(model, full_widths(model))
    return model


def set_widths(model: VisionTransformer, widths: dict[str, int]) -> None:
    """Makes a super-network run at `widths` from now on. Raises UserError for widths that do not fit it."""
    check_widths(model, widths)
    for index, block in enumerate(model.blocks):
        block.attn.width, block.mlp.width = widths[f"{index}.attn"], widths[f"{index}.mlp"]
        block.bypassed = frozenset(name for name in ("attn", "mlp") if not widths[f"{index}.{name}"])
