"""Every family of models that is supported: contraction, running at any widths, cutting, counting, a step of PIAD."""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from programs import load_subnetwork, run, save_subnetwork
from timm.layers import SwiGLU, SwiGLUPacked
from timm.utils import AverageMeter
from tiny import PLAIN, SHAPE, batches, draw_parameters, random_data, relative, widths_strategy
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from engine import train_one_epoch
from main_training import start_training
from models.backbone import blocks_of, create_backbone, first_layers, full_widths, modules_of, value_layer
from models.elastic import make_elastic, set_widths
from models.extraction import extract
from models.macs import count_macs, count_params, fixed_macs
from models.parts import EMBEDDING, embed
from models.subnetwork import Bypass, ValueLayer, ValueProjection, branch_parameters
from piad.progressive import ProgressiveDropout
from studies.criteria import CRITERIA, EqualTokens, importance_by, sort_dims
from supernet.facts import stamp_of
from supernet.formats import Size
from supernet.graphs import graph_of, onnx_outputs, write_onnx_graph
from training import Training
from wpac.compensation import compensate, load_compensation, save_compensation
from wpac.statistics import collect_statistics
from wpac.transform import contract

SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 7}
FAMILIES: dict[str, tuple[str, dict]] = {
    "qk_norm": (PLAIN, {**SHAPE, "qk_norm": True}),
    "swiglu_packed": (PLAIN, {**SHAPE, "mlp_layer": SwiGLUPacked}),
    "swiglu": (PLAIN, {**SHAPE, "mlp_layer": SwiGLU}),
    "siglip": ("vit_base_patch16_siglip_224", SHAPE),
    "map_with_registers": (PLAIN, {**SHAPE, "global_pool": "map", "reg_tokens": 2, "pool_include_prefix": True}),
    "rope_map": ("vit_small_patch16_rope_224", {**SHAPE, "global_pool": "map"}),
    "dinov2": ("vit_small_patch14_dinov2", {**SHAPE, "init_values": 1e-5}),
    "rope": ("vit_small_patch16_rope_224", SHAPE),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", SHAPE),
    "dinov3": ("vit_small_patch16_dinov3", SHAPE),
    "eva02": ("eva02_tiny_patch14_224", SHAPE),
    "eva02_split": ("eva02_tiny_patch14_224", {**SHAPE, "qkv_fused": False, "swiglu_align_to": 64}),
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "patch_size": 2}),
    "swin_padded": ("swin_tiny_patch4_window7_224", {**SWIN, "patch_size": 4, "window_size": 3}),
    "swin_v2": ("swinv2_tiny_window8_256", {**SWIN, "patch_size": 2}),
}
V_ALONE = {"qk_norm", "rope", "rope_map", "rope_mixed", "dinov3", "eva02", "eva02_split", "swin_v2"}
EACH = pytest.mark.parametrize("family", FAMILIES)


def made(family: str) -> nn.Module:
    name, model_kwargs = FAMILIES[family]
    return draw_parameters(create_backbone(name, **model_kwargs).double())


def some_widths(model: nn.Module) -> dict[str, int]:
    """An attention and an MLP bypassed, the rest cut."""
    widths = {key: max(1, width * 5 // 8) for key, width in full_widths(model).items()}
    return widths | {"0.mlp": 0, "1.attn": 0}


def kept(model: nn.Module, widths: dict[str, int]) -> dict[str, Tensor]:
    """name -> 1 for each weight that a cut to `widths` keeps, 0 for the others."""
    masks = {parameter: torch.ones_like(parameter) for parameter in model.parameters()}
    for key, module in modules_of(model).items():
        block, width = blocks_of(model)[module.block], widths[key]
        branch, full = getattr(block, module.kind), module.width
        last = torch.arange(module.heads * full) % full >= width  # of the inputs of the last layer
        if module.kind == "attn":
            layer = value_layer(branch)
            rows = [layer.weight, *([layer.bias] if layer.bias is not None else [])]
            rows += [branch.v_bias] if getattr(branch, "v_bias", None) is not None else []
            for parameter in rows:
                masks[parameter][-module.parts * len(last) :][last.repeat(module.parts)] = 0
            masks[branch.proj.weight][:, last] = 0
        else:
            for parameter in (p for layer in first_layers(branch).values() for p in layer.parameters()):
                masks[parameter][last.repeat(len(parameter) // full)] = 0
            masks[branch.fc2.weight][:, last] = 0
        if width == 0:
            for parameter in branch_parameters(block, module.kind):
                masks[parameter].zero_()
    return {name: masks[parameter] for name, parameter in model.named_parameters()}


def masked_logits(model: nn.Module, widths: dict[str, int], images: Tensor) -> Tensor:
    """What the stock model gives with the weights beyond `widths` zeroed and bypassed branches adding nothing."""
    hooks = []
    for key, module in modules_of(model).items():
        if widths[key] == 0:
            branch = getattr(blocks_of(model)[module.block], module.kind)
            hooks.append(branch.register_forward_hook(lambda _m, _i, output: torch.zeros_like(output)))
    try:
        masks = kept(model, widths)
        weights = {name: parameter * masks[name] for name, parameter in model.named_parameters()}
        return functional_call(model, weights, (images,))
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return random_data(4)


@EACH
def test_the_embedding_is_what_the_first_block_is_given(family, data):
    """Its parameters are known by their names, which is how main.py --freeze-embedding finds them."""
    model = made(family)
    embed(model, data[0]).square().sum().backward()
    used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert used == {name for name, _ in model.named_parameters() if name.startswith(EMBEDDING)}


@EACH
@pytest.mark.parametrize("basis", ["wpac", "fisher"])
def test_contraction_keeps_the_function_and_orders_the_dims(family, basis, data):
    model = made(family)
    expected = model(data[0])
    order = "taylor" if basis == "wpac" else "fisher"
    spectra = contract(model, collect_statistics(model, [data], outputs=basis == "fisher"), basis, order)
    assert relative(model(data[0]), expected) < 1e-10
    after = collect_statistics(model, [data])
    for key, module in modules_of(model).items():
        if module.kind == "mlp":
            if order == "taylor":
                assert (after.importance[key].diff() <= 1e-12).all()
            continue
        assert module.parts == (1 if family in V_ALONE else 3)
        assert spectra[key].shape == (1 if module.parts == 1 else 2, module.width)
        assert after.tokens[key].mean.shape == (module.parts, module.heads, module.width)


@EACH
def test_principal_axes_are_those_of_v_as_the_model_makes_it(family, data):
    """Unweighted moments of v, read off a forward pass by hand, are diagonal after the rotation, largest first."""
    model = made(family)
    contract(model, collect_statistics(model, [data], token_collector=EqualTokens))
    module = modules_of(model)["0.attn"]
    layer, attn = value_layer(blocks_of(model)[0].attn), blocks_of(model)[0].attn
    seen = []
    hook = attn.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].detach()))
    model(data[0])
    hook.remove()
    v = F.linear(seen[0], layer.weight, layer.bias)[..., -module.heads * module.width :]
    v = v + (attn.v_bias if getattr(attn, "v_bias", None) is not None else 0)
    v = v.flatten(0, 1).unflatten(-1, (module.heads, module.width)).transpose(0, 1)  # (H, T, d)
    centred = v - v.mean(1, keepdim=True)
    covariance = centred.mT @ centred
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    assert (covariance - torch.diag_embed(diagonal)).abs().max() < 1e-9 * diagonal.max()
    assert (diagonal.diff(dim=1) <= 1e-9 * diagonal.max()).all()


@EACH
def test_statistics_do_not_hang_on_the_batch_size(family, data):
    model = made(family)
    whole, parts = (collect_statistics(model, batches(*data, size), outputs=True) for size in (4, 1))
    for key in whole.tokens:
        assert relative(parts.covariance[key], whole.covariance[key]) < 1e-9
    for key in whole.importance:
        assert relative(parts.importance[key], whole.importance[key]) < 1e-10
    for key in whole.outputs:
        assert relative(parts.outputs[key].covariance, whole.outputs[key].covariance) < 1e-9
        assert relative(parts.outputs[key].metric, whole.outputs[key].metric) < 1e-9


@EACH
@settings(max_examples=6, deadline=None)
@given(draws=widths_strategy({str(index): 8 for index in range(8)}))
def test_elastic_extracted_and_zeroed_networks_are_the_same(family, draws):
    images, _ = random_data(2)
    model = made(family)
    full = full_widths(model)
    eighths = list(draws.values())
    widths = {key: width * eighths[i % len(eighths)] // 8 for i, (key, width) in enumerate(full.items())}
    expected = masked_logits(model, widths, images)
    small = extract(model, widths)
    elastic = make_elastic(copy.deepcopy(model))
    set_widths(elastic, widths)
    assert relative(elastic(images), expected) < 1e-10
    assert relative(small(images), expected) < 1e-10
    assert full_widths(small) == widths
    assert count_params(small) == count_params(model, widths)
    for convention in ("linear", "full"):
        assert count_macs(small, convention=convention) == count_macs(model, widths, convention)


@EACH
def test_at_full_width_it_is_the_same_parameters_and_the_same_bits(family, data):
    model = made(family)
    parameters, expected = dict(model.named_parameters()), model(data[0])
    elastic = make_elastic(model)
    assert all(p is parameters[name] for name, p in elastic.named_parameters())
    assert torch.equal(elastic(data[0]), expected)
    set_widths(elastic, some_widths(elastic))
    assert not torch.allclose(elastic(data[0]), expected)
    set_widths(elastic, full_widths(elastic))
    assert torch.equal(elastic(data[0]), expected)
    whole = extract(elastic, full_widths(elastic))
    assert torch.equal(whole(data[0]), expected)
    assert all(type(module).__module__.startswith(("timm.", "torch.")) for module in whole.modules())


@EACH
def test_gradients_are_those_of_the_zeroed_network_and_zero_outside_the_slice(family, data):
    model = made(family)
    widths = some_widths(model)
    F.cross_entropy(masked_logits(model, widths, data[0]), data[1]).backward()
    expected = {name: p.grad.clone() if p.grad is not None else None for name, p in model.named_parameters()}
    model.zero_grad()
    elastic = make_elastic(model)
    set_widths(elastic, widths)
    F.cross_entropy(elastic(data[0]), data[1]).backward()
    masks = kept(model, widths)
    for name, parameter in elastic.named_parameters():
        assert parameter.grad is not None or expected[name] is None, name
        if parameter.grad is not None and expected[name] is not None:
            assert (parameter.grad[masks[name] == 0] == 0).all(), name
            assert (parameter.grad - expected[name]).abs().max() < 1e-10, name


@EACH
def test_macs_are_those_of_the_layers_that_run(family, data):
    model = made(family)
    for widths in (full_widths(model), some_widths(model)):
        small, total = extract(model, widths), []
        for name, layer in small.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and "cpb_mlp" not in name:
                layer.register_forward_hook(partial(_add_macs, total))
        for attn in (module for module in small.modules() if getattr(module, "v_bias", None) is not None):
            attn.qkv_bias_separate = True  # else timm uses the layer's weight and does not call it
        small(data[0][:1])
        assert sum(total) == count_macs(small)


@pytest.mark.parametrize(("family", "tokens"), [("siglip", 16), ("map_with_registers", 19), ("rope_map", 17)])
def test_in_full_attention_that_pools_has_its_products_too(family: str, tokens: int):
    """One query's scores with all tokens that it sees, and their sum of values; the class token may be one of them."""
    name, model_kwargs = FAMILIES[family]
    products = [
        count_macs(model, convention="full") - count_macs(model)
        for model in (create_backbone(name, **{**model_kwargs, "global_pool": pool}) for pool in ("map", "avg"))
    ]
    assert products[0] - products[1] == 2 * tokens * SHAPE["embed_dim"]


def _add_macs(total: list[int], layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    image, x = isinstance(layer, nn.Conv2d), inputs[0]
    total.append(layer.weight.numel() * (output[0, 0].numel() if image else x.numel() // x.shape[-1]))


@EACH
def test_one_epoch_of_piad_grows_a_table_and_trains(family, data):
    model = make_elastic(made(family).float())
    images, targets = data[0].float(), data[1]
    piad = ProgressiveDropout(model, [(images, targets)], ratio=0.6, epochs=1, seed=0, table=None)
    piad.begin_epoch(0)
    whole, smallest = count_macs(model), count_macs(model, piad.table.widths(-1))
    assert len(piad.table) > 4
    before_last = count_macs(model, piad.table.widths(len(piad.table) - 2))
    assert smallest <= 0.4 * whole < before_last or all(w == 0 for w in piad.table.widths(-1).values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        piad.choose(epoch=0, step=step, rank=0)
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
    assert torch.isfinite(model(images)).all()


@EACH
def test_compensation_takes_in_what_it_can_and_survives_its_file(family, data, tmp_path):
    model = made(family)
    statistics = collect_statistics(model, [data], outputs=True)
    contract(model, statistics, "fisher", "fisher")
    compensate(model, statistics.outputs)
    save_compensation(tmp_path / "compensation.safetensors", model, stamp_of(model.parameters()))
    widths = {key: width // 2 for key, width in full_widths(model).items()}
    expected = extract(model, widths)(data[0])
    elastic = make_elastic(copy.deepcopy(model))
    set_widths(elastic, widths)
    assert relative(elastic(data[0]), expected) < 1e-9
    again = copy.deepcopy(model)
    load_compensation(tmp_path / "compensation.safetensors", again, stamp_of(again.parameters()))
    assert relative(extract(again, widths)(data[0]), expected) < 0.05  # stored in half precision


@EACH
def test_the_criteria_it_is_compared_with_keep_the_function(family, data):
    for criterion in CRITERIA:
        model = made(family)
        expected = model(data[0])
        sort_dims(model, importance_by(criterion, model, [data]))
        assert relative(model(data[0]), expected) < 1e-10


@EACH
def test_a_folder_gives_back_the_same_model(family, data, tmp_path):
    name, model_kwargs = FAMILIES[family]
    if "mlp_layer" in model_kwargs:
        pytest.skip("an MLP given as a class has no place in a config")
    model = made(family).float()
    small = extract(model, some_widths(model)).eval()
    config = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    config |= {"crop_mode": "center", "interpolation": "bicubic"}
    save_subnetwork(tmp_path, small, name=name, model_kwargs=model_kwargs, preprocessing=config)
    found, _ = load_subnetwork(tmp_path)
    assert torch.equal(found(data[0].float()), small(data[0].float()))


@EACH
def test_an_exported_graph_takes_any_number_of_images(family, data):
    model = made(family).float()
    small = extract(model, some_widths(model)).eval()
    network = SimpleNamespace(preprocessing={"input_size": (3, 32, 32)}, target="logits")
    graph = Size(network, small, small, {}).program().module()
    for count in (1, 3):
        images = data[0][:count].float()
        assert relative(graph(images), small(images)) < 1e-5


def test_where_v_alone_is_cut_q_and_k_cost_what_they_cost():
    model = made("rope")
    module = modules_of(model)["0.attn"]
    assert fixed_macs(module) == 2 * 17 * 48 * 48
    assert fixed_macs(module, "full") == 2 * 17 * 48 * 48 + 2 * 17 * 17 * 48
    small = extract(model, {key: width // 2 for key, width in full_widths(model).items()})
    kinds = [type(m) for m in small.modules() if isinstance(m, ValueLayer | ValueProjection | Bypass)]
    assert kinds == [ValueLayer, ValueProjection] * 2


SMALL = "img_size=8 patch_size=2 in_chans=1 embed_dim=16"
SWIN_DIGITS = "img_size=8 patch_size=1 window_size=4 in_chans=1 embed_dim=16 depths=[1,1] num_heads=[2,4]"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("swin_tiny_patch4_window7_224", SWIN_DIGITS),
        ("vit_small_patch16_rope_224", f"{SMALL} depth=2 num_heads=2"),
        ("deit_tiny_distilled_patch16_224", f"{SMALL} depth=2 num_heads=2"),
    ],
)
def test_the_whole_road_on_digits(name, shape, tmp_path: Path):
    common = ["--data-set", "digits", "--model", name, "--model-kwargs", *shape.split(), "--device", "cpu"]
    common += ["--workers", 0, "--proxy-samples", 64, "--batch-size", 128]
    train = [*common, "--aa", "none", "--reprob", 0, "--epochs", 1, "--ema-decay", 0.9]
    run("main.py", *train, "--stage", "pretrain", "--output-dir", tmp_path / "a")
    weights = tmp_path / "a/checkpoint_0.pth"
    run("reparam.py", *common, "--no-eval", "--checkpoint", weights, "--output-dir", tmp_path / "b")
    weights = tmp_path / "b/contracted.safetensors"
    run("main.py", *train, "--checkpoint", weights, "--progressive-epochs", 1, "--output-dir", tmp_path / "c")
    sizes = ["--eval", "--frontier", 3, "--write-sub-networks", "--output-dir", tmp_path / "d"]
    run("main.py", *common, *sizes, "--checkpoint", tmp_path / "c/checkpoint_0.pth")
    rows = json.loads((tmp_path / "d/frontier.json").read_text())["sizes"]
    assert len(rows) == 3
    for row in rows:
        small, config = load_subnetwork(tmp_path / f"d/op_{row['op_code']}")
        assert config["macs_linear"] == count_macs(small) == row["macs_linear"]


def training_of(model: nn.Module, channels_last: bool = False) -> Training:
    args = Namespace(lr=0.1, batch_size=4, opt="sgd", weight_decay=0.0, smoothing=0.0, mixup=0.0, cutmix=0.0, amp=None)
    args.ema_decay, args.clip_grad, args.seed, args.distillation_type = 0.0, None, 0, "none"
    args.grad_accum_steps, args.grad_checkpointing, args.compile, args.freeze_embedding = 1, False, None, False
    args.channels_last = channels_last
    return start_training(args, model, 7, torch.device("cpu"))


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_and_weights_have_the_same_layout_in_memory(channels_last: bool):
    model, seen = create_backbone(PLAIN, **SHAPE).double(), []
    training = training_of(model, channels_last)
    in_layout = partial(Tensor.is_contiguous, memory_format=torch.channels_last)
    model.patch_embed.register_forward_pre_hook(lambda _layer, inputs: seen.append(in_layout(inputs[0])))
    train_one_epoch(training, [random_data(4)], 0, steps=1, losses=AverageMeter())
    assert seen == [channels_last] and in_layout(model.patch_embed.proj.weight) == channels_last


def test_both_heads_of_a_distilled_deit_learn():
    images, targets = random_data(4)
    model = make_elastic(draw_parameters(create_backbone("deit_tiny_distilled_patch16_224", **SHAPE).double()))
    training = training_of(model)
    set_widths(model, some_widths(model))
    model.train()
    loss = training.loss_fn(model(images), targets)
    expected = [F.cross_entropy(logits, targets).item() for logits in model(images)]
    assert loss.item() == pytest.approx(sum(expected) / 2)
    assert expected[0] != pytest.approx(expected[1])
    loss.backward()
    assert model.head.weight.grad.abs().max() > 0 and model.head_dist.weight.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["swin", "map_with_registers", "eva02"])
def test_an_onnx_file_gives_what_the_cut_model_gives(family: str, tmp_path: Path):
    """Windows and their masks, a query of its own, rotary positions; every linear layer is a Gemm, with its bias."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = made(family).float().eval()
    model = extract(model, some_widths(model))
    write_onnx_graph(graph_of(model, [3, 32, 32]), tmp_path / "a.onnx", "logits")
    images = random_data(3, dtype=torch.float32)[0]
    with torch.no_grad():
        for batch in (images, images[:1]):
            torch.testing.assert_close(onnx_outputs(tmp_path / "a.onnx")(batch), model(batch), rtol=1e-4, atol=1e-5)
    graph = onnx.load(tmp_path / "a.onnx").graph
    weights = {weight.name for weight in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and weights & {*node.input}]
    assert {node.op_type for node in products} == {"Gemm"}
