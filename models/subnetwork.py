"""A sub-network: timm's vision transformer with narrower modules. Rebuilds one from its folder.

A copy of this file lies in every sub-network's folder as `model.py`, and needs torch, timm and safetensors alone:

    from model import load
    model = load()                            # in eval mode: images (B, C, height, width) -> logits (B, classes)
    model = load(drop_path_rate=0.1).train()  # to train it further: further arguments are timm.create_model()'s

Of an encoder, which has no classifier head, model(images) are the features (B, D), and model.forward_features(images)
all tokens (B, N, D) after the last norm. "target" in `config.json` says which of them the sub-network keeps.
`config.json` beside it says how images are prepared ("preprocessing", under the names of timm.data.create_transform).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import Attention
from timm.models.eva import EvaBlock
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

# The children that make up each branch of a block. A bypassed branch has none of them.
CHILDREN: dict[type[nn.Module], dict[str, tuple[str, ...]]] = {
    Block: {"attn": ("norm1", "attn", "ls1", "drop_path1"), "mlp": ("norm2", "mlp", "ls2", "drop_path2")},
    EvaBlock: {"attn": ("norm1", "attn", "gamma_1", "drop_path1"), "mlp": ("norm2", "mlp", "gamma_2", "drop_path2")},
    SwinTransformerBlock: {"attn": ("norm1", "attn", "drop_path1"), "mlp": ("norm2", "mlp", "drop_path2")},
    SwinTransformerV2Block: {"attn": ("norm1", "attn", "drop_path1"), "mlp": ("norm2", "mlp", "drop_path2")},
}


def load(folder: Path | str = Path(__file__).parent, **model_kwargs: Any) -> nn.Module:
    """The sub-network that a folder holds, on the CPU and in eval mode.

    model_kwargs: further arguments of timm.create_model(), such as drop_path_rate.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    model = structure(config["model"], {**config["model_kwargs"], **model_kwargs})
    resize(model, config["widths"])
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), assign=True)
    return model.eval()


def structure(name: str, model_kwargs: dict[str, Any]) -> nn.Module:
    """timm's model of this name, ready for `load_state_dict(..., assign=True)`.

    Its parameters are on the meta device where the state dict holds all that the model needs; a model that also
    computes buffers, such as the attention masks of a Swin, is made on the CPU.
    """
    with torch.device("meta"):
        model = timm.create_model(name, **model_kwargs)
    if {key for key, _ in model.named_buffers()} - model.state_dict().keys():
        model = timm.create_model(name, **model_kwargs)
    return model


def resize(model: nn.Module, widths: dict[str, int]) -> None:
    """Gives every module its width, in place: the layers that change are new ones without weights (meta device).

    widths: "<block>.attn" -> dims per head, "<block>.mlp" -> hidden units; 0 bypasses the branch.
    """
    for index, block in enumerate(blocks_of(model)):
        for kind, resize_branch in (("attn", _resize_attention), ("mlp", _resize_mlp)):
            width, branch = widths[f"{index}.{kind}"], getattr(block, kind, None)
            if width == 0:
                _bypass(block, kind)
            elif branch is not None:
                resize_branch(branch, width)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks in running order."""
    if isinstance(model, SwinTransformer | SwinTransformerV2):
        return [block for stage in model.layers for block in stage.blocks]
    return list(model.blocks)


def branch_children(block: nn.Module, kind: str) -> dict[str, nn.Module | nn.Parameter]:
    """The children of a block that make up its branch "attn" or "mlp", by name; empty where it is bypassed."""
    names = next(CHILDREN[base][kind] for base in type(block).__mro__ if base in CHILDREN)
    found = {name: getattr(block, name, None) for name in names}
    return {name: child for name, child in found.items() if child is not None}


def branch_parameters(block: nn.Module, kind: str) -> list[nn.Parameter]:
    """All parameters of a branch."""
    children = branch_children(block, kind).values()
    return [p for child in children for p in ([child] if isinstance(child, nn.Parameter) else child.parameters())]


# ---------------------------------------------------------------------------------------------------------------------
# The layers that a width cuts, whatever timm calls them


def cuts_v_alone(attn: nn.Module) -> bool:
    """Whether the width of an attention is that of v alone, and q and k stay whole.

    Norms of q and k, rotary embeddings and cosine attention do not allow q and k to be rotated.
    """
    if isinstance(attn, Attention):
        return not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity))
    return not isinstance(attn, WindowAttention)


def value_layer_name(attn: nn.Module) -> str:
    """The name of the layer whose last rows give v: `qkv`, or `v_proj` where v has a layer of its own."""
    return "qkv" if attn.qkv is not None else "v_proj"


def first_layers(mlp: nn.Module | None) -> dict[str, nn.Linear]:
    """The layers that give the hidden units, by name: `fc1` (gated: units and gates), or `fc1_g` and `fc1_x`."""
    return {name: getattr(mlp, name) for name in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, name)}


def _resize_attention(attn: nn.Module, width: int) -> None:
    H, whole = attn.num_heads, attn.proj.in_features // attn.num_heads
    head_dim = getattr(attn.proj, "head_dim", whole)  # of v in the whole network, where v is cut already
    if width == whole:
        return
    name = value_layer_name(attn)
    layer, v_alone = getattr(attn, name), cuts_v_alone(attn)
    rows = layer.out_features - (1 if v_alone else 3) * H * (whole - width)
    setattr(attn, name, _empty_layer(layer, layer.in_features, rows, ValueLayer if v_alone else nn.Linear))
    attn.proj = _empty_layer(attn.proj, H * width, attn.proj.out_features, ValueProjection if v_alone else nn.Linear)
    if v_alone:
        set_value_width(attn, width, head_dim)
    else:
        for key, value in {"head_dim": width, "attn_dim": H * width, "scale": width**-0.5}.items():
            if hasattr(attn, key):
                setattr(attn, key, value)


def _resize_mlp(mlp: nn.Module, width: int) -> None:
    hidden = mlp.fc2.in_features
    if width == hidden:
        return
    for name, layer in first_layers(mlp).items():
        setattr(mlp, name, _empty_layer(layer, layer.in_features, layer.out_features // hidden * width))
    mlp.fc2 = _empty_layer(mlp.fc2, width, mlp.fc2.out_features)


def _empty_layer(like: nn.Linear, inputs: int, outputs: int, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    layer = kind(inputs, outputs, bias=like.bias is not None, device="meta", dtype=like.weight.dtype)
    return layer.train(like.training)


# ---------------------------------------------------------------------------------------------------------------------
# Attention of which v alone is cut: timm's own forward between two layers that leave dims of v out


class ValueLayer(nn.Linear):
    """Gives (q, k and) v, where v has only `width` of head_dim dims per head; the others are 0, so that shapes stay."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., rows of q and k + H head_dim)."""
        return self.spread(F.linear(x, self.weight, self.bias))

    def spread(self, x: Tensor) -> Tensor:
        """(..., rows of q and k + H width) -> (..., rows of q and k + H head_dim)."""
        kept = self.num_heads * self.width
        others, v = x.split([x.shape[-1] - kept, kept], dim=-1)
        v = F.pad(v.unflatten(-1, (self.num_heads, self.width)), (0, self.head_dim - self.width))
        return torch.cat([others, v.flatten(-2)], dim=-1)


class ValueProjection(nn.Linear):
    """The output projection of an attention whose v has only `width` of head_dim dims per head: it reads those."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., H head_dim) -> (..., D)."""
        return F.linear(self.kept(x), self.weight, self.bias)

    def kept(self, x: Tensor) -> Tensor:
        """(..., H head_dim) -> (..., H width)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))[..., : self.width].flatten(-2)


def set_value_width(attn: nn.Module, width: int, head_dim: int) -> None:
    """Sets num_heads, head_dim and width of both layers that v goes through.

    Where timm keeps biases beside the qkv layer it either adds them to the layer's output or uses the layer's weight
    directly. A cut layer has to be called, so the first way is chosen.
    """
    for layer in (getattr(attn, value_layer_name(attn)), attn.proj):
        layer.num_heads, layer.head_dim, layer.width = attn.num_heads, head_dim, width
    if getattr(attn, "v_bias", None) is not None:
        attn.qkv_bias_separate = width < head_dim or getattr(attn, "bias_separate_when_whole", False)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks with a bypassed branch


class Bypass:
    """A block of timm's without the children of one branch, or of both: what is not there adds and costs nothing.

    hasattr() is what torch.jit.script understands, too.
    """


class BypassBlock(Bypass, Block):
    """timm's Block, with a bypassed branch."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: (B, N, D) -> the same shape."""
        if hasattr(self, "attn"):
            y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
            x = x + self.drop_path1(self.ls1(y))
        if hasattr(self, "mlp"):
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class BypassEvaBlock(Bypass, EvaBlock):
    """timm's EvaBlock, with a bypassed branch."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x: (B, N, D) -> the same shape."""
        if hasattr(self, "attn"):
            y = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
            x = x + self.drop_path1(y if self.gamma_1 is None else self.gamma_1 * y)
        if hasattr(self, "mlp"):
            y = self.mlp(self.norm2(x))
            x = x + self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)
        return x


class _BypassWindows(Bypass):
    def set_input_size(
        self, feat_size: tuple[int, int], window_size: tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """As timm's, also without an attention."""
        if hasattr(self, "attn"):
            super().set_input_size(feat_size, window_size, always_partition)
            return
        self.input_resolution = feat_size
        if always_partition is not None:
            self.always_partition = always_partition
        self.window_size, self.shift_size = self._calc_window_shift(window_size)
        self.window_area = self.window_size[0] * self.window_size[1]


class BypassSwinBlock(_BypassWindows, SwinTransformerBlock):
    """timm's SwinTransformerBlock, with a bypassed branch."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, D) -> the same shape."""
        if hasattr(self, "attn"):
            x = x + self.drop_path1(self._attn(self.norm1(x)))
        if hasattr(self, "mlp"):
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class BypassSwinV2Block(_BypassWindows, SwinTransformerV2Block):
    """timm's SwinTransformerV2Block, with a bypassed branch."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, D) -> the same shape."""
        if hasattr(self, "attn"):
            x = x + self.drop_path1(self.norm1(self._attn(x)))
        if hasattr(self, "mlp"):
            x = x + self.drop_path2(self.norm2(self.mlp(x)))
        return x


BYPASS: dict[type[nn.Module], type[Bypass]] = {
    Block: BypassBlock,
    EvaBlock: BypassEvaBlock,
    SwinTransformerBlock: BypassSwinBlock,
    SwinTransformerV2Block: BypassSwinV2Block,
}


def _bypass(block: nn.Module, kind: str) -> None:
    for name in branch_children(block, kind):
        delattr(block, name)
    block.__class__ = BYPASS.get(type(block), type(block))
