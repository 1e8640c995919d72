"""Weights as their authors publish them, through timm's own functions, and timm models of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from programs import ROOT
from safetensors.torch import save_file
from tiny import SHAPE, draw_parameters, random_data, relative
from torch import Tensor, nn

import supernet
from models.backbone import create_backbone, family_named
from supernet.facts import named
from utils import UserError

Weights = dict[str, Tensor]
IMAGES = random_data(2)[0].float()
HEADLESS = SHAPE | {"num_classes": 0}


def renamed(weights: Weights, names: dict[str, str], prefix: str = "") -> Weights:
    """Weights with each pattern of `names` replaced in their names, and a prefix."""
    found = {}
    for key, value in weights.items():
        for ours, theirs in names.items():
            key = re.sub(ours, theirs, key)
        found[prefix + key] = value
    return found


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------------------------------------------------------------
# From timm's names back to the authors'


def deit(model: nn.Module) -> Weights:
    return model.state_dict()


def mae(model: nn.Module) -> Weights:
    decoder = {"decoder_pos_embed": noise(1, 17, 8), "decoder_blocks.0.norm1.weight": noise(8)}
    return model.state_dict() | decoder | {"mask_token": noise(1, 1, 8)}


def dinov2(model: nn.Module) -> Weights:
    """The class token has a position there, also beside registers."""
    weights = renamed(model.state_dict(), {"reg_token": "register_tokens"})
    if hasattr(model.blocks[0].mlp, "gate_last"):
        weights = renamed(weights, {r"mlp\.fc1": "mlp.w12", r"mlp\.fc2": "mlp.w3"})
    if "register_tokens" in weights:
        position = noise(1, 1, 48)
        weights["cls_token"] = weights["cls_token"] - position
        weights["pos_embed"] = torch.cat([position, weights["pos_embed"]], dim=1)
    return weights | {"mask_token": noise(1, 48)}


def dinov3(model: nn.Module) -> Weights:
    """q, k and v have one bias, whose part for k is masked."""
    names = {"reg_token": "storage_tokens", r"gamma_(\d)": r"ls\1.gamma"}
    names |= {"fc1_g": "w1", "fc1_x": "w2", "fc2": "w3"} if hasattr(model.blocks[0].mlp, "fc1_g") else {}
    weights = renamed(model.state_dict(), names)
    for index in range(len(model.blocks)):
        stem = f"blocks.{index}.attn"
        if f"{stem}.q_bias" in weights:
            q, v = weights.pop(f"{stem}.q_bias"), weights.pop(f"{stem}.v_bias")
        else:
            q, v = torch.zeros(2, 48)
        weights[f"{stem}.qkv.bias"] = torch.cat([q, noise(48), v])
        weights[f"{stem}.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(48)
    periods = model.rope.periods.bfloat16().float()
    return weights | {"mask_token": noise(1, 48), "rope_embed.periods": periods, "local_cls_norm.weight": noise(48)}


def clip(model: nn.Module) -> Weights:
    names = {
        r"patch_embed\.proj": "conv1",
        "pos_embed": "positional_embedding",
        "cls_token": "class_embedding",
        "norm_pre": "ln_pre",
        r"^norm\.": "ln_post.",
        "norm([12])": r"ln_\1",
        r"attn\.qkv\.": "attn.in_proj_",
        r"attn\.proj": "attn.out_proj",
        r"mlp\.fc1": "mlp.c_fc",
        r"mlp\.fc2": "mlp.c_proj",
        r"^blocks": "transformer.resblocks",
    }
    weights = renamed(model.state_dict(), names, "visual.")
    weights["visual.positional_embedding"] = weights["visual.positional_embedding"][0]
    weights["visual.class_embedding"] = weights["visual.class_embedding"][0, 0]
    text = {"transformer.resblocks.0.ln_1.weight": noise(8), "token_embedding.weight": noise(9, 8)}
    text |= {"ln_final.weight": noise(8), "positional_embedding": noise(7, 8), "text_projection": noise(8, 8)}
    return weights | text | {"logit_scale": torch.tensor(4.6), "visual.proj": noise(48, 8)}


def siglip(model: nn.Module) -> Weights:
    """As open_clip keeps a timm model."""
    text = {"text.token_embedding.weight": noise(9, 8), "text.ln_final.bias": noise(8), "logit_bias": noise(1)}
    text["adapter.weight"] = noise(8)  # no part that is known, but outside the tower
    return renamed(model.state_dict(), {}, "visual.trunk.") | text | {"visual.head.proj.weight": noise(8, 48)}


DINOV2, DINOV3 = "mask_token", "local_cls_norm, mask_token"
CLIP = "ln_final, logit_scale, positional_embedding, text_projection, token_embedding, transformer, visual.proj"
LAYOUTS: dict[str, tuple[Callable[[nn.Module], Weights], str, dict, str]] = {
    "deit": (deit, "deit_tiny_distilled_patch16_224", SHAPE, ""),
    "mae": (mae, "vit_base_patch16_224.mae", HEADLESS, "decoder_blocks, decoder_pos_embed, mask_token"),
    "dinov2": (dinov2, "vit_small_patch14_dinov2", HEADLESS, DINOV2),
    "dinov2_swiglu": (dinov2, "vit_giant_patch14_dinov2", HEADLESS, DINOV2),
    "dinov2_registers": (dinov2, "vit_small_patch14_reg4_dinov2", HEADLESS, DINOV2),
    "dinov3": (dinov3, "vit_small_patch16_dinov3_qkvb", HEADLESS, DINOV3),
    "dinov3_swiglu": (dinov3, "vit_small_plus_patch16_dinov3_qkvb", HEADLESS, DINOV3),
    "dinov3_without_biases": (dinov3, "vit_small_patch16_dinov3", HEADLESS, DINOV3),
    "clip": (clip, "vit_base_patch32_clip_quickgelu_224", HEADLESS, CLIP),
    "siglip": (siglip, "vit_base_patch16_siglip_224", HEADLESS, "adapter, logit_bias, text (2), visual.head"),
}


def opened(path: Path, layout: str, change: Callable[[Weights], object] = id, **more) -> tuple[nn.Module, nn.Module]:
    """A random model of timm, and what its weights open as in the authors' layout."""
    theirs, name, kwargs, _ = LAYOUTS[layout]
    model = draw_parameters(create_backbone(name, **kwargs))
    weights = theirs(model)
    change(weights)
    torch.save({"model": weights}, path)
    kwargs = {key: value for key, value in kwargs.items() if key != "num_classes"} | more
    return model, supernet.load(path, name=name, model_kwargs=kwargs, plain_weights=True).model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_authors_weights_are_taken_and_the_rest_is_named_in_one_line(tmp_path, layout, capsys):
    path = tmp_path / "x.pth"
    model, found = opened(path, layout)
    with torch.no_grad():
        assert relative(found(IMAGES), model(IMAGES)) < 1e-5
        assert relative(found.forward_features(IMAGES), model.forward_features(IMAGES)) < 1e-5
    left_out = LAYOUTS[layout][3]
    lines = [f"checkpoint {path}: not taken, since the model has no such part: {left_out}"] if left_out else []
    if layout == "clip":
        lines += [f"checkpoint {path} does not say its activation, the model has QuickGELU: see docs/MODELS.md"]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("layout", ["clip", "siglip"])
def test_a_vision_tower_may_be_saved_alone(tmp_path, layout, capsys):
    def tower(weights: Weights) -> None:
        alone = {key[len("visual.") :]: value for key, value in weights.items() if key.startswith("visual.")}
        weights.clear()
        weights.update(alone)

    model, found = opened(tmp_path / "x.pth", layout, tower)
    assert torch.equal(found(IMAGES), model(IMAGES))
    assert re.search(r"no such part: visual\.(proj|head)\n", capsys.readouterr().out)


@pytest.mark.parametrize("layout", ["clip", "siglip", "dinov2_registers"])
def test_they_are_resampled_to_another_size(tmp_path, layout, capsys):
    _, found = opened(tmp_path / "x.pth", layout, img_size=48)
    assert found(torch.randn(1, 3, 48, 48)).isfinite().all()
    resampled = [line for line in capsys.readouterr().out.splitlines() if "x.pth: resampled" in line]
    tokens = {"clip": 37, "siglip": 36, "dinov2_registers": 36}[layout]
    assert len(resampled) == 1 and re.search(rf"as timm does: pos_embed .*-> \(1, {tokens}, 48\)$", resampled[0])


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("clip", lambda w: w.pop("visual.ln_post.bias"), "norm.bias is absent there"),
        ("clip", lambda w: w.update({"visual.adapter": noise(2)}), "adapter is (2,) there, absent in the model"),
        ("mae", lambda w: w.update({"encoder_extra": noise(2)}), "encoder_extra is (2,) there, absent in the model"),
        ("dinov2", lambda w: w.pop("blocks.1.ls2.gamma"), "blocks.1.ls2.gamma is absent there"),
        (
            "dinov3_without_biases",
            lambda w: w["blocks.1.attn.qkv.bias"][-1].fill_(0.5),
            "blocks.1.attn.qkv.bias is (144,) there, absent in the model",
        ),
        (
            "dinov3",
            lambda w: w.pop("blocks.0.attn.qkv.bias_mask"),
            "blocks.0.attn.qkv.bias is (144,) there, absent in the model",
        ),
        (
            "dinov3",
            lambda w: w["rope_embed.periods"].mul_(1.5),
            "rope_embed.periods is (4,) there, absent in the model",
        ),
    ],
)
def test_what_would_change_the_output_is_not_left_out(tmp_path, layout, change, message):
    with pytest.raises(UserError, match=re.escape(f"x.pth is of another architecture: {message}")):
        opened(tmp_path / "x.pth", layout, change)


def test_a_pooling_that_the_named_model_does_not_have_is_left_out(tmp_path, capsys):
    """As timm itself does: SigLIP's tokens without its attention pooling."""
    model = draw_parameters(create_backbone("vit_base_patch16_siglip_224", **HEADLESS))
    torch.save(model.state_dict(), tmp_path / "x.pth")
    kwargs = {key: value for key, value in SHAPE.items() if key != "num_classes"}
    name = "vit_base_patch16_siglip_gap_224"
    found = supernet.load(tmp_path / "x.pth", name=name, model_kwargs=kwargs, plain_weights=True).model
    assert torch.equal(found.forward_features(IMAGES), model.forward_features(IMAGES))
    assert capsys.readouterr().out.endswith("the model has no such part: attn_pool (13)\n")


def test_the_models_that_the_documentation_names_are_supported():
    section = (ROOT / "docs/MODELS.md").read_text().partition("## Weights from elsewhere")[2]
    names = re.findall(r"`((?:vit|deit|swin|swinv2)_\w+)`", section)
    assert len(names) > 12
    for name in names:
        assert family_named(name)


# ---------------------------------------------------------------------------------------------------------------------
# Names on a hub

ARCHITECTURE = "vit_small_patch14_dinov2"
ON_THE_HUB = SHAPE | {"num_classes": 0, "img_size": [32, 32]}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """timm's download gives the files of a folder: a model of another size, with a normalization of its own."""
    model = draw_parameters(create_backbone(ARCHITECTURE, **ON_THE_HUB | {"img_size": 32}))
    page = {"architecture": ARCHITECTURE, "num_classes": 0, "model_args": ON_THE_HUB}
    config = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 32, 32], "num_classes": 0}
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(page | {"pretrained_cfg": config}))
    save_file(model.state_dict(), folder / "model.safetensors")

    def download(repo_id: str, filename: str, **_: object) -> str:
        if repo_id != "owner/dino":
            raise OSError(f"404: {repo_id}")
        return str(folder / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    return model


@pytest.mark.parametrize("source", ["hf-hub:owner/dino", "hf_hub:owner/dino", "hf-hub:owner/dino@main"])
def test_a_model_of_a_hub_is_written_down_under_its_plain_name(hub, source, tmp_path, monkeypatch):
    net = supernet.create(source, pretrained=True)
    assert torch.equal(net.model(IMAGES), hub(IMAGES))
    said = net.describe()
    assert (said["model"], said["model_kwargs"]) == (ARCHITECTURE, ON_THE_HUB)
    assert said["preprocessing"]["mean"] == [0.1, 0.2, 0.3] and said["preprocessing"]["input_size"] == [3, 32, 32]
    net.save(tmp_path / "small", net.cut(0))
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", None)  # no network
    again = supernet.load(tmp_path / "small")
    assert torch.equal(again.model(IMAGES), hub(IMAGES)) and again.describe() == said


def test_a_name_on_a_hub_says_what_weights_are_of(hub, tmp_path):
    torch.save(hub.state_dict(), tmp_path / "x.pth")
    net = supernet.load(tmp_path / "x.pth", name="hf-hub:owner/dino", plain_weights=True)
    assert torch.equal(net.model(IMAGES), hub(IMAGES))
    assert net.name == ARCHITECTURE and net.preprocessing["std"] == [0.4, 0.5, 0.6]
    new = supernet.create("hf-hub:owner/dino", {"depth": 1})
    assert len(new.model.blocks) == 1 and new.describe()["model_kwargs"] == ON_THE_HUB | {"depth": 1}
    assert not torch.equal(new.model.patch_embed.proj.weight, hub.patch_embed.proj.weight)


def test_names_that_no_hub_has_are_one_line(hub, tmp_path):
    for name, message in {
        "hf-hub:owner/other": r"hf-hub:owner/other could not be read as a model of timm: 404: owner/other",
        "ftp:owner/dino": r"ftp:owner/dino could not be read as a model of timm: Unknown model source 'ftp'",
        "owner/dino": r"unknown model 'owner/dino'; near names: ",
    }.items():
        with pytest.raises(UserError, match=message):
            supernet.create(name, pretrained=True)
    for page, message in (
        ({"model_type": "vit"}, "could not be read as a model of timm"),
        ({"architecture": "resnet18", "pretrained_cfg": {}}, "resnet18 is not supported; these are"),
        (
            {"architecture": ARCHITECTURE, "pretrained_cfg": {}, "model_args": {"file": "x"}},
            "file does not shape a",
        ),
    ):
        (tmp_path / "hub/config.json").write_text(json.dumps(page))
        with pytest.raises(UserError, match=message):
            named("hf-hub:owner/dino")


def test_a_file_cannot_name_a_hub(hub, tmp_path):
    """Only a flag can: what a file says is not fetched."""
    settings = {"model": "hf-hub:owner/dino", "model_kwargs": {}}
    torch.save({"model": hub.state_dict(), "settings": settings}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="unknown model 'hf-hub:owner/dino'; near names"):
        supernet.load(tmp_path / "x.pth", plain_weights=True)
