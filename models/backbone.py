"""timm's vision transformers: making one, checking that it is of a kind we know, and naming its modules."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from files import load_checkpoint, weights_of
from utils import UserError, first_line, say

# The authors' names for the DeiT models.
ALIASES = {
    "vit_tiny": "deit_tiny_patch16_224",
    "vit_small": "deit_small_patch16_224",
    "vit_base": "deit_base_patch16_224",
}

# The children of a block that make up each branch.
BRANCHES = {"attn": ("norm1", "attn", "ls1", "drop_path1"), "mlp": ("norm2", "mlp", "ls2", "drop_path2")}


@dataclass(frozen=True)
class Module:
    """One branch of one block, as it stands in a model.

    width: dims per head (attn) or hidden units (mlp); 0 where the branch is bypassed.
    heads: 1 for an MLP.  dim: D, the embedding dimension.
    """

    key: str
    block: int
    kind: str
    width: int
    heads: int
    dim: int


def create_backbone(name: str, *, pretrained: bool = False, **model_kwargs: Any) -> VisionTransformer:
    """timm.create_model for the vision transformers that this project supports.

    Raises UserError for an unknown name (with near ones), bad arguments, or a model that is not a plain ViT.
    """
    name = ALIASES.get(name, name)
    if not timm.is_model(name):
        known = [*ALIASES, *timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]
        near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or "deit_tiny_patch16_224"
        raise UserError(f"unknown model {name!r}; near names: {near}")
    try:
        model = timm.create_model(name, pretrained=pretrained, **model_kwargs)
    except Exception as error:  # timm asserts, raises TypeError for unknown arguments, and hub errors of many types
        raise UserError(f"timm could not make {name} with {model_kwargs}: {first_line(error)}") from error
    check_plain(model, name)
    return model


def check_plain(model: nn.Module, name: str) -> None:
    """Raises UserError unless every block is timm's pre-norm Block of a plain Attention and a plain Mlp."""
    reason = None
    if not isinstance(model, VisionTransformer):
        reason = f"it is a {type(model).__name__}"
    elif model.attn_pool is not None:
        reason = "it pools with attention"
    else:
        for index, block in enumerate(model.blocks):
            reason = reason or _unsupported(block, index)
    if reason:
        raise UserError(f"{name} is not a plain vision transformer ({reason}); use a deit_*, deit3_* or vit_* model")


def _unsupported(block: nn.Module, index: int) -> str | None:
    if type(block) is not Block:
        return f"block {index} is a {type(block).__name__}"
    if type(block.attn) is not Attention or getattr(block.attn, "gate", None) is not None:
        return f"block {index} has a {type(block.attn).__name__} of another kind"
    if not all(isinstance(norm, nn.Identity) for norm in (block.attn.q_norm, block.attn.k_norm, block.attn.norm)):
        return f"block {index} has a norm inside its attention"
    if type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity):
        return f"block {index} has a {type(block.mlp).__name__} of another kind"
    return None


def modules_of(model: VisionTransformer) -> dict[str, Module]:
    """The modules of a backbone, or of a sub-network cut from one, in running order; keys "0.attn", "0.mlp", ..."""
    found = {}
    for index, block in enumerate(model.blocks):
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        heads = attn.num_heads if attn is not None else 0
        width = attn.head_dim if attn is not None else 0
        found[f"{index}.attn"] = Module(f"{index}.attn", index, "attn", width, heads, model.embed_dim)
        hidden = mlp.fc1.out_features if mlp is not None else 0
        found[f"{index}.mlp"] = Module(f"{index}.mlp", index, "mlp", hidden, 1, model.embed_dim)
    return found


def full_widths(model: VisionTransformer) -> dict[str, int]:
    """The widths at which the model stands: of a backbone, the full ones."""
    return {key: module.width for key, module in modules_of(model).items()}


def check_widths(model: VisionTransformer, widths: dict[str, int]) -> None:
    """Raises UserError unless `widths` names every module of the model and each width lies in 0..full."""
    full = full_widths(model)
    if widths.keys() != full.keys():
        odd = sorted(widths.keys() ^ full.keys())[0]
        raise UserError(f"widths: module {odd} is {'missing' if odd in full else 'not in the model'}")
    for key, width in widths.items():
        if not 0 <= width <= full[key]:
            raise UserError(f"widths: {key} is {width}, outside 0..{full[key]}")


def last_layer(block: Block, kind: str) -> nn.Linear:
    """The linear layer that ends a branch; its inputs are what a width cuts."""
    return block.attn.proj if kind == "attn" else block.mlp.fc2


# Running a backbone in parts. timm runs all blocks in one call; importance needs the inputs of each.


def embed(model: VisionTransformer, images: Tensor) -> Tensor:
    """Images (B, C, height, width) to the first block's input (B, N, D)."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def classify(model: VisionTransformer, x: Tensor) -> Tensor:
    """The last block's output (B, N, D) to logits (B, classes)."""
    return model.forward_head(model.norm(x))


def attention_branch(block: Block, x: Tensor, **kwargs: Any) -> Tensor:
    """What the block's attention adds to the residual stream: (B, N, D) -> (B, N, D)."""
    return block.drop_path1(block.ls1(block.attn(block.norm1(x), **kwargs)))


def mlp_branch(block: Block, x: Tensor) -> Tensor:
    """What the block's MLP adds to the residual stream: (B, N, D) -> (B, N, D)."""
    return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class BypassBlock(Block):
    """timm's Block in which a branch ("attn" or "mlp") may be bypassed: it adds nothing and costs nothing."""

    bypassed: frozenset[str] = frozenset()

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        if not self.bypassed:
            return super().forward(x, **kwargs)
        if "attn" not in self.bypassed:
            x = x + attention_branch(self, x, **kwargs)
        if "mlp" not in self.bypassed:
            x = x + mlp_branch(self, x)
        return x


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str, assign: bool = False) -> None:
    """Strict load; `assign` takes the tensors themselves, for a model on the meta device.

    Raises UserError that names the first key that differs, with both shapes.
    """
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    for key in [*own, *(key for key in given if key not in own)]:
        if own.get(key) != given.get(key):
            there, here = given.get(key, "absent"), own.get(key, "absent")
            raise UserError(f"{source} is of another architecture: {key} is {there} there, {here} in the model")
    model.load_state_dict(weights, assign=assign)


def load_backbone(
    name: str,
    model_kwargs: dict[str, Any],
    *,
    num_classes: int,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    use_ema: bool = False,
) -> VisionTransformer:
    """A backbone with the head of its weights: of the checkpoint, of timm's pretrained ones, else new weights.

    num_classes counts only where no weights say otherwise. Raises UserError for weights of another architecture.
    """
    if checkpoint is None:
        classes = {} if pretrained else {"num_classes": num_classes}
        return create_backbone(name, pretrained=pretrained, **classes | model_kwargs)
    weights = weights_of(load_checkpoint(checkpoint), checkpoint, use_ema)
    head = weights.get("head.weight")
    classes = {"num_classes": num_classes if head is None else len(head)}
    model = create_backbone(name, **classes | model_kwargs)
    load_weights(model, weights, f"checkpoint {checkpoint}")
    return model


def fit_head(model: VisionTransformer, num_classes: int, *, remake: bool) -> None:
    """Makes the head one of num_classes: a new one if `remake`, else a UserError where it differs."""
    if model.num_classes == num_classes:
        return
    if not remake:
        raise UserError(
            f"the model has {model.num_classes} classes, the data has {num_classes}: give the data it is for"
        )
    say(f"new head: {model.num_classes} classes in the weights, {num_classes} in the data")
    model.reset_classifier(num_classes)
