"""Super-networks whose sizes are prefixes of the same weights, trained by other rules: Scala's and MatFormer's.

Zhang et al.: Slicing Vision Transformer for Flexible Inference, NeurIPS 2024 (Scala): each step trains the whole
network, the smallest, and one from each half of the sizes between; each learns from the next larger one. Here all
modules keep the same share of their dims; the embedding is not cut, and the smallest size is a prefix like the others.
Devvrit et al.: MatFormer: Nested Transformer for Elastic Inference, NeurIPS 2024: four nested widths of the MLPs, of
which each step trains one; attention stays whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.backbone import full_widths
from models.elastic import set_widths
from models.macs import count_macs
from piad.distillation import divergence
from piad.sampling import generator_of
from studies.rivals_methods import kept_widths
from training import Training

Widths = dict[str, int]
STEPS = 32  # of the sizes between the whole network and the smallest


def uniform_sizes(model: VisionTransformer, smallest: float) -> list[Widths]:
    """Widths from the whole network to one within a share of its MACs; all modules keep the same share of theirs."""
    sizes, limit = [full_widths(model)], smallest * count_macs(model)
    for step in range(1, STEPS + 1):
        sizes.append(kept_widths(model, step / STEPS))
        if count_macs(model, sizes[-1]) <= limit:
            break
    return sizes


def matformer_sizes(model: VisionTransformer) -> list[Widths]:
    """The whole network, and its MLPs at 1/2, 1/4 and 1/8 of their hidden units."""
    whole = full_widths(model)
    return [{key: width // part if key.endswith("mlp") else width for key, width in whole.items()}
            for part in (1, 2, 4, 8)]  # fmt: skip


class NestedRule:
    """What each step trains: sizes of a list, from large to small.

    model: elastic, see models.elastic.make_elastic().
    """

    sizes_per_step = 1

    def __init__(self, model: VisionTransformer, sizes: list[Widths], seed: int):
        self.model, self.sizes, self.seed = model, sizes, seed

    def begin_epoch(self, epoch: int) -> None:
        """Does nothing: the sizes stay as they are."""

    def choose(self, *, epoch: int, step: int, rank: int, number: int = 0) -> int:
        """Sets the model to the size with this number in the step; returns its place in the list."""
        place = self.place(generator_of(self.seed, epoch, step, 0, number), number)
        set_widths(self.model, self.sizes[place])
        return place

    def place(self, generator: np.random.Generator, number: int) -> int:
        return int(generator.integers(len(self.sizes)))

    def step_scalars(self) -> dict[str, float]:
        return {}


class ScalaRule(NestedRule):
    """The whole network, one size of the larger half, one of the smaller half, and the smallest, in this order."""

    sizes_per_step = 4

    def place(self, generator: np.random.Generator, number: int) -> int:
        last = len(self.sizes) - 1
        middle = max(1, len(self.sizes) // 2)
        low, high = [(0, 1), (1, middle), (middle, last), (last, last + 1)][number]
        return int(generator.integers(low, max(high, low + 1)))


@dataclass
class Ladder(Training):
    """The first size of a step learns as in Training; each after it from the one before and from the labels.

    taught_by_larger: the share of the loss that comes from the larger size.
    """

    taught_by_larger: float = 0.5
    larger: Tensor | None = None

    def expected(self, images: Tensor) -> dict[str, Tensor] | None:
        """Of the teacher; called once for each batch, before its sizes run."""
        self.larger = None
        return super().expected(images)

    def loss(self, images: Tensor, targets: Tensor, expected: dict[str, Tensor] | None) -> Tensor:
        """See Training.loss()."""
        with self.autocast():
            outputs = self.runner(images)
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs
            if self.larger is not None:
                share = self.taught_by_larger
                loss = share * divergence(logits, self.larger, 1.0) + (1 - share) * self.loss_fn(logits, targets)
            elif self.distillation is not None:
                loss = self.distillation(self.loss_fn, outputs, expected, targets)
            else:
                loss = self.loss_fn(logits, targets)
        self.larger = logits.detach()
        return loss
