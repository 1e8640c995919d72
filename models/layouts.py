"""Weights as other projects name them: the layouts of Hugging Face transformers, and what of a file is not taken."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from files import read_json
from utils import say

from .subnetwork import blocks_of

# Hugging Face's names and timm's, of their versions 4 and 5, within the vision tower and within its blocks; ".weight"
# and ".bias" stay as they are. ViT, MAE, DeiT, DINOv2, DINOv3, CLIP, SigLIP, Swin and Swin v2 share them.
NAMES = {
    r"embeddings\.(?:cls_token|class_embedding)": "cls_token",
    r"embeddings\.distillation_token": "dist_token",
    r"embeddings\.register_tokens": "reg_token",
    r"embeddings\.(?:position_embeddings|position_embedding\.weight)": "pos_embed",
    r"embeddings\.(?:patch_embedding|patch_embeddings|patch_embeddings\.projection)": "patch_embed.proj",
    r"embeddings\.norm": "patch_embed.norm",
    r"pre_layrnorm": "norm_pre",
    r"layernorm|post_layernorm": "norm",
    r"layernorm_before|layer_norm1|norm1": "norm1",
    r"layernorm_after|layer_norm2|norm2": "norm2",
    r"attention\.(?:attention|self)\.query|(?:attention|self_attn)\.q_proj": "attn.q",
    r"attention\.(?:attention|self)\.key|(?:attention|self_attn)\.k_proj": "attn.k",
    r"attention\.(?:attention|self)\.value|(?:attention|self_attn)\.v_proj": "attn.v",
    r"attention\.output\.dense|attention\.o_proj|self_attn\.out_proj": "attn.proj",
    r"attention\.(?:self|relative_position_bias)\.(relative_position_bias_table)": r"attn.\1",
    r"attention\.self\.(logit_scale)": r"attn.\1",
    r"attention\.self\.continuous_position_bias_mlp\.([02])": r"attn.cpb_mlp.\1",
    r"layer_scale([12])\.lambda1": r"ls\1.gamma",
    r"intermediate\.dense|mlp\.(?:fc1|weights_in|up_proj)": "mlp.fc1",
    r"mlp\.gate_proj": "mlp.fc1_g",
    r"output\.dense|mlp\.(?:fc2|weights_out|down_proj)": "mlp.fc2",
    r"(downsample\.(?:norm|reduction))": r"\1",
    r"head\.probe": "attn_pool.latent",
    r"head\.attention\.in_proj_(weight|bias)": r"attn_pool.in_proj.\1",
    r"head\.attention\.out_proj": "attn_pool.proj",
    r"head\.layernorm": "attn_pool.norm",
    r"head\.(mlp\.fc[12])": r"attn_pool.\1",
    r"classifier|cls_classifier": "head",
    r"distillation_classifier": "head_dist",
}
_NAMES = [(re.compile(rf"(?:{theirs})(\.weight|\.bias)?"), ours) for theirs, ours in NAMES.items()]
_PATCHES = re.compile(r"(.*\.)?embeddings\.patch_embeddings?\.(?:projection\.)?weight")
_BLOCK = re.compile(r"(?:encoder\.|model\.)?layers?\.(\d+)\.(?:blocks\.(\d+)\.|(?=(downsample)\.))?")
_TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed", "attn_pool.latent")

# What a file holds besides the weights of an encoder and its classifier: text towers, projections into a space that
# images and texts share, and what only pre-training uses.
NOT_TAKEN = re.compile(
    r"(?:text_model|transformer|text|token_embedding|ln_final)\..*|positional_embedding|logit_(?:scale|bias)"
    r"|(?:text|visual)_projection.*|text_projection|visual\.(?:proj|head\..*)"
    r"|(?:.*\.)?mask_token|decoder.*|(?:lm_head|pre_logits|projectors|local_cls_norm)\..*"
    r"|(?:.*\.)?pooler\..*|(?:attn_pool|vision_model\.head)\..*"
)
# What a model computes itself.
BUFFERS = re.compile(r".*(?:position_ids|relative_position_index|relative_coords_table|attn_mask)")

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
_WITH_ANY_ACTIVATION = ("class_embedding", "position_embedding.weight")  # CLIP's names, and SigLIP's
TIMMS_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh"}  # where timm calls them otherwise


def from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in a layout of Hugging Face transformers under timm's names, others as they are.

    The layout is known by the names alone, below any prefix ("vit.", "model.vision_model."). Names that timm has
    nothing for stay: those of NOT_TAKEN for load_weights() to leave out, others for it to refuse.
    """
    patches = next(filter(None, map(_PATCHES.fullmatch, weights)), None)
    if patches is None or weights[patches[0]].ndim != 4:
        return weights
    tower = patches[1] or ""
    around = "".join(tower[:-1].rpartition(".")[:2])  # of "model.vit.", "model.": where a classifier is
    found: dict[str, Tensor] = {}
    try:
        for key, value in weights.items():
            name = _timm_name(key.removeprefix(tower if key.startswith(tower) else around))
            if name in found:
                return weights
            found[name] = value
        _reshape(found)
    except (RuntimeError, LookupError, ValueError):  # of no such model: the weights will not fit any
        return weights
    return found


def _timm_name(name: str) -> str:
    """timm's name of a tensor, or the name as it is."""
    block = _BLOCK.match(name)
    stem, rest = "", name
    if block:
        first, second, downsample = block.groups()
        stem = f"layers.{first}.blocks.{second}." if second else f"blocks.{first}."
        if downsample:  # at the end of a stage there, at the start of the next in timm
            stem = f"layers.{int(first) + 1}."
        rest = name[block.end() :]
    for theirs, ours in _NAMES:
        match = theirs.fullmatch(rest)
        if match:
            return stem + match.expand(ours) + (match.groups()[-1] or "")
    return name


def _reshape(found: dict[str, Tensor]) -> None:
    """Gives the tensors under timm's names timm's shapes, in place: q, k and v in one, tokens (1, n, D), and so on."""
    for key in found.keys() & {*_TOKENS}:
        found[key] = found[key].reshape(1, -1, found[key].shape[-1])
    is_swin = any(key.startswith("layers.") for key in found)
    is_dinov3, is_clip = "pos_embed" not in found and not is_swin, "norm_pre.weight" in found
    has_head = "head.weight" in found
    for key in [*found]:
        if ".attn.q." in key:
            _stack(found, key)
        elif ".mlp.fc1_g." in key and is_dinov3:  # timm keeps the gate of a SwiGLU apart
            found[key.replace("fc1_g", "fc1_x")] = found.pop(key.replace("fc1_g", "fc1"))
        elif ".mlp.fc1_g." in key:
            hidden = key.replace("fc1_g", "fc1")
            found[hidden] = torch.cat([found.pop(key), found[hidden]])
        elif is_dinov3 and key.endswith(("ls1.gamma", "ls2.gamma")):
            found[re.sub(r"ls(\d)\.gamma", r"gamma_\1", key)] = found.pop(key)
        elif key.startswith("attn_pool.") and has_head:
            # SigLIP's classifier takes the mean of the tokens, not the pooled output.
            found[f"vision_model.head.{key}"] = found.pop(key)
        elif key.startswith("attn_pool.in_proj."):
            q, k, v = found.pop(key).chunk(3)
            kind = key.rpartition(".")[2]
            found[f"attn_pool.q.{kind}"], found[f"attn_pool.kv.{kind}"] = q, torch.cat([k, v])
        elif key.startswith("head.") and is_swin:
            found[key.replace("head", "head.fc")] = found.pop(key)
        elif key.startswith("head.") and is_clip:
            # CLIP's classifier takes what no model of timm gives: refused under its own name.
            found[key.replace("head", "classifier")] = found.pop(key)
    if {"reg_token", "cls_token", "pos_embed"} <= found.keys():
        first, others = found["pos_embed"].tensor_split([1], dim=1)
        if first.shape == found["cls_token"].shape:  # timm has no position for the class token beside registers
            found["cls_token"], found["pos_embed"] = found["cls_token"] + first, others


def _stack(found: dict[str, Tensor], q: str) -> None:
    """One tensor for q, k and v; without a bias for k (DINOv3, Swin v2), those of q and v lie beside."""
    keys = [q.replace(".q.", f".{part}.") for part in "qkv"]
    if all(key in found for key in keys):
        found[q.replace(".q.", ".qkv.")] = torch.cat([found.pop(key) for key in keys])
    elif q.endswith(".bias"):
        for part, key in (("q", keys[0]), ("v", keys[2])):
            found[key.replace(f".{part}.bias", f".{part}_bias")] = found.pop(key)


def say_not_taken(names: list[str], source: str) -> None:
    """Says in one line which tensors of a file are not taken, with their numbers."""
    group = re.compile(r"embeddings\.mask_token|vision_model\.head|(?:visual\.)?[^.]+")
    parts = Counter(group.match(name)[0] for name in sorted(names))
    found = [f"{part} ({count})" if count > 1 else part for part, count in parts.items()]
    if found:
        say(f"{source}: not taken, since the model has no such part: {', '.join(found)}")


def say_differences(model: nn.Module, names: Iterable[str], source: Path) -> None:
    """Says where the model may compute something else than the one that the weights come from.

    Weights do not say it: the activation, and the epsilon of the norms. Hugging Face's config.json beside them does.
    names: of the tensors in the file `source`. Raises UserError for a config.json that is not JSON.
    """
    path, block = source.with_name("config.json"), blocks_of(model)[0]
    config = read_json(path) if path.is_file() else None
    config = config if isinstance(config, dict) else {}
    config = config["vision_config"] if isinstance(config.get("vision_config"), dict) else config
    known, eps = config.get("hidden_act"), config.get("layer_norm_eps")
    own = type(block.mlp.act).__name__
    if type(block.mlp) is not Mlp:
        pass  # gated: no layout has two activations for it
    elif isinstance(known, str) and known in ACTIVATIONS:
        x = torch.linspace(-4, 4, 81)
        if not torch.allclose(block.mlp.act(x.clone()), ACTIVATIONS[known](x), atol=1e-6):
            mend = f"--model-kwargs act_layer={TIMMS_ACTIVATIONS.get(known, known)} gives those of the file"
            say(f"{path} says hidden_act {known}, the model has {own}, so the outputs differ: {mend}")
    elif any(name.endswith(_WITH_ANY_ACTIVATION) for name in names):
        say(f"checkpoint {source} does not say its activation, the model has {own}: see docs/MODELS.md")
    if isinstance(eps, float) and eps != block.norm1.eps:
        say(f"{path} says layer_norm_eps {eps:g}, the model has {block.norm1.eps:g}")
