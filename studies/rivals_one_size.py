"""One size at a time: pruning that is learned in training (WDPruning), and linear units that fold away (RePaViT).

Yu et al.: Width & Depth Pruning for Vision Transformers, AAAI 2022: every head and hidden unit has a score that is
trained, and takes part where it exceeds a threshold, which is trained too; gradients pass through that step as if it
were not there. Here there are no classifiers at lower depths and one threshold for all heads and one for all units
(the paper: one per layer); the scores start in the order of Taylor importance, and the MACs are held by their squared
distance from the goal (the paper: by an augmented Lagrangian). What the thresholds leave is then brought to the size
exactly, and trained on.
Xu et al.: RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization on Feedforward Network
Layers, ICML 2025: a share of the hidden units has no activation, so that after training they fold into one D x D
matrix. The paper trains from scratch with batch norm, which lets the matrix merge further. Here a pre-trained network
keeps its LayerNorm, its least important units are the idle ones, and their share follows from the MACs.

B images, N tokens, D embedding, M hidden units, H heads.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.backbone import full_widths, modules_of
from models.extraction import extract
from models.macs import count_macs
from studies.rivals_cut import keep_heads, keep_units, linear
from studies.rivals_task import macs_without, smallest_cut
from training import Training

# ---------------------------------------------------------------------------------------------------------------------
# RePaViT


class IdleMlp(Mlp):
    """timm's Mlp whose last hidden units, from `active` on, have no activation."""

    active: int

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, N, D)."""
        hidden = self.fc1(x)
        hidden = torch.cat([self.act(hidden[..., : self.active]), hidden[..., self.active :]], -1)
        return self.fc2(self.drop1(hidden))


class FoldedMlp(nn.Module):
    """An Mlp of the active units alone, and a D x D matrix in place of the others."""

    def __init__(self, mlp: IdleMlp):
        super().__init__()
        first, last, active = mlp.fc1, mlp.fc2, mlp.active
        self.linear = linear(last.weight[:, active:] @ first.weight[active:], None)
        bias = last.bias + last.weight[:, active:] @ first.bias[active:]
        self.fc1, self.act = linear(first.weight[:active], first.bias[:active]), mlp.act
        self.fc2 = linear(last.weight[:, :active], bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, N, D)."""
        return self.fc2(self.act(self.fc1(x))) + self.linear(x)


def idle_share(model: VisionTransformer, share: float) -> float | None:
    """The smallest share of idle units whose folded network has at most a share of the MACs; None where none has."""
    matrices = len(model.blocks) * modules_of(model)["0.mlp"].tokens * model.embed_dim**2  # MACs of all D x D

    def macs(idle: float) -> int:
        units = sum(block.mlp.fc2.in_features - active_units(block.mlp, idle) for block in model.blocks)
        return macs_without(model, units=units) + (matrices if idle else 0)

    return smallest_cut(macs, share * count_macs(model))


def active_units(mlp: Mlp, idle: float) -> int:
    return mlp.fc2.in_features - int(idle * mlp.fc2.in_features)


def with_idle(model: VisionTransformer, idle: float) -> VisionTransformer:
    """Makes the last hidden units of each MLP idle, in place."""
    for block in model.blocks:
        block.mlp.active = active_units(block.mlp, idle)
        block.mlp.__class__ = IdleMlp
    return model


@torch.no_grad()
def folded(model: VisionTransformer) -> VisionTransformer:
    """A copy with folded MLPs; its outputs are the same."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        if block.mlp.active < block.mlp.fc2.in_features:
            block.mlp = FoldedMlp(block.mlp)
        else:
            block.mlp.__class__ = Mlp
    return model


# ---------------------------------------------------------------------------------------------------------------------
# WDPruning


RATE = 10  # how many times faster than the weights the scores and thresholds move: Adam moves all values alike


def mask_of(scores: Tensor, threshold: Tensor) -> Tensor:
    """1 for the parts whose score is above the threshold, else 0, with the gradient of the difference times RATE."""
    above = RATE * (scores - threshold)
    return (above > 0).to(above) + (above - above.detach())


class Gated(nn.Module):
    """A ViT whose heads and hidden units are masked by scores and thresholds.

    importance: kind ("heads", "units") -> (L, parts). The scores start as its ranks among all blocks, in 0..1 / RATE.
    """

    def __init__(self, model: VisionTransformer, importance: dict[str, Tensor]):
        super().__init__()
        self.model, self.scores, self.thresholds = model, nn.ParameterDict(), nn.ParameterDict()
        for kind, values in importance.items():
            ranks = values.flatten().argsort().argsort().view_as(values).to(next(model.parameters())) + 1
            self.scores[kind] = nn.Parameter(ranks / values.numel() / RATE)
            self.thresholds[kind] = nn.Parameter(torch.zeros_like(ranks[:1, 0]))

    def no_weight_decay(self) -> set[str]:
        """The names of parameters that the optimizer does not decay, besides those of one dimension; timm asks."""
        return {f"model.{name}" for name in self.model.no_weight_decay()} | {f"scores.{kind}" for kind in self.scores}

    def masks(self, kind: str) -> Tensor:
        """The masks (L, parts) of all blocks."""
        return mask_of(self.scores[kind], self.thresholds[kind])

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, height, width) -> logits (B, classes)."""
        hooks = []
        for block, heads, units in zip(self.model.blocks, self.masks("heads"), self.masks("units"), strict=True):
            for layer, mask in ((block.attn.proj, heads), (block.mlp.fc2, units)):
                hooks.append(layer.register_forward_pre_hook(lambda _layer, x, mask=mask: (gated(x[0], mask),)))
        try:
            return self.model(images)
        finally:
            for hook in hooks:
                hook.remove()


def gated(x: Tensor, mask: Tensor) -> Tensor:
    """Inputs (B, N, n) of a last layer, times a mask (parts,), each for n / parts neighbours."""
    return x * mask.repeat_interleave(x.shape[-1] // len(mask))


@dataclass
class Thresholds(Training):
    """Adds to the loss how far the MACs are from a share of the whole network's: weight * difference^2.

    shares: kind -> share of the whole network's MACs that its parts have.
    """

    share: float = 1.0
    shares: dict[str, float] = field(default_factory=dict)
    weight: float = 10.0

    def loss(self, images: Tensor, targets: Tensor, expected: dict[str, Tensor] | None) -> Tensor:
        """See Training.loss()."""
        macs = 1 - sum(part * (1 - self.model.masks(kind).mean()) for kind, part in self.shares.items())
        return super().loss(images, targets, expected) + self.weight * (macs - self.share) ** 2


def shares_of(model: VisionTransformer) -> dict[str, float]:
    """kind -> share of the MACs of the model that its heads, or its hidden units, have."""
    heads = sum(block.attn.num_heads for block in model.blocks)
    units = sum(block.mlp.fc2.in_features for block in model.blocks)
    whole = count_macs(model)
    return {
        "heads": 1 - macs_without(model, heads=heads) / whole,
        "units": 1 - macs_without(model, units=units) / whole,
    }


@torch.no_grad()
def pruned(gated_model: Gated, share: float) -> VisionTransformer | None:
    """A plain copy without the heads and units that are furthest below their thresholds, within a share of the MACs.

    A branch that loses all of them is bypassed. None where all that can leave is not enough.
    """
    model, whole = gated_model.model, count_macs(gated_model.model)
    above = {kind: gated_model.scores[kind] - gated_model.thresholds[kind] for kind in gated_model.scores}
    order = torch.cat([values.flatten() for values in above.values()]).sort().values

    def kept(removed: float) -> dict[str, Tensor]:
        """Kind -> how many parts of each block stay, (L,)."""
        number = int(removed * len(order))
        lowest = order[number] if number < len(order) else torch.inf
        return {kind: (values >= lowest).sum(1) for kind, values in above.items()}

    def macs(removed: float) -> int:
        gone = {kind: above[kind].numel() - int(counts.sum()) for kind, counts in kept(removed).items()}
        return macs_without(model, **gone)

    removed = smallest_cut(macs, share * whole)
    return None if removed is None else without_parts(model, above, kept(removed))


def without_parts(model: VisionTransformer, scores: dict[str, Tensor], kept: dict[str, Tensor]) -> VisionTransformer:
    """A copy whose blocks keep the heads and units of the highest scores (L, parts), as many as `kept` (L,) says."""
    widths = full_widths(model)
    for kind, branch in (("heads", "attn"), ("units", "mlp")):
        widths |= {f"{index}.{branch}": 0 for index, count in enumerate(kept[kind].tolist()) if not count}
    small = extract(model, widths)
    for index, block in enumerate(small.blocks):
        for kind, branch, keep in (("heads", "attn", keep_heads), ("units", "mlp", keep_units)):
            if widths[f"{index}.{branch}"]:
                keep(getattr(block, branch), scores[kind][index].argsort(descending=True), int(kept[kind][index]))
    return small
