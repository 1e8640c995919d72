"""The ends of a branch of any family: what its first layers get, what its last layer gets and gives, and in what order.

B images, N tokens, D embedding, n inputs of the last layer. A Swin arranges its N tokens as (H, W), its attention in
windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone, blocks_of, first_layers, last_layer
from models.subnetwork import ValueProjection

from .compensation import UNIFORM_SHARE

Replaced = list[tuple[nn.Module, str, nn.Parameter]]  # module, name, and the parameter before


class Rows(NamedTuple):
    """Rows of a layer's weight, and the parameter of a module of which the entries `places` are their biases."""

    layer: nn.Linear
    rows: slice
    module: nn.Module | None = None
    bias: str = "bias"
    places: Tensor | slice = slice(None)


class Branch:
    """One branch of a block: norm, first layers, ..., last layer, and what follows it up to the residual stream."""

    def __init__(self, model: Backbone, key: str, run: Callable[[Tensor], Tensor]):
        index, self.kind = key.split(".")
        self.block, self.run = blocks_of(model)[int(index)], run
        self.module = getattr(self.block, self.kind)
        self.last = last_layer(self.block, self.kind)
        norm = self.block.norm1 if self.kind == "attn" else self.block.norm2
        # Swin v2 has its norm after the last layer instead.
        self.norm, self.norm_after = (None, norm) if isinstance(self.block, SwinTransformerV2Block) else (norm, None)

    def inputs(self, x: Tensor) -> Tensor:
        """The inputs of the first layers: (..., D) -> (B, N, D)."""
        return tokens_of(x if self.norm is None else self.norm(x))

    def scale(self) -> Tensor:
        """What multiplies the last layer's output, (D,): LayerScale, or the weight of the norm after that layer."""
        if self.norm_after is not None:
            return self.norm_after.weight.double()
        number = "1" if self.kind == "attn" else "2"
        scale = getattr(self.block, f"gamma_{number}", None)
        scale = getattr(getattr(self.block, f"ls{number}", None), "gamma", scale)
        return self.last.weight.new_ones(self.last.out_features).double() if scale is None else scale.double()

    def finish(self, x: Tensor) -> Tensor:
        """What the branch adds to the stream, from the inputs of its last layer: (B, N, n) -> (B, N, D)."""
        y = F.linear(x, self.last.weight, self.last.bias)
        return self.norm_after(y) if self.norm_after is not None else y * self.scale().to(y.dtype)

    def order(self, x: Tensor) -> Tensor:
        """Where the last layer has the tokens of the stream, (N,); other than 0..N-1 in the windows of a Swin.

        x: a batch of the stream.
        """
        tokens = tokens_of(x).shape[1]
        if self.kind != "attn" or not isinstance(self.block, SwinTransformerBlock | SwinTransformerV2Block):
            return torch.arange(tokens, device=x.device)

        def number(_module: object, _inputs: object, output: Tensor) -> Tensor:
            places = torch.arange(output[..., 0].numel(), device=x.device, dtype=torch.float64)
            return places.view(*output.shape[:-1], 1).expand_as(output)

        hook = self.last.register_forward_hook(number)
        places = self.block._attn(torch.zeros_like(x[:1]))
        hook.remove()
        return places[..., 0].flatten().long()

    @contextmanager
    def watched(self) -> Iterator[dict[str, Tensor]]:
        """A context in which running the branch leaves the inputs of its last layer as "x", (..., n)."""
        seen: dict[str, Tensor] = {}

        def watch(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
            seen["x"] = layer.kept(inputs[0]) if isinstance(layer, ValueProjection) else inputs[0]
            seen["y"] = output

        hook = self.last.register_forward_hook(watch)
        yield seen
        hook.remove()

    def token_weights(self, order: Tensor) -> Tensor:
        """Weights (N,) of the tokens: as in the statistics if the module is compensated, else equal."""
        compensation = getattr(self.module, "compensation", None)
        if compensation is None:
            return torch.ones(len(order), dtype=torch.float64, device=order.device)
        positions = compensation.positions.double()  # of a Swin's attention: of the tokens of a window
        return UNIFORM_SHARE + (1 - UNIFORM_SHARE) * positions[order % len(positions)]

    def first(self) -> list[Rows]:
        """The rows of the first layers."""
        attn = self.module
        if getattr(attn, "q_bias", None) is None:
            names = ("qkv",) if getattr(attn, "qkv", None) is not None else ("q_proj", "k_proj", "v_proj")
            layers = [getattr(attn, name) for name in names] if self.kind == "attn" else first_layers(attn).values()
            return [Rows(layer, slice(None), layer if layer.bias is not None else None, "bias") for layer in layers]
        # timm keeps the biases of q and v beside the layer, that of v at its full width.
        count, width = len(attn.q_bias), attn.proj.in_features // attn.num_heads
        kept = torch.arange(len(attn.v_bias), device=attn.v_bias.device).unflatten(0, (attn.num_heads, -1))[:, :width]
        return [
            Rows(attn.qkv, slice(0, count), attn, "q_bias"),
            Rows(attn.qkv, slice(count, 2 * count)),
            Rows(attn.qkv, slice(2 * count, None), attn, "v_bias", kept.flatten()),
        ]


def spread(y: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Mean and deviation (B, N, 1) by which a LayerNorm normalises y (B, N, D)."""
    return y.mean(-1, keepdim=True), (y.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()


def tokens_of(x: Tensor) -> Tensor:
    """(B, N, D) or (B, H, W, D) -> (B, N, D)."""
    return x.flatten(1, -2)


def in_order(x: Tensor, order: Tensor, images: int) -> Tensor:
    """What the last layer has of `images` images, in windows or not, as (images, N, n) in the order of the stream."""
    x = x.reshape(images, -1, x.shape[-1])
    return x if x.shape[1] == len(order) and (order.diff() == 1).all() else x[:, order]


def replaced_by(module: nn.Module, name: str, value: Tensor) -> tuple[nn.Module, str, nn.Parameter]:
    """Gives the module a new parameter, since the old one may be the whole network's; returns the old one."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype), old.requires_grad))
    return module, name, old
