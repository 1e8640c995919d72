"""Distillation: a frozen network teaches another, with or without labels.

B images, N tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone
from models.targets import outputs_of
from utils import UserError

DISTILLATION_TYPES = ("none", "soft", "hard")  # DeiT's


class Teacher:
    """A frozen network, which gives the outputs that another is to learn.

    The weights of its linear layers and its patch embedding are kept in the dtype of autocast, which would convert them
    at each step; what it gives is the same.

    Args:
        model: The network, on its device. It is changed in place.
        target: What it gives, see models.targets.
        amp: dtype of autocast, None for float32.
    """

    def __init__(self, model: Backbone, target: str, amp: torch.dtype | None = None):
        self.model, self.target, self.amp = model.eval().requires_grad_(False), target, amp
        for layer in model.modules() if amp is not None else ():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(amp)
        self.run: Callable[..., dict[str, Tensor]] = outputs_of  # or the same, compiled

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs for images (B, C, height, width) by name, see models.targets.outputs_of()."""
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp is not None):
            return self.run(self.model, images, self.target)


def check_teacher(teacher: Backbone, model: Backbone, target: str, source: str) -> None:
    """Raises UserError unless teacher and model give outputs of the same shapes for images of the model's size.

    source: where the teacher comes from, in words. Both are on the CPU and in eval mode.
    """
    images = torch.zeros(1, model.in_chans, *model.patch_embed.img_size)
    if (teacher.in_chans, *teacher.patch_embed.img_size) != tuple(images.shape[1:]):
        size = (teacher.in_chans, *teacher.patch_embed.img_size)
        raise UserError(f"{source} takes images of shape {size}, the model {tuple(images.shape[1:])}: give another")
    if target == "logits" and teacher.num_classes != model.num_classes:
        has = f"{teacher.num_classes} classes" if teacher.num_classes else "no classifier head"
        raise UserError(f"{source} has {has}, the model has {model.num_classes} classes: give a teacher with as many")
    with torch.inference_mode():
        given, own = (outputs_of(network, images, target) for network in (teacher, model))
    for name, output in own.items():
        if given[name].shape != output.shape:
            shapes = tuple(given[name].shape[1:]), tuple(output.shape[1:])
            raise UserError(f"{source} gives {name} of shape {shapes[0]}, the model {shapes[1]}: give another teacher")


class StudentOutputs(nn.Module):
    """Runs a model for the targets "features" and "tokens"; its parameters are the model's."""

    def __init__(self, model: Backbone, target: str):
        super().__init__()
        self.model, self.target = model, target

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images (B, C, height, width) -> outputs by name, see models.targets.outputs_of()."""
        return outputs_of(self.model, images, self.target)


class Distillation:
    """DeiT's loss: (1 - alpha) * the loss of the labels + alpha * the distance from the teacher.

    soft: the distance is tau^2 * KL(teacher || student) of the predictions at temperature tau, mean over the images.
    hard: the cross-entropy with the class that the teacher predicts. For the targets "features" and "tokens" it is
    distance(). Of a model with two heads (the distilled DeiT), the class head learns from the labels, and the other
    from the teacher; with alpha 1, which uses no labels, both learn from the teacher.
    """

    def __init__(self, teacher: Teacher, kind: str, alpha: float, tau: float):
        self.teacher, self.kind, self.alpha, self.tau = teacher, kind, alpha, tau

    def __call__(
        self,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        outputs: Tensor | tuple[Tensor, ...] | dict[str, Tensor],
        images: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """The loss of a step.

        loss_fn: of the labels.  outputs: of the student: logits (B, classes), those of two heads, or features and
        tokens by name.  images: what the student was given, (B, C, height, width).
        targets: (B,) or (B, classes); not used with alpha 1.
        """
        expected = self.teacher(images)
        if isinstance(outputs, dict):
            return sum(distance(outputs[name], expected[name]) for name in outputs) / len(outputs)
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        if self.alpha == 1:
            return sum(self.from_teacher(logits, expected["logits"]) for logits in heads) / len(heads)
        taught = self.from_teacher(heads[-1], expected["logits"])
        return (1 - self.alpha) * loss_fn(heads[0], targets) + self.alpha * taught

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
