"""Small models of Hugging Face transformers, each with the model of timm that its weights fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from tiny import random_data
from torch import Tensor, nn

hf.logging.disable_progress_bar()
IMAGES = random_data(2)[0].float()
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
MLP = SIZES | {"intermediate_size": 96}
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}  # timm's words for SIZES
THIN = SHAPE | {"mlp_ratio": 2}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 9}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SWIN = {"embed_dim": 16, "depths": [2, 2, 2], "num_heads": [2, 2, 4], "window_size": 2, "patch_size": 4}
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
    eps: of its norms, where timm's differs.
    """

    model: Callable[[], nn.Module]
    name: str
    kwargs: dict[str, Any]
    outputs: Outputs
    left_out: str = ""
    eps: str = ""


def two_towers(kind: str) -> Any:
    """A configuration of CLIP or SigLIP with its text tower."""
    return getattr(hf, f"{kind}Config")(vision_config=MLP, text_config=TEXT, num_labels=5)


MASK = "embeddings.mask_token"
DINOV3 = SHAPE | {"mlp_ratio": 2, "global_pool": "token"}
CASES = {
    "vit": Case(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**MLP, num_labels=5)),
        *("vit_base_patch16_224", THIN, classifier),
        eps="1e-12",
    ),
    "vit_encoder": Case(
        lambda: hf.ViTModel(hf.ViTConfig(**MLP, qkv_bias=False)),
        *("vit_base_patch16_224", THIN | {"qkv_bias": False}, class_token, "pooler (2)"),
        eps="1e-12",
    ),
    "mae": Case(
        lambda: hf.ViTMAEForPreTraining(
            hf.ViTMAEConfig(**MLP, mask_ratio=0.0, decoder_hidden_size=16, decoder_num_attention_heads=2)
        ),
        *("vit_base_patch16_224", THIN, mae, "decoder (136)"),
        eps="1e-12",
    ),
    "deit": Case(
        lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**MLP, num_labels=5)),
        *("deit_tiny_distilled_patch16_224", THIN, classifier),
        eps="1e-12",
    ),
    "deit_encoder": Case(
        lambda: hf.DeiTModel(hf.DeiTConfig(**MLP), use_mask_token=True),
        *("deit_tiny_distilled_patch16_224", THIN, encoder, f"{MASK}, pooler (2)"),
        eps="1e-12",
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
        *("vit_so400m_patch16_siglip_gap_256", THIN, classifier, "vision_model.head (11)"),
    ),
    "swin": Case(
        lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN, image_size=32, num_labels=5)),
        *("swin_tiny_patch4_window7_224", SWIN | {"img_size": 32}, classifier),
    ),
    "swinv2": Case(
        lambda: hf.Swinv2ForImageClassification(hf.Swinv2Config(**SWIN, image_size=32, num_labels=5)),
        *("swinv2_tiny_window8_256", SWIN | {"img_size": 32}, classifier),
    ),
    "swin_encoder": Case(
        lambda: hf.SwinModel(hf.SwinConfig(**SWIN, image_size=32)),
        *("swin_tiny_patch4_window7_224", SWIN | {"img_size": 32}, siglip),
    ),
}

SMALL = {"hidden_size": 384, "num_attention_heads": 6}
DINOV2 = SMALL | {"image_size": 518, "patch_size": 14}
# Models of the sizes that are published, by the names of timm in docs/MODELS.md. To be made on the meta device.
FULL_SIZE: dict[str, Callable[[], nn.Module]] = {
    "vit_base_patch16_224": lambda: hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000)),
    "deit_small_patch16_224": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, intermediate_size=1536)),
    "deit_small_distilled_patch16_224": lambda: hf.DeiTForImageClassificationWithTeacher(
        hf.DeiTConfig(**SMALL, intermediate_size=1536)
    ),
    "vit_small_patch14_dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINOV2)),
    "vit_small_patch14_reg4_dinov2": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINOV2)),
    "vit_small_patch16_dinov3_qkvb": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(num_register_tokens=4)),
    "vit_base_patch32_clip_quickgelu_224": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig()),
    "vit_base_patch16_siglip_224": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig()),
    "swin_tiny_patch4_window7_224": lambda: hf.SwinForImageClassification(hf.SwinConfig()),
    "swinv2_tiny_window8_256": lambda: hf.Swinv2ForImageClassification(hf.Swinv2Config(image_size=256, window_size=8)),
}
