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

from .backbone import Backbone, check_widths, full_widths, value_layer
from .parts import attention_branch, mlp_branch
from .slices import attention_slices, first_of_v, last_layer_slices, mlp_slices
from .subnetwork import (
    ValueLayer,
    ValueProjection,
    blocks_of,
    branch_parameters,
    cuts_v_alone,
    set_value_width,
)


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
    weights = attention_slices(attn, w, fold_scale=False)
    scale = (attn.proj.in_features // H) ** -0.5  # that of the whole head dim
    qkv = F.linear(x, weights["qkv.weight"], weights.get("qkv.bias"))
    q, k, v = qkv.view(B, N, 3, H, w).permute(2, 0, 3, 1, 4)  # each (B, H, N, w)
    if attn.fused_attn:
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=attn.attn_drop.p if attn.training else 0.0, scale=scale
        )
    else:
        scores = (q * scale) @ k.transpose(-2, -1)  # (B, H, N, N)
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
# Attention of which v alone is cut


class ElasticValueLayer(ValueLayer):
    """A ValueLayer with whole weights, which it slices."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., rows of q and k + H head_dim)."""
        if self.width == self.head_dim:
            return F.linear(x, self.weight, self.bias)
        size = self.num_heads, self.head_dim, self.width
        bias = None if self.bias is None else first_of_v(self.bias, *size)
        return self.spread(F.linear(x, first_of_v(self.weight, *size), bias))


class ElasticValueProjection(ValueProjection):
    """A ValueProjection with whole weights, which it slices."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., H head_dim) -> (..., D)."""
        if self.width == self.head_dim:
            return F.linear(x, self.weight, self.bias)
        weights = last_layer_slices("proj", self.branch[0], self.num_heads, self.width)
        return F.linear(self.kept(x), weights["proj.weight"], weights.get("proj.bias"))


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class Switched:
    """Put before a block class of timm's: branches named in `bypassed` ("attn", "mlp") add nothing and cost nothing."""

    bypassed: frozenset[str] = frozenset()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x: (B, N, D), of a Swin (B, H, W, D) -> the same shape."""
        if not self.bypassed:
            return super().forward(x, **kwargs)
        if "attn" not in self.bypassed:
            x = x + attention_branch(self, x, **kwargs)
        if "mlp" not in self.bypassed:
            x = x + mlp_branch(self, x)
        return x


class Elastic(Switched):
    """A block in training: its parameters always have a gradient, which is zero where a branch is bypassed."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x: (B, N, D), of a Swin (B, H, W, D) -> the same shape."""
        if self.bypassed and torch.is_grad_enabled():
            x = _ZeroGradients.apply(x, *self.bypassed_parameters())
        return super().forward(x, **kwargs)

    def bypassed_parameters(self) -> list[nn.Parameter]:
        """The parameters of the branches that are bypassed now."""
        return [p for kind in sorted(self.bypassed) for p in branch_parameters(self, kind)]


class ElasticBlock(Elastic, Block):
    """timm's Block, elastic."""


class ElasticEvaBlock(Elastic, EvaBlock):
    """timm's EvaBlock, elastic."""


class ElasticSwinBlock(Elastic, SwinTransformerBlock):
    """timm's SwinTransformerBlock, elastic."""


class ElasticSwinV2Block(Elastic, SwinTransformerV2Block):
    """timm's SwinTransformerV2Block, elastic."""


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
    """Returns x, and gives the parameters a gradient of zero.

    DDP waits for a gradient of every parameter, and a bypassed branch has none. DDP's `find_unused_parameters=True`
    would search the graph at each step, which takes about as long on two CPU processes (benchmarks/ddp_bypass.py).
    With zeros, one process and many processes agree: a gradient outside the slice is zero and never missing, so the
    optimizer treats all parameters alike.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def make_elastic(model: Backbone) -> Backbone:
    """Makes a backbone run at any widths, in place: same parameters, same state dict; at full width to begin with."""
    for block in blocks_of(model):
        attn = block.attn
        block.__class__ = BLOCKS[type(block)]
        block.mlp.__class__ = ELASTIC[type(block.mlp)]
        if cuts_v_alone(attn):
            value_layer(attn).__class__, attn.proj.__class__ = ElasticValueLayer, ElasticValueProjection
            attn.proj.branch = (attn,)  # in a tuple, so that PyTorch does not take it for a child module
            attn.bias_separate_when_whole = getattr(attn, "qkv_bias_separate", False)
        else:
            attn.__class__ = ELASTIC[type(attn)]
    set_widths(model, full_widths(model))
    return model


def make_plain(model: Backbone) -> None:
    """Undoes make_elastic(), in place, and takes compensation away; does nothing to a model that has neither."""
    stock = {elastic: plain for plain, elastic in (BLOCKS | ELASTIC).items()}
    for block in blocks_of(model):
        was_elastic = isinstance(block, Elastic)
        for module in (block, getattr(block, "attn", None), getattr(block, "mlp", None)):
            if module is None:
                continue
            module._modules.pop("compensation", None)
            if type(module) in stock:
                module.__class__ = stock[type(module)]
                _forget(module, "bypassed", "width")
        if was_elastic and cuts_v_alone(block.attn):
            for layer in (value_layer(block.attn), block.attn.proj):
                layer.__class__ = nn.Linear
                _forget(layer, "num_heads", "head_dim", "width", "branch")
            if hasattr(block.attn, "qkv_bias_separate"):
                block.attn.qkv_bias_separate = block.attn.bias_separate_when_whole
            _forget(block.attn, "bias_separate_when_whole")


def _forget(module: nn.Module, *names: str) -> None:
    for name in names:
        module.__dict__.pop(name, None)


def set_widths(model: Backbone, widths: dict[str, int]) -> None:
    """Makes an elastic model run at `widths` from now on. Raises UserError for widths that do not fit it."""
    check_widths(model, widths)
    for index, block in enumerate(blocks_of(model)):
        attn, width = block.attn, widths[f"{index}.attn"]
        if cuts_v_alone(attn):
            set_value_width(attn, width, attn.proj.in_features // attn.num_heads)
        else:
            attn.width = width
        block.mlp.width = widths[f"{index}.mlp"]
        block.bypassed = frozenset(name for name in ("attn", "mlp") if not widths[f"{index}.{name}"])
