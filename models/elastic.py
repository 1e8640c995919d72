"""Running a backbone at any widths by slicing its weights: the super-network as it is trained."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models.eva import EvaBlock
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import (
    Backbone,
    blocks_of,
    check_widths,
    cuts_v_alone,
    family_of,
    full_widths,
    value_layer,
)
from .parts import Bypass, BypassBlock, BypassEvaBlock, BypassSwinBlock, BypassSwinV2Block, parameters_of
from .slices import attention_slices, first_of_v, last_layer_slices, mlp_slices


class ElasticAttention(Attention):
    """timm's Attention at the first `width` dims of each head; at full width it is timm's own forward."""

    width: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """x: (B, N, D) -> (B, N, D)."""
        if self.width == self.head_dim:
            return super().forward(x, attn_mask=attn_mask, **kwargs)
        if any(kwargs.values()):
            raise NotImplementedError(f"a cut attention does not know {kwargs}")
        return _cut_attention(self, x, attn_mask)


class ElasticWindowAttention(WindowAttention):
    """timm's WindowAttention at the first `width` dims of each head; at full width it is timm's own forward."""

    width: int

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B windows, N, D) -> the same; mask (windows, N, N) is added to the scores."""
        if self.width == self.proj.in_features // self.num_heads:
            return super().forward(x, mask=mask)
        bias = self._get_rel_pos_bias()  # (1, H, N, N)
        if mask is not None:  # (windows, N, N); x holds the windows of an image next to each other
            images = x.shape[0] // mask.shape[0]
            bias = (bias + mask[:, None]).repeat(images, 1, 1, 1)  # (B windows, H, N, N)
        return _cut_attention(self, x, bias)


def _cut_attention(attn: nn.Module, x: Tensor, attn_mask: Tensor | None) -> Tensor:
    """x (B, N, D) -> (B, N, D) at attn.width dims of q, k and v of each head; attn_mask is added to the scores."""
    B, N, _ = x.shape
    H, w = attn.num_heads, attn.width
    weights = attention_slices(attn, w)
    qkv = F.linear(x, weights["qkv.weight"], weights.get("qkv.bias"))
    q, k, v = qkv.view(B, N, 3, H, w).permute(2, 0, 3, 1, 4)  # each (B, H, N, w)
    if attn.fused_attn:
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=attn.attn_drop.p if attn.training else 0.0
        )
    else:
        scores = (q * w**-0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        x = attn.attn_drop(scores.softmax(dim=-1)) @ v
    x = x.transpose(1, 2).reshape(B, N, H * w)
    return attn.proj_drop(F.linear(x, weights["proj.weight"], weights.get("proj.bias")))


class ElasticMlp(Mlp):
    """timm's Mlp at the first `width` hidden units; at full width it is timm's own forward."""

    width: int

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        if self.width == self.fc2.in_features:
            return super().forward(x)
        weights = mlp_slices(self, self.width)
        x = self.drop1(self.act(F.linear(x, weights["fc1.weight"], weights.get("fc1.bias"))))
        return self.drop2(F.linear(x, weights["fc2.weight"], weights.get("fc2.bias")))


class ElasticGluMlp(GluMlp):
    """timm's GluMlp at the first `width` hidden units and their gates."""

    width: int

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        if self.width == self.fc2.in_features:
            return super().forward(x)
        weights = mlp_slices(self, self.width)
        first, second = F.linear(x, weights["fc1.weight"], weights.get("fc1.bias")).chunk(2, dim=-1)
        x = self.drop1(first * self.act(second) if self.gate_last else self.act(first) * second)
        return self.drop2(F.linear(x, weights["fc2.weight"], weights.get("fc2.bias")))


class ElasticSwiGLU(SwiGLU):
    """timm's SwiGLU at the first `width` hidden units and their gates."""

    width: int

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        if self.width == self.fc2.in_features:
            return super().forward(x)
        weights = mlp_slices(self, self.width)
        gate, x = (F.linear(x, weights[f"{n}.weight"], weights.get(f"{n}.bias")) for n in ("fc1_g", "fc1_x"))
        x = self.drop1(self.act(gate) * x)
        return self.drop2(F.linear(x, weights["fc2.weight"], weights.get("fc2.bias")))


# ---------------------------------------------------------------------------------------------------------------------
# Attention of which v alone is cut: timm's own forward, between two layers that leave dims of v out.


class ValueLayer(nn.Linear):
    """Gives (q, k and) v where v has but `width` dims of each head; the others of head_dim are 0, so shapes stay."""

    num_heads: int
    head_dim: int
    width: int

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., others + H head_dim)."""
        return self.spread(super().forward(x))

    def spread(self, x: Tensor) -> Tensor:
        """(..., others + H width) -> (..., others + H head_dim)."""
        kept = self.num_heads * self.width
        others, v = x.split([x.shape[-1] - kept, kept], dim=-1)
        v = F.pad(v.unflatten(-1, (self.num_heads, self.width)), (0, self.head_dim - self.width))
        return torch.cat([others, v.flatten(-2)], dim=-1)


class ValueProjection(nn.Linear):
    """The output projection of an attention of which v has but `width` dims of each head: it reads those."""

    num_heads: int
    head_dim: int
    width: int

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., H head_dim) -> (..., D)."""
        return super().forward(self.kept(x))

    def kept(self, x: Tensor) -> Tensor:
        """(..., H head_dim) -> (..., H width)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))[..., : self.width].flatten(-2)


class ElasticValueLayer(ValueLayer):
    """One that slices the whole weights."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., others + H head_dim)."""
        if self.width == self.head_dim:
            return F.linear(x, self.weight, self.bias)
        size = self.num_heads, self.head_dim, self.width
        bias = None if self.bias is None else first_of_v(self.bias, *size)
        return self.spread(F.linear(x, first_of_v(self.weight, *size), bias))


class ElasticValueProjection(ValueProjection):
    """One that slices the whole weights."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., H head_dim) -> (..., D)."""
        if self.width == self.head_dim:
            return F.linear(x, self.weight, self.bias)
        weights = last_layer_slices("proj", self.branch[0], self.num_heads, self.width)
        return F.linear(self.kept(x), weights["proj.weight"], weights.get("proj.bias"))


def set_value_width(attn: nn.Module, width: int, head_dim: int) -> None:
    """Tells the two layers; and where timm adds biases beside a cut layer, it is to call that layer, not its weight."""
    for layer in (value_layer(attn), attn.proj):
        layer.num_heads, layer.head_dim, layer.width = attn.num_heads, head_dim, width
    if getattr(attn, "v_bias", None) is not None:
        attn.qkv_bias_separate = width < head_dim or getattr(attn, "bias_separate_when_whole", False)


class Elastic(Bypass):
    """Before timm's block in a class: its parameters always have a gradient, zero where a branch is bypassed."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x: (B, N, D), of a Swin (B, H, W, D) -> the same."""
        if self.bypassed and torch.is_grad_enabled():
            x = _ZeroGradients.apply(x, *self.bypassed_parameters())
        return super().forward(x, **kwargs)

    def bypassed_parameters(self) -> list[nn.Parameter]:
        """The parameters of the branches that add nothing now."""
        family = self.family
        return [p for kind in sorted(self.bypassed) for p in parameters_of(family, self, kind)]


class ElasticBlock(Elastic, BypassBlock):
    """A ViT's."""


class ElasticEvaBlock(Elastic, BypassEvaBlock):
    """An EVA's."""


class ElasticSwinBlock(Elastic, BypassSwinBlock):
    """A Swin's."""


class ElasticSwinV2Block(Elastic, BypassSwinV2Block):
    """A Swin v2's."""


BLOCKS = {
    Block: ElasticBlock,
    EvaBlock: ElasticEvaBlock,
    SwinTransformerBlock: ElasticSwinBlock,
    SwinTransformerV2Block: ElasticSwinV2Block,
}
ELASTIC = {
    Attention: ElasticAttention,
    WindowAttention: ElasticWindowAttention,
    Mlp: ElasticMlp,
    GluMlp: ElasticGluMlp,
    SwiGLU: ElasticSwiGLU,
}


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


def make_elastic(model: Backbone) -> Backbone:
    """Turns a backbone into a super-network, in place: same parameters, same state dict, full width until told."""
    family = family_of(model)
    for block in blocks_of(model):
        attn = block.attn
        block.__class__, block.family = BLOCKS[family.block], family
        block.mlp.__class__ = ELASTIC[type(block.mlp)]
        if cuts_v_alone(attn):
            value_layer(attn).__class__, attn.proj.__class__ = ElasticValueLayer, ElasticValueProjection
            attn.proj.branch = (attn,)  # in a tuple, so that it is no child of its own child
            attn.bias_separate_when_whole = getattr(attn, "qkv_bias_separate", False)
        else:
            attn.__class__ = ELASTIC[type(attn)]
    set_widths(model, full_widths(model))
    return model


def set_widths(model: Backbone, widths: dict[str, int]) -> None:
    """Makes a super-network run at `widths` from now on. Raises UserError for widths that do not fit it."""
    check_widths(model, widths)
    for index, block in enumerate(blocks_of(model)):
        attn, width = block.attn, widths[f"{index}.attn"]
        if cuts_v_alone(attn):
            set_value_width(attn, width, attn.proj.in_features // attn.num_heads)
        else:
            attn.width = width
        block.mlp.width = widths[f"{index}.mlp"]
        block.bypassed = frozenset(name for name in ("attn", "mlp") if not widths[f"{index}.{name}"])
