"""Weights of other projects: what Hugging Face's model gives, and what the official one gives, timm's gives as well.

All weights are random, so that no tensor can take the place of another unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import draw_parameters, random_data, relative
from torch import Tensor, nn

import supernet

hf.logging.disable_progress_bar()
IMAGES = random_data(2)[0].float()
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
MLP = SIZES | {"intermediate_size": 96}
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}  # timm's words for SIZES
THIN = SHAPE | {"mlp_ratio": 2}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 9}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SWIN = {
    "embed_dim": 16,
    "depths": [2, 2, 2],
    "num_heads": [2, 2, 4],
    "window_size": 2,
    "image_size": 32,
    "patch_size": 4,
}
Outputs = Callable[[nn.Module], tuple[Tensor | None, Tensor | None]]


def encoder(model: nn.Module) -> tuple[Tensor, None]:
    return model(IMAGES).last_hidden_state, None


def class_token(model: nn.Module) -> tuple[Tensor, Tensor]:
    tokens = model(IMAGES).last_hidden_state
    return tokens, tokens[:, 0]


def classifier(model: nn.Module) -> tuple[None, Tensor]:
    return None, model(IMAGES).logits


def mae(model: nn.Module) -> tuple[Tensor, None]:
    """Of all patches, in their own order: the noise says which are masked."""
    return model.vit(IMAGES, noise=torch.arange(16.0).expand(2, 16)).last_hidden_state, None


def clip(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Hugging Face norms the class token alone, timm all tokens."""
    tower = getattr(model, "vision_model", model)
    found = tower(IMAGES)
    return tower.post_layernorm(found.last_hidden_state), found.pooler_output


def siglip(model: nn.Module) -> tuple[Tensor, Tensor]:
    found = getattr(model, "vision_model", model)(IMAGES)
    return found.last_hidden_state, found.pooler_output


@dataclass
class Case:
    """A model of transformers, timm's name and arguments for it, what it gives, and what of its file is not taken.

    outputs: the tokens after the last norm, and the pooled output or logits, each where the model gives it.
    """

    model: Callable[[], nn.Module]
    name: str
    kwargs: dict[str, Any]
    outputs: Outputs
    left_out: str = ""
    said: list[str] = field(default_factory=list)


def two_towers(kind: str) -> Any:
    """A configuration of CLIP or SigLIP with its text tower."""
    return getattr(hf, f"{kind}Config")(vision_config=MLP, text_config=TEXT, num_labels=5)


MASK = "embeddings.mask_token"
DINOV3 = SHAPE | {"mlp_ratio": 2, "global_pool": "token"}
EPS = ["config.json says layer_norm_eps 1e-12, the model has 1e-06"]
CASES = {
    "vit": Case(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**MLP, num_labels=5)),
        *("vit_base_patch16_224", THIN, classifier),
        said=EPS,
    ),
    "vit_encoder": Case(
        lambda: hf.ViTModel(hf.ViTConfig(**MLP, qkv_bias=False)),
        *("vit_base_patch16_224", THIN | {"qkv_bias": False}, class_token, "pooler (2)"),
        said=EPS,
    ),
    "mae": Case(
        lambda: hf.ViTMAEForPreTraining(
            hf.ViTMAEConfig(**MLP, mask_ratio=0.0, decoder_hidden_size=16, decoder_num_attention_heads=2)
        ),
        *("vit_base_patch16_224", THIN, mae, "decoder (134)"),
        said=EPS,
    ),
    "deit": Case(
        lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**MLP, num_labels=5)),
        *("deit_tiny_distilled_patch16_224", THIN, classifier),
        said=EPS,
    ),
    "deit_encoder": Case(
        lambda: hf.DeiTModel(hf.DeiTConfig(**MLP), use_mask_token=True),
        *("deit_tiny_distilled_patch16_224", THIN, encoder, f"{MASK}, pooler (2)"),
        said=EPS,
    ),
    "dinov2": Case(
        lambda: hf.Dinov2Model(hf.Dinov2Config(**SIZES)),
        *("vit_small_patch14_dinov2", SHAPE, class_token, MASK),
    ),
    "dinov2_swiglu": Case(
        lambda: hf.Dinov2Model(hf.Dinov2Config(**SIZES, use_swiglu_ffn=True)),
        *("vit_giant_patch14_dinov2", SHAPE, class_token, MASK),
    ),
    "dinov2_registers": Case(
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SIZES)),
        *("vit_small_patch14_reg4_dinov2", SHAPE, class_token, MASK),
    ),
    "dinov3": Case(
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**MLP, num_register_tokens=4)),
        *("vit_small_patch16_dinov3_qkvb", DINOV3, class_token, MASK),
    ),
    "dinov3_swiglu": Case(
        lambda: hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(**MLP, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu")
        ),
        *("vit_small_plus_patch16_dinov3_qkvb", DINOV3 | {"mlp_ratio": 2}, class_token, MASK),
    ),
    "dinov3_without_biases": Case(
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**MLP, num_register_tokens=4, query_bias=False, value_bias=False)),
        *("vit_small_patch16_dinov3", DINOV3, class_token, MASK),
    ),
    "clip": Case(
        lambda: hf.CLIPModel(two_towers("CLIP")),
        *("vit_base_patch32_clip_quickgelu_224", THIN, clip),
        "logit_scale, text_model (20), text_projection, visual_projection",
    ),
    "clip_encoder": Case(
        lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**MLP, hidden_act="gelu")),
        *("vit_base_patch32_clip_224", THIN, clip),
    ),
    "siglip": Case(
        lambda: hf.SiglipModel(two_towers("Siglip")),
        *("vit_base_patch16_siglip_224", THIN | {"act_layer": "gelu_tanh"}, siglip),
        "logit_bias, logit_scale, text_model (22)",
    ),
    "siglip_classifier": Case(
        lambda: hf.SiglipForImageClassification(two_towers("Siglip")),
        *("vit_so400m_patch16_siglip_gap_256", THIN, classifier, "pooler (11)"),
    ),
    "swin": Case(
        lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN, num_labels=5)),
        *("swin_tiny_patch4_window7_224", {}, classifier),
    ),
    "swin_encoder": Case(
        lambda: hf.SwinModel(hf.SwinConfig(**SWIN)),
        *("swin_tiny_patch4_window7_224", {}, siglip),
    ),
}
for _name in ("swin", "swin_encoder"):
    CASES[_name].kwargs = {key: value for key, value in SWIN.items() if key != "image_size"} | {"img_size": 32}
CASES["siglip"].left_out = CASES["siglip"].left_out


@dataclass
class Written:
    """A model of transformers with random weights, what it gives, and its files in the two namings."""

    case: Case
    tokens: Tensor | None
    output: Tensor | None
    files: dict[str, Path]


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """saved: as save_pretrained() writes it and hubs have it.  own: the state dict of the model of this version."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp(request.param)
    model = draw_parameters(case.model())
    model.save_pretrained(folder)
    torch.save({"model": {f"module.{key}": value for key, value in model.state_dict().items()}}, folder / "own.pth")
    with torch.no_grad():
        tokens, output = case.outputs(model)
    return Written(case, tokens, output, {"saved": folder / "model.safetensors", "own": folder / "own.pth"})


@pytest.mark.parametrize("naming", ["saved", "own"])
def test_timms_model_gives_what_the_model_of_transformers_gives(written: Written, naming: str, capsys):
    case = written.case
    net = supernet.load(written.files[naming], name=case.name, model_kwargs=case.kwargs, plain_weights=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == bool(case.left_out) + len(case.said), lines
    print(lines)
    with torch.no_grad():
        tokens = net.model.forward_features(IMAGES)
        if written.tokens is not None:
            assert relative(tokens.flatten(1, -2), written.tokens) < 1e-5
        if written.output is not None:
            assert relative(net.model(IMAGES), written.output) < 1e-5
