"""Weights of other projects: what Hugging Face's model gives, and what the official one gives, timm's gives as well.

All weights are random, so that no tensor can take the place of another unnoticed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from layout_cases import CASES, FULL_SIZE, IMAGES, SIZES, Case, two_towers
from programs import ROOT
from safetensors.torch import load_file, save_file
from tiny import draw_parameters, relative
from torch import Tensor, nn

import supernet
from models.backbone import create_backbone
from models.layouts import BUFFERS, NOT_TAKEN
from models.loading import head_size, load_weights, prepared
from utils import UserError


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
    folder, expected = written.files[naming].parent, []
    if case.left_out:
        expected += [
            f"checkpoint {written.files[naming]}: not taken, since the model has no such part: {case.left_out}"
        ]
    if case.eps:
        expected += [f"{folder}/config.json says layer_norm_eps {case.eps}, the model has 1e-06"]
    assert capsys.readouterr().out.splitlines() == expected
    with torch.no_grad():
        tokens = net.model.forward_features(IMAGES)
        if written.tokens is not None:
            assert relative(tokens.flatten(1, -2), written.tokens) < 1e-5
        if written.output is not None:
            assert relative(net.model(IMAGES), written.output) < 1e-5


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_published_sizes_fit_the_models_that_the_documentation_names(name: str):
    assert f"`{name}`" in (ROOT / "docs/MODELS.md").read_text()
    with torch.device("meta"):
        weights = prepared(FULL_SIZE[name]().state_dict())
        model = create_backbone(name, num_classes=head_size(weights))
    own = {key: value.shape for key, value in model.state_dict().items()}
    foreign = {key for key in weights if key not in own and not (NOT_TAKEN.fullmatch(key) or BUFFERS.fullmatch(key))}
    assert not foreign and own == {key: value.shape for key, value in weights.items() if key in own}


# ---------------------------------------------------------------------------------------------------------------------
# One file, changed


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The file of the case "vit", without the file."""
    folder = tmp_path_factory.mktemp("vit")
    draw_parameters(CASES["vit"].model()).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def opened(folder: Path, case: str, weights: dict[str, Tensor], **more: Any) -> nn.Module:
    """What weights open as, by the name and arguments of the case."""
    save_file(weights, folder / "model.safetensors")
    kwargs = CASES[case].kwargs | more
    return supernet.load(
        folder / "model.safetensors", name=CASES[case].name, model_kwargs=kwargs, plain_weights=True
    ).model


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "a.b."])
def test_any_prefix_is_taken_off(tmp_path, vit, prefix):
    expected = opened(tmp_path, "vit", vit).state_dict()
    assert expected["head.weight"].shape == (5, 48)
    found = opened(tmp_path, "vit", {f"{prefix}{key}": value for key, value in vit.items()}).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_first(tmp_path, dtype):
    """The class token and its position, which timm adds up beside registers, are not rounded again."""
    short = draw_parameters(CASES["dinov2_registers"].model()).to(dtype)
    token, positions = short.embeddings.cls_token.float(), short.embeddings.position_embeddings.float()
    found = opened(tmp_path, "dinov2_registers", {key: value.clone() for key, value in short.state_dict().items()})
    assert torch.equal(found.cls_token, token + positions[:, :1])


def test_position_embeddings_are_resampled_as_those_of_timm_are(tmp_path, vit, capsys):
    own = opened(tmp_path, "vit", vit).state_dict()
    whole = [opened(tmp_path, "vit", weights, img_size=48) for weights in (own, vit)]
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), whole[1].parameters(), strict=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1] and "as timm does: pos_embed (1, 17, 48) -> (1, 37, 48)" in lines[0]


@pytest.mark.parametrize(
    ("case", "buffer"),
    [
        ("clip", "vision_model.embeddings.position_ids"),
        ("swin", "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"),
    ],
)
def test_what_a_model_computes_itself_is_passed_over(tmp_path, case, buffer, capsys):
    """Earlier versions of transformers wrote it."""
    weights = {key: value.clone() for key, value in CASES[case].model().state_dict().items()}
    expected = opened(tmp_path, case, weights)
    line = capsys.readouterr().out
    found = opened(tmp_path, case, weights | {buffer: torch.arange(9)})
    assert torch.equal(found(IMAGES), expected(IMAGES)) and capsys.readouterr().out == line


NO_BIAS = "encoder.layer.1.attention.attention.key.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"vit.{NO_BIAS}"), r"blocks\.1\.attn\.qkv\.bias is absent there, \(144,\) in the model"),
        (
            lambda w: w.update({"vit.encoder.layer.0.attention.gate.weight": torch.ones(3)}),
            r"encoder\.layer\.0\.attention\.gate\.weight is \(3,\) there, absent in the model",
        ),
        (lambda w: w.update({"loss.weight": torch.ones(3)}), r"loss\.weight is \(3,\) there, absent in the model"),
        (
            lambda w: w.update({"vit.embeddings.patch_embeddings.projection.weight": torch.ones(48, 192)}),
            r"cls_token is absent there",
        ),
        (lambda w: w.update({"vit.norm.weight": torch.ones(48)}), r"cls_token is absent there"),
        (lambda w: w.update({f"vit.{NO_BIAS}": torch.ones(())}), r"cls_token is absent there"),
    ],
    ids=["missing", "left_over", "left_over_outside", "flat_patches", "twice", "no_shape"],
)
def test_what_is_missing_or_left_over_is_an_error(tmp_path, vit, change, message):
    weights = dict(vit)
    change(weights)
    with pytest.raises(UserError, match=rf"model\.safetensors is of another architecture: {message}"):
        opened(tmp_path, "vit", weights)


@pytest.mark.parametrize("case", ["deit", "dinov2_swiglu", "dinov2_registers", "dinov3_swiglu", "siglip", "swinv2"])
def test_each_tensor_is_needed_and_has_to_have_its_shape(tmp_path, case):
    weights = {key: value.clone() for key, value in draw_parameters(CASES[case].model()).state_dict().items()}
    model = opened(tmp_path, case, weights)
    for key in weights:
        if not re.search(r"text_model|mask_token|^logit_(scale|bias)", key):
            others = {name: value for name, value in weights.items() if name != key}
            for changed in ({}, *({key: torch.ones(shape)} for shape in ((), (0,), (2,), (1, 1, 1, 1, 1)))):
                with pytest.raises(UserError, match="this file is of another architecture"):
                    load_weights(model, prepared(others | changed), "this file", convert=True)


def test_a_classifier_of_what_timm_does_not_give_is_refused(tmp_path):
    """CLIP's takes the mean of tokens that are not normed, DINOv2's two tokens, SigLIP's not the pooled output."""
    models = {
        "clip": (hf.CLIPForImageClassification(two_towers("CLIP")), "classifier.bias is (5,) there, absent"),
        "dinov2": (hf.Dinov2ForImageClassification(hf.Dinov2Config(**SIZES)), "head.weight is (2, 96) there, (2, 48)"),
        "siglip": (CASES["siglip_classifier"].model(), "attn_pool.latent is absent there"),
    }
    for case, (model, message) in models.items():
        with pytest.raises(UserError, match=re.escape(message)):
            opened(tmp_path, case, {key: value.clone() for key, value in model.state_dict().items()})


def test_biases_are_dropped_only_where_they_are_zero(tmp_path):
    """timm has DINOv3 with and without biases of q and v."""
    weights = {key: value.clone() for key, value in CASES["dinov3"].model().state_dict().items()}
    biases = [key for key in weights if key.endswith(("q_proj.bias", "v_proj.bias"))]
    assert len(biases) == 4
    for key in biases:
        weights[key].zero_()
    without = opened(tmp_path, "dinov3_without_biases", weights)
    assert relative(without(IMAGES), opened(tmp_path, "dinov3", weights)(IMAGES)) < 1e-6
    weights[next(key for key in biases if key.endswith("1.attention.v_proj.bias"))][5] = 0.1
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.v_bias is \(48,\) there, absent in the model"):
        opened(tmp_path, "dinov3_without_biases", weights)


# ---------------------------------------------------------------------------------------------------------------------
# What weights do not say


@pytest.mark.parametrize(
    ("case", "other", "activation"),
    [
        ("clip", {"name": "vit_base_patch32_clip_224"}, ("quick_gelu", "GELU", "quick_gelu")),
        ("clip_encoder", {"name": "vit_base_patch32_clip_quickgelu_224"}, ("gelu", "QuickGELU", "gelu")),
        ("siglip", {"act_layer": "gelu"}, ("gelu_pytorch_tanh", "GELU", "gelu_tanh")),
    ],
)
def test_another_activation_is_said_and_can_be_mended(tmp_path, case, other, activation, capsys):
    theirs, own, mend = activation
    model = draw_parameters(CASES[case].model())
    model.save_pretrained(tmp_path)
    kwargs = CASES[case].kwargs | other
    name = kwargs.pop("name", CASES[case].name)
    file = tmp_path / "model.safetensors"
    different = supernet.load(file, name=name, model_kwargs=kwargs, plain_weights=True).model
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (
        f"{tmp_path}/config.json says hidden_act {theirs}, the model has {own}, so the outputs differ: --model-kwargs "
        f"act_layer={mend} gives those of the file"
    )
    mended = supernet.load(tmp_path, name=name, model_kwargs=kwargs | {"act_layer": mend}, plain_weights=True)
    with torch.no_grad():
        _, expected = CASES[case].outputs(model)
        assert relative(different(IMAGES), expected) > 1e-4 and relative(mended.model(IMAGES), expected) < 1e-5
    assert "hidden_act" not in capsys.readouterr().out
    mended.save(tmp_path / "small", mended.cut(0))
    assert torch.equal(supernet.load(tmp_path / "small").model(IMAGES), mended.model(IMAGES))
    (tmp_path / "config.json").unlink()
    supernet.load(file, name=name, model_kwargs=kwargs, plain_weights=True)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"checkpoint {file} does not say its activation, the model has {own}: see docs/MODELS.md"


@pytest.mark.parametrize("config", [[], {"vision_config": 3, "hidden_act": [], "layer_norm_eps": None}, {"x": 1}])
def test_a_config_of_any_kind_is_met(tmp_path, vit, config, capsys):
    save_file(vit, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    case = CASES["vit"]
    supernet.load(tmp_path / "model.safetensors", name=case.name, model_kwargs=case.kwargs, plain_weights=True)
    assert capsys.readouterr().out == ""
