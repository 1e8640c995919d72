"""One size at a time: pruning that is learned in training (WDPruning), and linear units that fold away (RePaViT).

Yu et al.: Width & Depth Pruning for Vision Transformers, AAAI 2022: every head and hidden unit has a score that is
trained, and takes part where it exceeds a threshold, which is trained too; gradients pass through that step as if it
were not there. Here without the classifiers at lower depths; what the thresholds leave is then brought to the size
exactly, and trained on.
Xu et al.: RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization on Feedforward Network
Layers, ICML 2025: a share of the hidden units has no activation, so that after training they fold into one D x D
matrix. Here LayerNorm stays, so the matrix is not merged any further.

B images, N tokens, D embedding, M hidden units, H heads.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.backbone import full_widths
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
    tokens, D = model.pos_embed.shape[1], model.embed_dim
    matrices = len(model.blocks) * tokens * D * D

    def macs(idle: float) -> int:
        units = sum(block.mlp.fc2.in_features - active_units(block.mlp, idle) for block in model.blocks)
        return macs_without(model, units=units) + (matrices if idle else 0)

    return smallest_cut(macs, share * count_macs(model)) if share < 1 else 0.0


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


class Gate(nn.Module):
    """Scores (n,) of the parts of a branch, and the threshold above which a part takes part."""

    def __init__(self, scores: Tensor, threshold: nn.Parameter):
        super().__init__()
        self.scores, self.threshold = nn.Parameter(scores), threshold

    def forward(self) -> Tensor:
        """1 for the parts that take part, else 0, with the gradient of score - threshold."""
        above = self.scores - self.threshold
        return (above > 0).to(above) + (above - above.detach())


class Gated(nn.Module):
    """A ViT whose heads and hidden units pass through gates.

    importance: kind ("heads", "units") -> (L, parts); the scores start as its ranks among all blocks, in 0..1.
    """

    def __init__(self, model: VisionTransformer, importance: dict[str, Tensor]):
        super().__init__()
        self.model, self.gates = model, nn.ModuleDict()
        for kind, values in importance.items():
            ranks = values.flatten().argsort().argsort().view_as(values).to(values) / values.numel()
            threshold = nn.Parameter(values.new_zeros(1))
            for index, scores in enumerate(ranks):
                self.gates[f"{index}_{kind}"] = Gate(scores.clone(), threshold)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, height, width) -> logits (B, classes)."""
        hooks = []
        for name, gate in self.gates.items():
            index, kind = name.split("_")
            block, mask = self.model.blocks[int(index)], gate()
            layer = block.attn.proj if kind == "heads" else block.mlp.fc2
            hooks.append(layer.register_forward_pre_hook(lambda _layer, x, mask=mask: (gated(x[0], mask),)))
        try:
            return self.model(images)
        finally:
            for hook in hooks:
                hook.remove()

    def kept(self, kind: str) -> Tensor:
        """The share of the heads or units that take part, with a gradient."""
        return torch.cat([gate() for name, gate in self.gates.items() if name.endswith(kind)]).mean()


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
        macs = 1 - sum(part * (1 - self.model.kept(kind)) for kind, part in self.shares.items())
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
    above = {name: (gate.scores - gate.threshold).detach() for name, gate in gated_model.gates.items()}
    order, model = torch.cat(list(above.values())).sort().values, gated_model.model

    def kept(removed: float) -> dict[str, int]:
        lowest = order[int(removed * len(order)) :][:1]  # of those that stay
        return {name: int((values >= lowest).sum()) if len(lowest) else 0 for name, values in above.items()}

    def macs(removed: float) -> int:
        gone = {"heads": 0, "units": 0}
        for name, count in kept(removed).items():
            gone[name.split("_")[1]] += len(above[name]) - count
        return macs_without(model, **gone)

    removed = smallest_cut(macs, share * count_macs(model)) if share < 1 else 0.0
    if removed is None:
        return None
    counts, branches = kept(removed), {"heads": "attn", "units": "mlp"}
    bypassed = {name.replace("_", ".") for name, count in counts.items() if not count}
    bypassed = {f"{index}.{branches[kind]}": 0 for index, kind in (name.split(".") for name in bypassed)}
    small = extract(model, full_widths(model) | bypassed)
    for name, count in counts.items():
        index, kind = name.split("_")
        branch = getattr(small.blocks[int(index)], branches[kind], None)
        if branch is not None:
            keep = keep_units if kind == "units" else keep_heads
            keep(branch, above[name].argsort(descending=True), count)
    return small
