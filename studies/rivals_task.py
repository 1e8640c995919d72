"""What a compression method is given and what it gives: tasks, sizes, and how MACs are counted on the way."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.backbone import modules_of
from models.macs import count_macs, macs_per_dim
from studies.common import Batches
from supernet import Network

LINEAR = (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.convolution)
KINDS = ("mlp", "qk", "heads")


@dataclass(frozen=True)
class Size:
    """How small a network is to be.

    macs: the share of the whole network's MACs that it may have; or None, and then mlp, qk and heads are the shares
    that are removed: of the hidden units, of the dims of q and k alone, and of the heads. A method that cuts all heads
    to fewer dims removes that share of their dims instead, which saves the same MACs.
    """

    macs: float | None = None
    mlp: float = 0.0
    qk: float = 0.0
    heads: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Size:
        """A size of its name: "0.25" is a share of the MACs, "mlp61+qk60" are removed percentages.

        Raises ValueError for a text that is neither.
        """
        parts = [re.fullmatch(rf"({'|'.join(KINDS)})(\d\d?)", part) for part in text.split("+")]
        if all(parts):
            return cls(**{part[1]: int(part[2]) / 100 for part in parts})
        macs = float(text)
        if not 0 < macs <= 1:
            raise ValueError(f"{text} is not a share of the MACs")
        return cls(macs=macs)


@dataclass
class Task:
    """What a method works with.

    network: the whole network, which methods copy; its target says what is to be kept.  batches: images (B, C, height,
    width) and labels (B,).  seed: of what a method draws at random.  searches: name -> what a search found, in plain
    values, which may come from an earlier run.  borrowed: seconds of work that was done for another method before.
    """

    network: Network
    batches: Batches
    seed: int = 0
    searches: dict[str, dict[str, Any]] = field(default_factory=dict)
    borrowed: float = 0.0
    _shared: dict[str, tuple[Any, float]] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> VisionTransformer:
        return self.network.model

    @property
    def images(self) -> list[Tensor]:
        return [images for images, _ in self.batches]

    def shared(self, name: str, make: Callable[[], Any]) -> Any:
        """What make() gives; it is called once, and what it took counts as borrowed for whoever asks again."""
        if name in self._shared:
            self.borrowed += self._shared[name][1]
        else:
            before, start = self.borrowed, time.process_time()
            made = make()
            self._shared[name] = made, time.process_time() - start + self.borrowed - before
        return self._shared[name][0]


# The network of a size, or None where the method has no such size.
Cutter = Callable[[Size], VisionTransformer | None]


# ---------------------------------------------------------------------------------------------------------------------
# MACs


@torch.no_grad()
def macs_of(model: VisionTransformer) -> int:
    """MACs per image of linear layers and the patch embedding, counted while the model runs: of any cut network."""
    parameter = next(model.parameters())
    image = parameter.new_zeros(1, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    with FlopCounterMode(display=False) as counter:
        model(image)
    return sum(flops for kind, flops in counter.get_flop_counts()["Global"].items() if kind in LINEAR) // 2


def macs_without(model: VisionTransformer, units: int = 0, qk: int = 0, heads: int = 0) -> int:
    """MACs per image of the whole network without these numbers, each summed over all blocks.

    units: of hidden units.  qk: of dims of q and k, one in each head of a block.  heads: of heads.
    """
    modules = modules_of(model)
    unit, dim = macs_per_dim(modules["0.mlp"]), macs_per_dim(modules["0.attn"])
    head = modules["0.attn"].width * dim // modules["0.attn"].heads
    return count_macs(model) - units * unit - qk * dim // 2 - heads * head


def smallest_cut(macs: Callable[[float], int], limit: float) -> float | None:
    """The smallest share x in 0..1 that leaves at most `limit` MACs, found by bisection.

    macs: the MACs that are left without a share; they fall as it grows. Returns None where all of it is not enough.
    """
    if macs(1.0) > limit:
        return None
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if macs(middle) <= limit else (middle, high)
    return high
