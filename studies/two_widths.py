"""Sub-networks with one width for q and k and another for v, which mask tables and extraction do not have.

Such a network is made as a plain one with the larger of both widths, in which the dims that were cut are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.backbone import Backbone, blocks_of
from models.extraction import extract


def parted(widths: dict[str, int], share: float, full: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Widths for q and k, `share` times those given, and widths for v that together have as many MACs."""
    attention = [key for key in widths if key.endswith(".attn")]
    qk = {key: min(max(round(widths[key] * share), 1), full[key]) for key in attention}
    v = {key: min(max(2 * widths[key] - qk[key], 1), full[key]) for key in attention}
    return widths | qk, widths | v


@torch.no_grad()
def extract_parted(model: Backbone, qk: dict[str, int], v: dict[str, int]) -> Backbone:
    """The sub-network of a plain ViT with the widths `qk` for q and k, and `v` for v and everything else."""
    larger = extract(model, {key: max(qk[key], width) for key, width in v.items()})
    for blocks in zip(*map(blocks_of, (larger, extract(model, qk), extract(model, v))), strict=True):
        result, from_qk, from_v = (block.attn for block in blocks)
        heads, width = result.num_heads, result.head_dim
        for name in ("weight", "bias"):
            q_and_k, values = (_padded(getattr(attn.qkv, name), heads, width) for attn in (from_qk, from_v))
            q_and_k[0] *= from_qk.scale / result.scale  # of the scores
            getattr(result.qkv, name).copy_(torch.cat([q_and_k[:2], values[2:]]).flatten(0, 2))
        kept = from_v.proj.weight.unflatten(1, (heads, -1))
        padded = torch.cat([kept, kept.new_zeros(*kept.shape[:2], width - kept.shape[2])], 2)
        result.proj.weight.copy_(padded.flatten(1))
        result.proj.bias.copy_(from_v.proj.bias)
    return larger


def _padded(rows: Tensor, heads: int, width: int) -> Tensor:
    """(3 H w, ...) -> (3, H, width, ...), filled with zeros."""
    rows = rows.unflatten(0, (3, heads, -1))
    return torch.cat([rows, rows.new_zeros(3, heads, width - rows.shape[2], *rows.shape[3:])], 2)
