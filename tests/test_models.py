"""The backbone: which models are taken, how their modules are named, loading; and MACs and parameters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import ROOT
from safetensors.torch import load_file, save_file
from test_families import FAMILIES
from timm.layers import Attention
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from tiny import SHAPE, VARIANTS, masked_logits, random_backbone, random_data, relative, some_widths, widths_strategy
from torch import Tensor, nn

import supernet
from models.backbone import (
    ALIASES,
    Module,
    check_supported,
    check_widths,
    create_backbone,
    full_widths,
    modules_of,
)
from models.extraction import extract
from models.loading import fit_head, load_weights, prepared
from models.macs import count_macs, count_params, macs_per_dim
from models.parts import apply_part, classify, parts_of
from piad.dropout_list import UNITS, unit_sizes
from supernet.contraction import network_of, save_contracted
from supernet.facts import stamp_of
from utils import UserError

TINY = {key: value for key, value in SHAPE.items() if key != "num_classes"}


# ---------------------------------------------------------------------------------------------------------------------
# Backbones


def test_the_authors_names_mean_the_deit_models():
    assert ALIASES.keys() == {"vit_tiny", "vit_small", "vit_base"}
    small = {"img_size": 32, "depth": 1, "num_classes": 3}
    for alias, heads in (("vit_tiny", 3), ("vit_small", 6), ("vit_base", 12)):
        with torch.device("meta"):
            model = create_backbone(alias, **small)
            deit = timm.create_model(f"deit_{alias.removeprefix('vit_')}_patch16_224", **small)
        assert model.default_cfg == deit.default_cfg
        assert model.blocks[0].attn.num_heads == heads


@pytest.mark.parametrize(
    ("name", "near"),
    [("deit_tiny_patch16", "deit_tiny_patch16_224"), ("vit_tinny", "vit_tiny"), ("????", "deit_tiny_patch16_224")],
)
def test_an_unknown_model_name_is_met_with_near_ones(name, near):
    with pytest.raises(UserError, match=r"unknown model .*near names: .*") as caught:
        create_backbone(name)
    assert near in str(caught.value).split("near names: ")[1].split(", ")


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",
        "swin_small_patch4_window7_224",
        "swin_base_patch4_window7_224",
        "swinv2_base_window8_256",
        "deit_base_distilled_patch16_224",
        "deit3_base_patch16_224",
        "vit_large_patch14_dinov2",
        "vit_giant_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "vit_so400m_patch14_siglip_gap_224",
        "vit_base_patch16_clip_224",
        "vit_medium_patch16_rope_reg1_gap_256",
        "vit_large_patch16_dinov3",
        "eva02_small_patch14_224",
    ],
)
def test_models_of_timm_at_full_size_are_supported(name: str):
    """Their structure alone: every module found, and divided into units."""
    with torch.device("meta"):
        modules = modules_of(create_backbone(name))
    sizes = unit_sizes(modules)
    assert {key.split(".")[1] for key in modules} == {"attn", "mlp"}
    units = {key: module.width / sizes[key] / UNITS[module.kind] for key, module in modules.items()}
    assert all(0.5 < share < 1.5 for share in units.values())


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("resnet18", {}, "it is a ResNet"),
        ("volo_d1_224", {}, "it is a VOLO"),
        ("vit_tiny_r_s16_p8_224", {}, "its patches are embedded by a HybridEmbed"),
        ("eva02_base_patch14_224", {}, "block 0 has a SwiGLU of another kind"),
        ("eva_giant_patch14_224", {"scale_attn_inner": True, "depth": 2}, "a norm on the outputs of its attention"),
        ("vit_tiny_patch16_224", {**TINY, "global_pool": "prr"}, "it pools with AttentionPoolPrr"),
        (
            "vit_tiny_patch16_224",
            {**TINY, "scale_attn_norm": True},
            "a norm on the outputs of its attention",
        ),
        ("vit_tiny_patch16_224", {**TINY, "scale_mlp_norm": True}, "block 0 has a Mlp of another kind"),
        ("vit_tiny_patch16_224", {**TINY, "attn_layer": "diff"}, "block 0 has a DiffAttention of another kind"),
        (
            "vit_tiny_patch16_224",
            {**TINY, "block_fn": timm.models.vision_transformer.ResPostBlock},
            "block 0 is a ResPostBlock",
        ),
    ],
)
def test_a_model_of_another_kind_is_refused_with_the_reason(name, arguments, reason):
    message = rf"{name} is not supported \(.*{reason}\); these are: vit_.*swin_"
    with torch.device("meta"), pytest.raises(UserError, match=message):
        create_backbone(name, **arguments)


def test_a_gated_attention_is_refused(backbone):
    backbone.blocks[1].attn = Attention(48, num_heads=3, gated=True)
    with pytest.raises(UserError, match="block 1 has a Attention of another kind"):
        check_supported(backbone, "this model")


def test_bad_model_arguments_are_one_line():
    with pytest.raises(UserError, match=r"timm could not make deit_tiny.* with {'colour': 3}: .*colour") as caught:
        create_backbone("vit_tiny", colour=3)
    assert "\n" not in str(caught.value)


def test_every_variant_is_taken_and_runs_in_parts_as_it_runs_whole(any_backbone, data):
    check_supported(any_backbone, "this model")
    x, parts = parts_of(any_backbone, data[0])
    assert [key for key, _ in parts if key] == list(modules_of(any_backbone))
    first = next(iter(modules_of(any_backbone).values()))
    assert x.flatten(1, -2).shape == (8, first.tokens, first.dim)
    for part in parts:
        x = apply_part(x, part)
    assert relative(classify(any_backbone, x), any_backbone(data[0])) < 1e-12


def test_modules_in_running_order():
    model = random_backbone("one_head")
    expected = []
    for block in range(3):
        expected.append(
            Module(f"{block}.attn", block, "attn", 16, heads=1, dim=16, tokens=17, keys=17, parts=3, head_dim=16)
        )
        expected.append(Module(f"{block}.mlp", block, "mlp", 64, heads=1, dim=16, tokens=17))
    assert list(modules_of(model).values()) == expected
    assert list(modules_of(model)) == [module.key for module in expected]
    widths = some_widths(model)
    assert full_widths(extract(model, widths)) == widths


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.attn": 17}, "0.attn is 17, outside 0..16"),
        ({"1.mlp": -1}, "1.mlp is -1, outside 0..192"),
        ({"1.mlp": None}, "module 1.mlp is missing"),
        ({"2.attn": 4}, "module 2.attn is not in the model"),
    ],
)
def test_widths_that_do_not_fit_are_named(backbone, change, message):
    widths = {key: value for key, value in (full_widths(backbone) | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        check_widths(backbone, widths)


def test_load_weights_is_strict_and_names_the_first_key_that_differs(backbone):
    weights = random_backbone(seed=5).state_dict()
    load_weights(backbone, weights, "this file")
    assert all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items())

    first, second = "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"
    bad = weights | {second: torch.zeros(1), first: torch.zeros(191, 48)}
    with pytest.raises(UserError, match=rf"this file is of another .*: {first} is \(191, 48\) there, \(192, 48\) in"):
        load_weights(backbone, bad, "this file")
    with pytest.raises(UserError, match=r"norm.bias is absent there, \(48,\) in the model"):
        load_weights(backbone, {key: value for key, value in weights.items() if key != "norm.bias"}, "this file")
    with pytest.raises(UserError, match=r"extra is \(2,\) there, absent in the model"):
        load_weights(backbone, weights | {"extra": torch.zeros(2)}, "this file")
    assert all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items())


def test_load_weights_into_the_structure_of_a_model(backbone, data):
    with torch.device("meta"):
        empty = create_backbone(VARIANTS["plain"][0], **SHAPE)
    load_weights(empty, backbone.state_dict(), "this file", assign=True)
    assert torch.equal(empty.eval()(data[0]), backbone(data[0]))


def test_weights_from_elsewhere_keep_their_head(tmp_path, backbone, data):
    file = tmp_path / "weights.pth"
    torch.save({"model": backbone.state_dict(), "model_ema": random_backbone(seed=3).state_dict()}, file)
    name = VARIANTS["plain"][0]
    for use_ema, seed in ((False, 0), (True, 3)):
        net = supernet.load(file, name=name, model_kwargs=TINY, plain_weights=True, use_ema=use_ema)
        expected = random_backbone(seed=seed, dtype=torch.float32)
        assert torch.equal(net.model(data[0].float()), expected(data[0].float())) and net.averaged == use_ema
    assert supernet.create(name, TINY, num_classes=99).model.num_classes == 99
    with pytest.raises(UserError, match=r"weights\.pth is of another architecture: cls_token"):
        supernet.load(file, name=name, model_kwargs=TINY | {"embed_dim": 96}, plain_weights=True)


def opened(path: Path, weights: dict, variant: str = "plain", **more) -> nn.Module:
    """The model that weights from elsewhere open as."""
    name, model_kwargs = VARIANTS[variant]
    torch.save(weights, path)
    return supernet.load(path, name=name, model_kwargs=TINY | model_kwargs | more, plain_weights=True).model


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "module._orig_mod.", "module.module.", "a.b.c."])
def test_a_prefix_that_all_names_share_is_taken_off(tmp_path, prefix, backbone):
    weights = {f"{prefix}{key}": value for key, value in backbone.state_dict().items()}
    found = opened(tmp_path / "x.pth", {"state_dict": weights}).state_dict()
    assert all(torch.equal(found[key], value.float()) for key, value in backbone.state_dict().items())


def test_a_prefix_that_some_names_have_is_kept(tmp_path, backbone):
    weights = {f"model.{key}": value for key, value in backbone.state_dict().items()} | {"loss.weight": torch.ones(1)}
    assert prepared(weights).keys() == weights.keys()
    with pytest.raises(UserError, match=r"of another architecture: .* is absent there"):
        opened(tmp_path / "x.pth", weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_without_a_head_open_without_one_and_get_one(tmp_path, family, capsys):
    name, model_kwargs = FAMILIES[family]
    whole = create_backbone(name, **model_kwargs)
    weights = {key: value for key, value in whole.state_dict().items() if not key.startswith("head.")}
    torch.save(weights, tmp_path / "x.pth")
    kwargs = {key: value for key, value in model_kwargs.items() if key != "num_classes"}
    net = supernet.load(tmp_path / "x.pth", name=name, model_kwargs=kwargs, plain_weights=True)
    images = random_data(2)[0].float()
    assert net.model.num_classes == net.model_kwargs["num_classes"] == 0
    expected = whole.eval().forward_head(whole.forward_features(images), pre_logits=True)
    assert torch.equal(net.model(images), expected)
    with pytest.raises(UserError, match="the model has no classifier head, the data has 5 classes: train one"):
        fit_head(net.model, 5, remake=False)
    fit_head(net.model, 5, remake=True)
    assert capsys.readouterr().out == "new head: no classes in the weights, 5 in the data\n"
    assert net.model(images).shape == (2, 5)


@pytest.mark.parametrize("variant", ["plain", "distilled", "registers"])
def test_position_embeddings_of_another_size_are_resampled_as_timm_does(tmp_path, variant, capsys):
    weights = random_backbone(variant, dtype=torch.float32).state_dict()
    name, model_kwargs = VARIANTS[variant]
    expected = create_backbone(name, **SHAPE | model_kwargs | {"img_size": 48}).eval()
    expected.load_state_dict(checkpoint_filter_fn(weights, expected))
    found = opened(tmp_path / "x.pth", weights, variant, img_size=48)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "x.pth: resampled to the size of the model, as timm does: pos_embed (1, " in lines[0]
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(found(images), expected(images))
    opened(tmp_path / "x.pth", weights, variant)
    assert capsys.readouterr().out == ""


def test_position_biases_of_another_window_are_resampled(tmp_path, capsys):
    name, model_kwargs = FAMILIES["swin"]
    torch.save(create_backbone(name, **model_kwargs).state_dict(), tmp_path / "x.pth")
    kwargs = model_kwargs | {"window_size": 8}
    net = supernet.load(tmp_path / "x.pth", name=name, model_kwargs=kwargs, plain_weights=True)
    assert "resampled to the size of the model, as timm does: layers.0.blocks.0.attn" in capsys.readouterr().out
    assert net.model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_weights_of_another_layout_of_timm_are_taken(tmp_path, backbone):
    """DeiT III's own checkpoints call LayerScale gamma_1."""
    weights = random_backbone("layer_scale", dtype=torch.float32).state_dict()
    other = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): w for key, w in weights.items()}
    assert other.keys() != weights.keys()
    found = opened(tmp_path / "x.pth", other, "layer_scale").state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_opened_as_float32(tmp_path, dtype, data, capsys):
    weights = {key: value.to(dtype) for key, value in random_backbone().state_dict().items()}
    found = opened(tmp_path / "x.pth", weights)
    assert all(torch.equal(value, weights[key].float()) for key, value in found.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in found.parameters())
    assert capsys.readouterr().out == ""
    assert stamp_of(weights.values()) == stamp_of(value.float() for value in weights.values())

    network = network_of(random_backbone(dtype=torch.float32))
    network.save(tmp_path / "small", network.cut(0).to(dtype))
    again = supernet.load(tmp_path / "small").model
    assert again(data[0].float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_copy_of_contracted_weights_is_refused_in_one_line(tmp_path, dtype):
    images = torch.randn(8, 3, 32, 32)
    network = supernet.contract(random_backbone(dtype=torch.float32), images)
    save_contracted(network, tmp_path, {}, with_table=True)
    whole = supernet.load(tmp_path)
    assert len(whole.table) > 1
    file = tmp_path / "contracted.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"contracted\.json was made for other weights than .*: give the file that"):
        supernet.load(tmp_path)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_weights_that_are_not_finite_are_named(tmp_path, value, word, backbone):
    weights = backbone.state_dict()
    weights["blocks.0.attn.qkv.weight"][3, 5] = value
    with pytest.raises(UserError, match=rf"checkpoint .*x\.pth: blocks\.0\.attn\.qkv\.weight holds {word}$"):
        opened(tmp_path / "x.pth", weights)


def test_fit_head(capsys, data):
    for variant in ("plain", "distilled"):
        model = random_backbone(variant)
        head = model.head
        fit_head(model, 7, remake=False)
        assert model.head is head
        with pytest.raises(UserError, match="the model has 7 classes, the data has 5"):
            fit_head(model, 5, remake=False)
        assert model.head is head
        assert capsys.readouterr().out == ""
        fit_head(model, 5, remake=True)
        assert "new head: 7 classes in the weights, 5 in the data" in capsys.readouterr().out
        assert model(data[0]).shape == (8, 5)


# ---------------------------------------------------------------------------------------------------------------------
# MACs and parameters


def counted_by_hooks(model: nn.Module, convention: str) -> int:
    """Multiplications of every Linear and Conv2d that runs on one image; `full` adds the two products of attention."""
    macs = 0

    def linear(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * module.in_features

    def convolution(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]

    def products(module: Attention, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal macs
        tokens, dims = inputs[0].shape[1], module.qkv.out_features // 3
        macs += 2 * tokens * tokens * dims

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(linear)
        elif isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolution)
        elif isinstance(module, Attention) and convention == "full":
            module.register_forward_hook(products)
    model(random_data(1)[0])
    return macs


@pytest.mark.parametrize(("name", "paper"), [("deit_base", 16.88e9), ("deit_small", 4.26e9), ("deit_tiny", 1.08e9)])
def test_macs_of_deit_are_the_papers(name, paper):
    with torch.device("meta"):
        model = create_backbone(f"{name}_patch16_224")
    assert abs(count_macs(model) - paper) <= 0.005 * paper
    assert count_macs(model, convention="full") == count_macs(model) + 12 * 2 * 197**2 * model.embed_dim


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("convention", ["linear", "full"])
def test_macs_and_parameters_equal_what_is_counted_on_the_extracted_model(variant, convention):
    model = random_backbone(variant)

    @settings(max_examples=12)
    @given(widths_strategy(full_widths(model)))
    def check(widths):
        small = extract(model, widths)
        counted = counted_by_hooks(small, convention)
        assert count_macs(small, convention=convention) == counted
        assert count_macs(model, widths, convention) == counted
        params = sum(parameter.numel() for parameter in small.parameters())
        assert count_params(small) == params
        assert count_params(model, widths) == params

    check()


def test_macs_per_dim_is_the_price_of_one_more_dim(any_backbone):
    full = full_widths(any_backbone)
    for convention in ("linear", "full"):
        for key, module in modules_of(any_backbone).items():
            less = count_macs(any_backbone, full | {key: full[key] - 1}, convention)
            price = macs_per_dim(module, convention)
            assert count_macs(any_backbone, convention=convention) - less == price > 0


def test_sizes_of_a_sub_network_of_a_sub_network(backbone):
    """Counted on a model whose branches are gone already, as on one that has them."""
    widths = some_widths(backbone)
    small = extract(backbone, widths)
    assert count_macs(small, widths) == count_macs(backbone, widths)
    assert count_params(small, widths) == count_params(backbone, widths)


def test_an_unknown_macs_convention_is_an_error(backbone):
    with pytest.raises(ValueError, match="'flops' is not one of"):
        count_macs(backbone, convention="flops")


@settings(max_examples=10)
@given(st.data())
def test_the_reference_of_the_cut_tests_is_exact_at_full_width(draw):
    """Masks of ones and no hook: masked_logits is then timm's own forward."""
    model = random_backbone(draw.draw(st.sampled_from(sorted(VARIANTS))))
    images, _ = random_data(2)
    assert relative(masked_logits(model, full_widths(model), images), model(images)) == 0


# Methods of timm's models that are not public, but are called: requirements.txt has an upper bound for them.
PRIVATE = {
    "_pos_embed": (VisionTransformer, Eva),
    "_calc_window_shift": (SwinTransformerBlock,),
    "_attn": (SwinTransformerBlock, SwinTransformerV2Block),
    "_get_rel_pos_bias": (WindowAttention,),
}


def test_private_methods_of_timm_that_are_called_are_there_and_no_others():
    for name, classes in PRIVATE.items():
        assert all(callable(getattr(kind, name, None)) for kind in classes), name
    code = "\n".join(path.read_text() for path in (ROOT / "models").glob("*.py"))
    called = set(re.findall(r"\b(?:block|model|attn|self)\.(_[a-z]\w*)\(", code))
    own = set(re.findall(r"def (_[a-z]\w*)\(", code))
    assert called - own == set(PRIVATE)
    assert re.search(r"^timm>=[\d.]+,<[\d.]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
