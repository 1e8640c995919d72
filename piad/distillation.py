"""Distillation: a frozen network teaches another, with or without labels.

B images, N tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone, blocks_of, modules_of
from models.targets import outputs_of
from utils import UserError

DISTILLATION_TYPES = ("none", "soft", "hard")  # DeiT's
BLOCKS = 4  # how many blocks have their tokens compared; spread over the depth, the last block included


class BlockTokens:
    """Keeps what BLOCKS blocks of a model returned in its last forward pass."""

    def __init__(self, model: Backbone):
        self.kept: dict[str, Tensor] = {}
        blocks = blocks_of(model)
        for number in sorted({-(-len(blocks) * part // BLOCKS) for part in range(1, BLOCKS + 1)}):
            blocks[number - 1].register_forward_hook(partial(self._keep, f"block {number}"))

    def _keep(self, name: str, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.kept[name] = output

    def take(self) -> dict[str, Tensor]:
        """Returns name -> tokens (B, N, D), or (B, H, W, D) of a Swin, and lets go of them."""
        taken, self.kept = self.kept, {}
        return taken

    def __deepcopy__(self, memo: dict[int, object]) -> BlockTokens:
        """For a copy of the model, whose hooks are copied, too: it has kept nothing yet."""
        copied = memo[id(self)] = object.__new__(BlockTokens)
        copied.kept = {}
        return copied


class Teacher:
    """A frozen network, which gives the outputs that another is to learn.

    The weights of its linear layers and its patch embedding are kept in the dtype of autocast, which would convert them
    at each step; what it gives is the same.

    Args:
        model: The network, on its device. It is changed in place.
        target: What it gives, see models.targets.
        amp: dtype of autocast, None for float32.
        tokens: Whether it also gives the tokens after BLOCKS of its blocks.
    """

    def __init__(self, model: Backbone, target: str, amp: torch.dtype | None = None, tokens: bool = False):
        self.model, self.target, self.amp = model.eval().requires_grad_(False), target, amp
        self.tokens = BlockTokens(model) if tokens else None
        for layer in model.modules() if amp is not None else ():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(amp)
        self.run: Callable[..., dict[str, Tensor]] = outputs_of  # or the same, compiled

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs for images (B, C, height, width) by name, see models.targets.outputs_of()."""
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp is not None):
            outputs = self.run(self.model, images, self.target)
        return outputs | (self.tokens.take() if self.tokens else {})


def check_teacher(
    teacher: Backbone,
    model: Backbone,
    target: str,
    source: str,
    tokens: bool = False,
    mend: str = "give a teacher with as many",
) -> None:
    """Raises UserError unless teacher and model give outputs of the same shapes for images of the model's size.

    source: where the teacher comes from, in words.  tokens: whether those after the blocks are compared as well.
    mend: what to do where it has another number of classes, in words.
    Both are on the CPU and in eval mode.
    """
    images = torch.zeros(1, model.in_chans, *model.patch_embed.img_size)
    if (teacher.in_chans, *teacher.patch_embed.img_size) != tuple(images.shape[1:]):
        size = (teacher.in_chans, *teacher.patch_embed.img_size)
        raise UserError(f"{source} takes images of shape {size}, the model {tuple(images.shape[1:])}: give another")
    if target == "logits" and teacher.num_classes != model.num_classes:
        has = f"{teacher.num_classes} classes" if teacher.num_classes else "no classifier head"
        raise UserError(f"{source} has {has}, the model has {model.num_classes} classes: {mend}")
    with torch.inference_mode():
        given, own = (outputs_of(network, images, target) for network in (teacher, model))
    for name, output in own.items():
        if given[name].shape != output.shape:
            shapes = tuple(given[name].shape[1:]), tuple(output.shape[1:])
            raise UserError(f"{source} gives {name} of shape {shapes[0]}, the model {shapes[1]}: give another teacher")
    blocks = [[(module.dim, module.tokens) for module in modules_of(network).values()] for network in (teacher, model)]
    if tokens and blocks[0] != blocks[1]:
        raise UserError(
            f"{source} has other blocks than the model, so their tokens cannot be compared: leave "
            "--distillation-tokens out, or give another teacher"
        )


class StudentOutputs(nn.Module):
    """Runs a model that learns from a Teacher; its parameters are the model's.

    target, tokens: what it returns, the same as the Teacher's.
    """

    def __init__(self, model: Backbone, target: str, tokens: bool = False):
        super().__init__()
        self.model, self.target = model, target
        self.tokens = BlockTokens(model) if tokens else None

    def forward(self, images: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """images (B, C, height, width) -> outputs by name, as from the Teacher.

        In training, a model with two heads (the distilled DeiT) returns the logits of both.
        """
        outputs = outputs_of(self.model, images, self.target)
        return outputs | (self.tokens.take() if self.tokens else {})


class Distillation:
    """DeiT's loss: (1 - alpha) * the loss of the labels + alpha * the distance from the teacher.

    soft: the distance is tau^2 * KL(teacher || student) of the predictions at temperature tau, mean over the images.
    hard: the cross-entropy with the class that the teacher predicts. For the targets "features" and "tokens" it is
    distance(). Of a model with two heads (the distilled DeiT), the class head learns from the labels, and the other
    from the teacher; with alpha 1, which uses no labels, both learn from the teacher.
    tokens: weight of the mean distance() of the tokens after BLOCKS blocks, which is added to that.
    """

    def __init__(self, teacher: Teacher, kind: str, alpha: float, tau: float, tokens: float = 0.0):
        self.teacher, self.kind, self.alpha, self.tau, self.tokens = teacher, kind, alpha, tau, tokens

    def __call__(
        self,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        outputs: dict[str, Tensor | tuple[Tensor, ...]],
        expected: dict[str, Tensor],
        targets: Tensor,
    ) -> Tensor:
        """The loss of a step.

        loss_fn: of the labels.  outputs: of the student, see StudentOutputs.  expected: of the teacher, for the same
        images.  targets: (B,) or (B, classes); not used with alpha 1.
        """
        blocks = {name for name in outputs if name.startswith("block")}
        if "logits" in outputs:
            loss = self.of_logits(loss_fn, outputs["logits"], expected["logits"], targets)
        else:
            loss = mean_distance(outputs, expected, outputs.keys() - blocks)
        return loss + self.tokens * mean_distance(outputs, expected, blocks) if blocks else loss

    def of_logits(
        self,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        outputs: Tensor | tuple[Tensor, ...],
        expected: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """DeiT's loss. outputs: logits (B, classes), or those of two heads.  expected: the teacher's."""
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        if self.alpha == 1:
            return sum(self.from_teacher(logits, expected) for logits in heads) / len(heads)
        return (1 - self.alpha) * loss_fn(heads[0], targets) + self.alpha * self.from_teacher(heads[-1], expected)

    def from_teacher(self, logits: Tensor, expected: Tensor) -> Tensor:
        """The distance of logits from the teacher's, both (B, classes)."""
        if self.kind == "hard":
            return F.cross_entropy(logits, expected.argmax(1))
        return divergence(logits, expected, self.tau)


def divergence(logits: Tensor, expected: Tensor, tau: float) -> Tensor:
    """tau^2 * KL(teacher || student) at temperature tau, mean over the images; both logits are (B, classes)."""
    found, wanted = ((x.float() / tau).log_softmax(1) for x in (logits, expected))
    return tau**2 * F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def distance(found: Tensor, expected: Tensor) -> Tensor:
    """The squared distance of each row (..., D), relative to the squared length of the teacher's row; the mean."""
    found, expected = found.float(), expected.float()
    lengths = expected.square().sum(-1).clamp(min=1e-12)
    return ((found - expected).square().sum(-1) / lengths).mean()


def mean_distance(found: dict[str, Tensor], expected: dict[str, Tensor], names: Iterable[str]) -> Tensor:
    """The mean distance() of the outputs of these names."""
    return torch.stack([distance(found[name], expected[name]) for name in sorted(names)]).mean()
