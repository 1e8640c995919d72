"""First-order Taylor importance: |g * x| with g = dC/dx, for x = q, k and v and for the hidden activations of MLPs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from utils import reduce_sum, world

from .backbone import Backbone, Module, last_layer, modules_of, value_bias, value_layer
from .subnetwork import blocks_of
from .targets import COSTS, output_of


class Collector(Protocol):
    """Takes the activations x of a module and their gradients g = dC/dx, batch by batch, see feed_collectors()."""

    def update(self, x: Tensor, g: Tensor) -> None:
        """Adds a batch."""


@contextlib.contextmanager
def feed_collectors(
    model: Backbone, collectors: dict[str, Collector], last_layers: dict[str, Collector] | None = None
) -> Iterator[None]:
    """Context manager in which each backward pass through `model` updates the collectors.

    Within it parameters do not require gradients, only activations do, which makes the pass cheaper than a training
    step.

    Args:
        model: A backbone or a sub-network.
        collectors: Module key -> collector, for every module that is not bypassed. It gets x and g of shape
            (B, N, P, H, w) for attention, where the P parts are q, k and v, or v alone if v alone is cut; for an MLP
            (B, N, w), taken after the activation. For the attention of a Swin, B counts windows.
        last_layers: Module key -> collector for the last linear layer of the module. It gets the input x of the layer,
            (B, N, H * w) or (B, N, w), and the gradient g at its output, (B, N, D).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # Since parameters are frozen, the autograd graph has to start at an activation: the output of the patch embedding.
    hooks = [model.patch_embed.register_forward_hook(lambda _m, _i, output: output.requires_grad_())]
    blocks, original_flags = blocks_of(model), {}
    for key, module in modules_of(model).items():
        if module.width == 0:
            continue
        last = last_layer(blocks[module.block], module.kind)
        if module.kind == "attn":
            attn = blocks[module.block].attn
            hooks.append(value_layer(attn).register_forward_hook(_attention_hook(collectors[key], attn, module)))
            if getattr(attn, "v_bias", None) is not None:
                # Otherwise timm uses the weight of the layer without calling it, and the hook would not run.
                original_flags[attn], attn.qkv_bias_separate = attn.qkv_bias_separate, True
        else:
            hooks.append(last.register_forward_pre_hook(_mlp_hook(collectors[key])))
        if last_layers:
            hooks.append(last.register_forward_hook(_last_layer_hook(last_layers[key])))
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for attn, flag in original_flags.items():
            attn.qkv_bias_separate = flag
        for parameter in trained:
            parameter.requires_grad_(True)


def _attention_hook(collector: Collector, attn: nn.Module, module: Module) -> Callable:
    bias, layer, shape = value_bias(attn), value_layer(attn), (module.parts, module.heads, module.head_dim)
    count = module.parts * module.heads * module.head_dim

    def kept(x: Tensor) -> Tensor:
        """The last P * H * d outputs of the layer, (B, N, ...), as (B, N, P, H, w)."""
        return x[..., -count:].unflatten(-1, shape)[..., : module.width]

    def forward_hook(_module: object, _inputs: object, output: Tensor) -> None:
        values = output.detach()[..., -count:]
        x = kept(values if bias is None or bias is layer.bias else values + bias)
        output.register_hook(lambda g: collector.update(x, kept(g)))

    return forward_hook


def _mlp_hook(collector: Collector) -> Callable:
    def forward_pre_hook(_module: object, inputs: tuple[Tensor]) -> None:
        x = inputs[0].detach()
        inputs[0].register_hook(lambda g: collector.update(_as_tokens(x), _as_tokens(g)))

    return forward_pre_hook


def _as_tokens(x: Tensor) -> Tensor:
    """(B, ..., n) -> (B, N, n): a Swin arranges tokens in two dimensions."""
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
    target: str = "logits",
) -> None:
    """Runs forward and backward passes over the batches once and feeds the collectors.

    Runs in eval mode and without autocast, in the dtype of the model. What a cost draws at random depends on the place
    of the image in the proxy set, of which rank r of R takes every R-th image from the r-th on.

    Args:
        model, collectors, last_layers: See feed_collectors().
        batches: Images (B, C, height, width) and labels (B,).
        cost: Key of targets.COSTS, the cost C whose gradient is taken.
        target: Of targets.TARGETS, the output that C is a function of.
    """
    device = next(model.parameters()).device
    rank, ranks = world()
    seen, was_training = 0, model.training
    model.eval()
    with feed_collectors(model, collectors, last_layers), torch.autocast(device.type, enabled=False):
        for images, labels in batches:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            places = range(rank + ranks * seen, rank + ranks * (seen + len(images)), ranks)
            COSTS[cost](output_of(model, images, target), labels, places).backward()
            seen += len(images)
    model.train(was_training)


class TaylorImportance:
    """Collects the mean over tokens of |g * x| for each dim of a module.

    Args:
        module: The module, see models.backbone.modules_of().
        device: Device of the sums, which are in float64.
        squared: Take the mean of (g * x)^2 instead.
    """

    def __init__(self, module: Module, device: torch.device, squared: bool = False):
        self.power = 2 if squared else 1
        shape = (module.parts, module.heads, module.width) if module.kind == "attn" else (module.width,)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, x: Tensor, g: Tensor) -> None:
        """Adds a batch. x, g: (B, N, P, H, w) for attention, (B, N, w) for an MLP."""
        self.total += (g * x).abs_().pow_(self.power).sum((0, 1), dtype=torch.float64)
        self.count += x.shape[0] * x.shape[1]

    def finalize(self) -> Tensor:
        """The means over the tokens of all ranks: (P, H, w) for attention, (w,) for an MLP."""
        reduce_sum(self.total, self.count)
        return self.total / self.count
