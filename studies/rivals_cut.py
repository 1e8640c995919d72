"""Statistics of the layers of a plain ViT, and cutting its units, heads, and dims of q and k.

B images, N tokens, D embedding, H heads, d dims per head, M hidden units, n inputs of a layer. Everything here works on
a VisionTransformer of timm whose attention and MLPs are timm's own, in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from models.parts import embed
from models.subnetwork import cuts_v_alone
from utils import UserError
from wpac.compensation import COLUMN_CHUNK, Compensation
from wpac.transform import permute_mlp


class Collector(Protocol):
    """Takes the inputs (B, N, n) and outputs (B, N, m) of a layer, batch by batch."""

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Adds a batch."""


class InputMoments:
    """First and second moments of the inputs of a layer, each token alike; sums in float64.

    mean (n,), second (n, n): of x and x x^T.  tokens: their number.  active (n,): the share of tokens at which
    |x| exceeds `threshold` times the root mean square of all inputs of the batch.
    """

    def __init__(self, layer: nn.Linear, threshold: float = 0.0):
        n, device = layer.in_features, layer.weight.device
        self.threshold, self.tokens = threshold, 0
        self._second = torch.zeros(n, n, dtype=torch.float64, device=device)
        self._first, self._active = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(2))

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Adds the inputs (B, N, n) of a batch."""
        x = inputs.flatten(0, -2)
        for start in range(0, x.shape[1], COLUMN_CHUNK):  # symmetric: half of the products do
            columns = slice(start, start + COLUMN_CHUNK)
            self._second[columns, start:] += x[:, columns].mT @ x[:, start:]
        self._first += x.sum(0, dtype=torch.float64)
        self._active += (x.abs() > self.threshold * x.square().mean().sqrt()).sum(0)
        self.tokens += len(x)

    @property
    def mean(self) -> Tensor:
        return self._first / self.tokens

    @property
    def active(self) -> Tensor:
        return self._active / self.tokens

    @property
    def second(self) -> Tensor:
        upper = self._second.triu()
        return (upper + upper.triu(1).mT) / self.tokens

    @property
    def covariance(self) -> Tensor:
        return self.second - torch.outer(self.mean, self.mean)


@contextlib.contextmanager
def watched(collectors: dict[nn.Module, Collector]) -> Iterator[None]:
    """Context manager in which each collector is updated whenever its layer runs."""

    def hook_of(collector: Collector) -> Callable:
        return lambda _layer, inputs, outputs: collector.update(inputs[0], outputs)

    hooks = [layer.register_forward_hook(hook_of(collector)) for layer, collector in collectors.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def cut_in_order(
    model: VisionTransformer,
    images: Iterable[Tensor],
    watch: Callable[[Block], dict[nn.Module, Collector]],
    cut: Callable[[int, Block, list[Collector]], None],
    sequential: bool = True,
) -> VisionTransformer:
    """Cuts the blocks of the model one after another, each with statistics on its own layers; returns the model.

    images: batches (B, C, height, width); their residual streams are kept in memory.  watch: gives the collectors of a
    block.  cut: cuts a block, given its index and what its collectors collected, in the order of watch().
    sequential: whether a block gets the stream of the blocks that were cut before it, or that of the whole network.
    """
    streams = [embed(model, batch) for batch in images]
    for index, block in enumerate(model.blocks):
        collectors = watch(block)
        with watched(collectors):
            for place, stream in enumerate(streams):
                output = block(stream)
                if not sequential:
                    streams[place] = output
        cut(index, block, list(collectors.values()))
        if sequential:
            streams = [block(stream) for stream in streams]
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Cutting


def check_plain(model: VisionTransformer) -> None:
    """Raises UserError unless the model is a plain VisionTransformer with biases and without norms of q and k."""
    plain = type(model) is VisionTransformer and all(
        (type(block), type(block.attn), type(block.mlp)) == (Block, Attention, Mlp)
        and not cuts_v_alone(block.attn)
        and None not in (block.attn.proj.bias, block.mlp.fc2.bias)
        for block in model.blocks
    )
    if not plain:
        raise UserError(
            f"this {type(model).__name__} is not supported: the rivals need timm's VisionTransformer with biases, "
            "ordinary MLPs, and no norm of q and k"
        )


@torch.no_grad()
def keep_units(mlp: Mlp, order: Tensor, kept: int, compensation: Compensation | None = None) -> None:
    """Keeps the first `kept` hidden units of the order (M,) and removes the others.

    compensation: makes fc2 predict what is removed; its inputs are in that order.
    """
    permute_mlp(mlp, order)
    weight, bias = _cut_last(mlp.fc2, kept, compensation)
    mlp.fc1 = linear(mlp.fc1.weight[:kept], None if mlp.fc1.bias is None else mlp.fc1.bias[:kept])
    mlp.fc2 = linear(weight, bias)


@torch.no_grad()
def keep_heads(attn: Attention, order: Tensor, kept: int, compensation: Compensation | None = None) -> None:
    """Keeps the first `kept` heads of the order (H,) and removes the others.

    compensation: makes proj predict what is removed; its inputs are those of the heads in that order.
    """
    H, d = attn.num_heads, attn.head_dim
    attn.proj.weight.copy_(attn.proj.weight.unflatten(1, (H, d))[:, order].flatten(1))
    weight, bias = _cut_last(attn.proj, kept * d, compensation)
    rows = [None if p is None else p.unflatten(0, (3, H, d))[:, order[:kept]] for p in (attn.qkv.weight, attn.qkv.bias)]
    attn.qkv = linear(*(None if part is None else part.flatten(0, 2) for part in rows))
    attn.proj = linear(weight, bias)
    attn.num_heads, attn.attn_dim = kept, kept * d


class NarrowAttention(Attention):
    """timm's Attention with qk_dim dims of q and k per head, and head_dim of v; scores keep the scale of head_dim."""

    qk_dim: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **_unused: object) -> Tensor:
        """x: (B, N, D) -> (B, N, D)."""
        narrow = self.num_heads * self.qk_dim
        parts = self.qkv(x).split([narrow, narrow, self.attn_dim], dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)  # (B, H, N, dims)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=self.head_dim**-0.5)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


@torch.no_grad()
def narrow_query_key(attn: Attention, maps: Tensor) -> None:
    """Replaces q and k of each head by linear maps of themselves, and makes the attention a NarrowAttention.

    maps: (2, H, w, d), to w dims of q and of k.
    """
    H, d, w = attn.num_heads, attn.head_dim, maps.shape[2]

    def mapped(parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        qk, v = parameter.split([2 * H * d, H * d])
        qk = maps @ qk.to(maps.dtype).view(2, H, d, -1)
        return torch.cat([qk.to(v.dtype).reshape(2 * H * w, *parameter.shape[1:]), v])

    attn.qkv = linear(mapped(attn.qkv.weight), mapped(attn.qkv.bias))
    attn.__class__, attn.qk_dim = NarrowAttention, w


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of weight (m, n) and bias (m,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone().contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _cut_last(layer: nn.Linear, kept: int, compensation: Compensation | None) -> tuple[Tensor, Tensor]:
    if compensation is None:
        return layer.weight[:, :kept], layer.bias
    return compensation(layer.weight, layer.bias, kept)
