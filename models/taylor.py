"""First-order Taylor importance: reading |g * x| at the q, k, v and at the MLP activations of a backbone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from utils import reduce_sum

from .backbone import Module, last_layer, modules_of

# The cost C, summed over the batch, from logits (B, classes) and targets (B,).
COSTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logit": lambda logits, target: logits.gather(1, target[:, None]).sum(),
    "ce": lambda logits, target: F.cross_entropy(logits, target, reduction="sum"),
    "pred": lambda logits, target: logits.amax(dim=1).sum(),
}


class Collector(Protocol):
    """What tap() feeds: x and g = dC/dx, (B, N, 3, H, w) for q, k, v of an attention, (B, N, w) for an MLP.

    Of a module's last layer x is its input (B, N, H w) or (B, N, w), and g the gradient at its output (B, N, D).
    """

    def update(self, x: Tensor, g: Tensor) -> None: ...


@contextlib.contextmanager
def tap(
    model: VisionTransformer, collectors: dict[str, Collector], last_layers: dict[str, Collector] | None = None
) -> Iterator[None]:
    """Within it, each backward pass through `model` updates the collectors (module key -> collector).

    last_layers: those that read the module's last layer. Parameters get no gradient meanwhile: only activations do,
    which makes the pass cheaper than a training step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # With frozen parameters the graph has to start somewhere: at the patch embedding's output.
    hooks = [model.patch_embed.register_forward_hook(lambda _m, _i, output: output.requires_grad_())]
    for key, module in modules_of(model).items():
        if module.width == 0:
            continue
        block = model.blocks[module.block]
        point = block.attn.qkv if module.kind == "attn" else block.mlp.act
        heads = (3, module.heads, module.width) if module.kind == "attn" else (module.width,)
        hooks.append(point.register_forward_hook(_hook(collectors[key], heads)))
        if last_layers:
            hooks.append(last_layer(block, module.kind).register_forward_hook(_last_layer_hook(last_layers[key])))
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def _hook(collector: Collector, shape: tuple[int, ...]) -> Callable:
    def forward_hook(_module: object, _inputs: object, output: Tensor) -> None:
        x = output.detach().unflatten(-1, shape)
        output.register_hook(lambda g: collector.update(x, g.unflatten(-1, shape)))

    return forward_hook


def _last_layer_hook(collector: Collector) -> Callable:
    def forward_hook(_module: object, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach()
        output.register_hook(lambda g: collector.update(x, g))

    return forward_hook


def collect(
    model: VisionTransformer,
    collectors: dict[str, Collector],
    batches: Iterable[tuple[Tensor, Tensor]],
    cost: str,
    last_layers: dict[str, Collector] | None = None,
) -> None:
    """One forward and backward pass over the batches in eval mode, in the model's own precision."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with tap(model, collectors, last_layers), torch.autocast(device.type, enabled=False):
        for images, targets in batches:
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            COSTS[cost](model(images), targets).backward()
    model.train(was_training)


class TaylorImportance:
    """Mean over tokens of |g * x| for each dim of a module, or of its square; for an attention, of q, k and v each.

    finalize() gives (3, H, w) for an attention and (w,) for an MLP, float64, summed over ranks.
    """

    def __init__(self, module: Module, device: torch.device, squared: bool = False):
        self.power = 2 if squared else 1
        shape = (3, module.heads, module.width) if module.kind == "attn" else (module.width,)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, x: Tensor, g: Tensor) -> None:
        """x, g: (B, N, 3, H, w) or (B, N, w)."""
        self.total += (g * x).abs_().pow_(self.power).sum((0, 1), dtype=torch.float64)
        self.count += x.shape[0] * x.shape[1]

    def finalize(self) -> Tensor:
        """The means, over all ranks' tokens."""
        reduce_sum(self.total, self.count)
        return self.total / self.count
