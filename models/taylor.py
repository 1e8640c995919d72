"""First-order Taylor importance: reading |g * x| at the q, k, v and at the MLP activations of a backbone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils import reduce_sum

from .backbone import Backbone, Module, blocks_of, last_layer, modules_of, value_bias, value_layer

# The cost C, summed over the batch, from logits (B, classes) and targets (B,).
COSTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logit": lambda logits, target: logits.gather(1, target[:, None]).sum(),
    "ce": lambda logits, target: F.cross_entropy(logits, target, reduction="sum"),
    "pred": lambda logits, target: logits.amax(dim=1).sum(),
}


class Collector(Protocol):
    """What tap() feeds: x and g = dC/dx, (B, N, P, H, w) for an attention, (B, N, w) for an MLP.

    The P parts are q, k, v, or v alone where it alone is cut; of a Swin B counts windows. Of a module's last layer x is
    its input (B, N, H w) or (B, N, w), and g the gradient at its output (B, N, D).
    """

    def update(self, x: Tensor, g: Tensor) -> None:
        """Takes in a batch."""


@contextlib.contextmanager
def tap(
    model: Backbone, collectors: dict[str, Collector], last_layers: dict[str, Collector] | None = None
) -> Iterator[None]:
    """Within it, each backward pass through `model` updates the collectors (module key -> collector).

    last_layers: those that read the module's last layer. Parameters get no gradient meanwhile: only activations do,
    which makes the pass cheaper than a training step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # With frozen parameters the graph has to start somewhere: at the patch embedding's output.
    hooks = [model.patch_embed.register_forward_hook(lambda _m, _i, output: output.requires_grad_())]
    blocks, separate = blocks_of(model), {}
    for key, module in modules_of(model).items():
        if module.width == 0:
            continue
        last = last_layer(blocks[module.block], module.kind)
        if module.kind == "attn":
            attn = blocks[module.block].attn
            hooks.append(value_layer(attn).register_forward_hook(_attention_hook(collectors[key], attn, module)))
            if getattr(attn, "v_bias", None) is not None:  # only then does timm call the layer, not use its weight
                separate[attn], attn.qkv_bias_separate = attn.qkv_bias_separate, True
        else:
            hooks.append(last.register_forward_pre_hook(_units_hook(collectors[key])))
        if last_layers:
            hooks.append(last.register_forward_hook(_last_layer_hook(last_layers[key])))
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for attn, value in separate.items():
            attn.qkv_bias_separate = value
        for parameter in trained:
            parameter.requires_grad_(True)


def _attention_hook(collector: Collector, attn: nn.Module, module: Module) -> Callable:
    bias, layer, shape = value_bias(attn), value_layer(attn), (module.parts, module.heads, module.head_dim)
    count = module.parts * module.heads * module.head_dim

    def kept(x: Tensor) -> Tensor:
        """The last outputs, (B, N, P H d), as (B, N, P, H, w)."""
        return x[..., -count:].unflatten(-1, shape)[..., : module.width]

    def forward_hook(_module: object, _inputs: object, output: Tensor) -> None:
        values = output.detach()[..., -count:]
        x = kept(values if bias is None or bias is layer.bias else values + bias)
        output.register_hook(lambda g: collector.update(x, kept(g)))

    return forward_hook


def _units_hook(collector: Collector) -> Callable:
    def forward_pre_hook(_module: object, inputs: tuple[Tensor]) -> None:
        x = inputs[0].detach()
        inputs[0].register_hook(lambda g: collector.update(_as_tokens(x), _as_tokens(g)))

    return forward_pre_hook


def _as_tokens(x: Tensor) -> Tensor:
    """(B, ..., n) -> (B, N, n): a Swin's stream is a map."""
    return x.flatten(1, -2)


def _last_layer_hook(collector: Collector) -> Callable:
    def forward_hook(_module: object, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach()
        output.register_hook(lambda g: collector.update(_as_tokens(x), _as_tokens(g)))

    return forward_hook


def collect(
    model: Backbone,
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
    """Mean over tokens of |g * x| for each dim of a module, or of its square; for an attention, of each part.

    finalize() gives (P, H, w) for an attention and (w,) for an MLP, float64, summed over ranks.
    """

    def __init__(self, module: Module, device: torch.device, squared: bool = False):
        self.power = 2 if squared else 1
        shape = (module.parts, module.heads, module.width) if module.kind == "attn" else (module.width,)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, x: Tensor, g: Tensor) -> None:
        """x, g: (B, N, P, H, w) or (B, N, w)."""
        self.total += (g * x).abs_().pow_(self.power).sum((0, 1), dtype=torch.float64)
        self.count += x.shape[0] * x.shape[1]

    def finalize(self) -> Tensor:
        """The means, over all ranks' tokens."""
        reduce_sum(self.total, self.count)
        return self.total / self.count
