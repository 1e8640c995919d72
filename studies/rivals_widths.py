"""Super-networks whose sizes are prefixes of the same weights, trained by other rules: Scala's and MatFormer's.

Zhang et al.: Slicing Vision Transformer for Flexible Inference, NeurIPS 2024 (Scala): each step trains the whole
network, the smallest, and one size from each half between them; each size learns from the next larger one and from the
labels. Here all modules keep the same share of their dims, the embedding is not cut, the smallest size is a prefix like
the others, the two losses have equal weight, and all four sizes are trained from the first epoch on.
Devvrit et al.: MatFormer: Nested Transformer for Elastic Inference, NeurIPS 2024: four nested widths of the MLPs, of
which each step trains one; attention stays whole. Other sizes mix these widths, with wider MLPs in later blocks. The
paper trains from scratch and without a teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.backbone import full_widths
from models.macs import count_macs
from piad.distillation import divergence
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout
from piad.sampling import generator_of
from studies.rivals_methods import kept_widths
from training import Training

STEPS = 32  # of the widths of Scala's sizes
NESTED = (1, 2, 4, 8)  # MatFormer's MLPs have the whole of their hidden units, divided by these


def uniform_sizes(model: VisionTransformer, smallest: float) -> MaskTable:
    """From the whole network to one within a share of its MACs; all modules keep the same share of their widths."""
    sizes, limit = [full_widths(model)], smallest * count_macs(model)
    for step in range(1, STEPS + 1):
        sizes.append(kept_widths(model, step / STEPS))
        if count_macs(model, sizes[-1]) <= limit:
            break
    return MaskTable(sizes)


def matformer_sizes(model: VisionTransformer) -> MaskTable:
    """The whole network, and its MLPs at 1/2, 1/4 and 1/8 of their hidden units: what MatFormer trains."""
    return MaskTable(mixed_sizes(model).rows[:: len(model.blocks)])


def mixed_sizes(model: VisionTransformer) -> MaskTable:
    """MatFormer's sizes and those between them, at which some of the first blocks have the next smaller MLPs."""
    sizes = [full_widths(model)]
    for part in NESTED[1:]:
        for index in range(len(model.blocks)):
            key = f"{index}.mlp"
            sizes.append(sizes[-1] | {key: sizes[0][key] // part})
    return MaskTable(sizes)


class ScalaRule(ProgressiveDropout):
    """A step trains the whole network, one of the larger sizes, one of the smaller sizes, and the smallest.

    They come in this order, which Ladder needs.
    """

    def choose(self, *, epoch: int, step: int, rank: int, number: int = 0) -> int:
        """Sets the model to the size with this number in the step; returns its op code."""
        last = len(self.table) - 1
        middle = max(1, len(self.table) // 2)
        low, high = [(0, 1), (1, middle), (middle, last), (last, last + 1)][number]
        op_code = int(generator_of(self.seed, epoch, step, 0, number).integers(low, max(high, low + 1)))
        self.run_at(self.table.widths(op_code), number)
        return op_code


@dataclass
class Ladder(Training):
    """The first size of a step has the loss of Training; each other size learns from the one before it and from labels.

    taught_by_larger: the share of the loss that comes from the larger size.
    """

    taught_by_larger: float = 0.5
    larger: Tensor | None = None

    def expected(self, images: Tensor) -> dict[str, Tensor] | None:
        """Forgets the sizes of the last batch; returns what the teacher gives for the images of the next one."""
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
