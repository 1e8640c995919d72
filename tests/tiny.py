"""Tiny random backbones and images for the tests, and the plain references that the code is held against."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from models.backbone import create_backbone, full_widths, modules_of
from models.macs import count_macs
from piad.dropout_list import grow, units_of
from piad.mask_table import MaskTable

CLASSES = 7
PLAIN = "vit_tiny_patch16_224"
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": CLASSES}

# What makes one plain vision transformer differ from another: (timm's name, its arguments).
VARIANTS: dict[str, tuple[str, dict]] = {
    "plain": (PLAIN, {}),
    "no_qkv_bias": (PLAIN, {"qkv_bias": False}),
    "no_bias": (PLAIN, {"qkv_bias": False, "proj_bias": False}),
    "layer_scale": ("deit3_small_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "five_heads": (PLAIN, {"embed_dim": 40, "num_heads": 5, "mlp_ratio": 3.2}),
    "one_head": (PLAIN, {"embed_dim": 16, "num_heads": 1, "depth": 3}),
    "pre_norm": (PLAIN, {"pre_norm": True, "no_embed_class": True}),
    "registers": (PLAIN, {"reg_tokens": 4, "class_token": False, "global_pool": "avg"}),
}


def random_backbone(variant: str = "plain", seed: int = 0, dtype: torch.dtype = torch.float64, **more) -> nn.Module:
    """A tiny backbone in eval mode with every parameter drawn at random: none is left at zero or at one.

    timm starts biases at zero and LayerScale near it, which would hide a mistake in either.
    """
    name, model_kwargs = VARIANTS[variant]
    return draw_parameters(create_backbone(name, **(SHAPE | model_kwargs | more)).to(dtype), seed)


def draw_parameters(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter of the model drawn at random, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if ("norm" in key and key.endswith("weight")) or key.endswith("gamma"):
                value = 0.8 + 0.2 * noise
            elif parameter.ndim == 2:
                value = 1.2 * noise / parameter.shape[1] ** 0.5
            elif parameter.ndim == 4:
                value = noise / parameter[0].numel() ** 0.5
            else:
                value = 0.3 * noise
            parameter.copy_(value)
    return model.eval()


def evenly_dropped(model: nn.Module, share: float = 0.9) -> MaskTable:
    """A table that drops the units of the model evenly, until `share` of its MACs have left."""
    modules = modules_of(model)
    importance = {key: torch.arange(module.width, 0, -1).double().numpy() for key, module in modules.items()}
    return grow(MaskTable([full_widths(model)]), importance, units_of(model), share * count_macs(model))


def random_data(count: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 32, 32) and targets (count,)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(CLASSES, (count,), generator=generator)


def batches(images: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), targets.split(size), strict=True))


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value that is expected."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return ((found - expected).abs().max() / expected.abs().max()).item()


def use_fused(model: nn.Module, fused: bool) -> nn.Module:
    for block in model.blocks:
        if hasattr(block, "attn"):
            block.attn.fused_attn = fused
    return model


def widths_strategy(full: dict[str, int]) -> st.SearchStrategy[dict[str, int]]:
    """Any widths of a model, with bypassed and whole branches drawn often."""
    return st.fixed_dictionaries(
        {key: st.one_of(st.just(0), st.just(width), st.integers(0, width)) for key, width in full.items()}
    )


def some_widths(model: VisionTransformer) -> dict[str, int]:
    """Widths at which one branch of each kind is bypassed and the others are cut (two blocks or more)."""
    widths = {key: max(1, width * 5 // 8) for key, width in full_widths(model).items()}
    return widths | {"0.mlp": 0, "1.attn": 0}


# ---------------------------------------------------------------------------------------------------------------------
# References


def masks(model: VisionTransformer, widths: dict[str, int]) -> dict[str, Tensor]:
    """1 for each weight that a cut to `widths` keeps and 0 for the others: of the full model, name -> mask."""
    found = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    for index, block in enumerate(model.blocks):
        prefix, d = f"blocks.{index}.", block.attn.head_dim
        attn, mlp = widths[f"{index}.attn"], widths[f"{index}.mlp"]
        for row in range(3 * block.attn.num_heads * d):
            if row % d >= attn:
                found[prefix + "attn.qkv.weight"][row] = 0
                if prefix + "attn.qkv.bias" in found:
                    found[prefix + "attn.qkv.bias"][row] = 0
        for column in range(block.attn.num_heads * d):
            if column % d >= attn:
                found[prefix + "attn.proj.weight"][:, column] = 0
        found[prefix + "mlp.fc1.weight"][mlp:] = 0
        found[prefix + "mlp.fc2.weight"][:, mlp:] = 0
        if prefix + "mlp.fc1.bias" in found:
            found[prefix + "mlp.fc1.bias"][mlp:] = 0
        bypassed = [("norm1", "attn", "ls1")] * (attn == 0) + [("norm2", "mlp", "ls2")] * (mlp == 0)
        for part in (part for parts in bypassed for part in parts):
            for name in found:
                if name.startswith(f"{prefix}{part}."):
                    found[name].zero_()
    return found


def masked_logits(model: VisionTransformer, widths: dict[str, int], images: Tensor) -> Tensor:
    """What a plain full model gives when the weights beyond `widths` are zeroed and bypassed branches add nothing.

    Zeroed q, k and v dims change no score, and the scores keep the full head dim's scale. Differentiable.
    """
    hooks = []
    for index, block in enumerate(model.blocks):
        for kind in ("attn", "mlp"):
            if widths[f"{index}.{kind}"] == 0:
                part = getattr(block, kind)
                hooks.append(part.register_forward_hook(lambda _m, _i, output: torch.zeros_like(output)))
    try:
        kept = masks(model, widths)
        weights = {name: parameter * kept[name] for name, parameter in model.named_parameters()}
        return functional_call(model, weights, (images,))
    finally:
        for hook in hooks:
            hook.remove()


COSTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "logit": lambda logits, target: logits[target],
    "ce": lambda logits, target: -(logits[target] - logits.exp().sum().log()),
    "pred": lambda logits, target: max(logits),
}


def activations(model: VisionTransformer, image: Tensor, target: int, cost: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(x, dC/dx) of one image at each module that runs: q, k, v (3, H, N, w) of an attention, (N, M) of an MLP.

    A plain forward written out, and plain autograd.
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
    taken = {}
    for index, block in enumerate(model.blocks):
        if hasattr(block, "attn"):
            attn = block.attn
            qkv = attn.qkv(block.norm1(x))[0].reshape(x.shape[1], 3, attn.num_heads, -1).permute(1, 2, 0, 3)
            taken[f"{index}.attn"] = qkv
            q, k, v = qkv
            scores = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
            x = x + block.ls1(attn.proj(torch.cat(list(scores @ v), dim=-1)))
        if hasattr(block, "mlp"):
            hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)))
            taken[f"{index}.mlp"] = hidden
            x = x + block.ls2(block.mlp.fc2(hidden))
    logits = model.forward_head(model.norm(x))[0]
    gradients = torch.autograd.grad(COSTS[cost](logits, int(target)), list(taken.values()))
    return {
        key: (value.detach().squeeze(0), gradient.squeeze(0))
        for (key, value), gradient in zip(taken.items(), gradients, strict=True)
    }


def encoder_files(folder: Path, photos: int) -> list[str | Path]:
    """Writes photos, an encoder without a head and a saliency head for it; returns the flags that name them."""
    generator = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for index in range(photos):
        pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{index:02}.png")
    shape = SHAPE | {"num_classes": 0}
    save_file(random_backbone(num_classes=0, dtype=torch.float32).state_dict(), folder / "encoder.safetensors")
    head, channels = {}, (shape["embed_dim"], 8, 4, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for i, (before, after) in enumerate(itertools.pairwise(channels), 1):
            head |= {f"upconv{i}.{k}": v for k, v in nn.ConvTranspose2d(before, after, 4).state_dict().items()}
            head |= {f"bn{i}.{k}": v for k, v in nn.BatchNorm2d(after).state_dict().items()}
    head |= {"final_conv.weight": torch.tensor([1.0, -1.0]).view(1, 2, 1, 1), "final_conv.bias": torch.zeros(1)}
    save_file(head, folder / "head.safetensors")
    files = ["--photos", folder / "photos", "--checkpoint", folder / "encoder.safetensors"]
    files += ["--head", folder / "head.safetensors", "--output-dir", folder]
    return [*files, "--model", PLAIN, "--model-kwargs", *(f"{key}={value}" for key, value in shape.items())]
