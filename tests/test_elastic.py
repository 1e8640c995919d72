"""Running a super-network at any widths by slicing, and cutting sub-networks out of it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from ranks import ddp_widths
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from tiny import (
    VARIANTS,
    masked_logits,
    masks,
    random_backbone,
    random_data,
    relative,
    some_widths,
    use_fused,
    widths_strategy,
)
from torch import nn
from torch.nn import functional as F

from models.backbone import full_widths
from models.elastic import ElasticAttention, make_elastic, set_widths
from models.extraction import extract
from models.subnetwork import BypassBlock
from utils import UserError

EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
EACH_ATTENTION = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain attention"])


def one_step(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(images), targets).backward()
    optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# Elastic


@EACH_VARIANT
@EACH_ATTENTION
def test_at_full_width_it_is_the_same_parameters_and_the_same_bits(variant, fused, data):
    model = use_fused(random_backbone(variant), fused)
    parameters, state = dict(model.named_parameters()), list(model.state_dict())
    expected = model(data[0])
    elastic = make_elastic(model)
    assert list(elastic.state_dict()) == state
    assert [name for name, p in elastic.named_parameters() if p is parameters[name]] == list(parameters)
    assert torch.equal(elastic(data[0]), expected)
    set_widths(elastic, some_widths(elastic))
    assert not torch.allclose(elastic(data[0]), expected)
    assert list(elastic.state_dict()) == state
    set_widths(elastic, full_widths(elastic))
    assert torch.equal(elastic(data[0]), expected)


@EACH_VARIANT
@EACH_ATTENTION
def test_at_any_widths_logits_and_gradients_are_those_of_zeroed_weights(variant, fused):
    """And the extracted model gives the same logits. The reference is timm's own full model, scale and all."""
    plain = use_fused(random_backbone(variant), False)
    elastic = make_elastic(use_fused(random_backbone(variant), fused))
    images, targets = random_data(2)

    @settings(max_examples=12)
    @given(widths_strategy(full_widths(plain)))
    def check(widths):
        for model in (plain, elastic):
            model.zero_grad(set_to_none=True)
        expected = masked_logits(plain, widths, images)
        set_widths(elastic, widths)
        logits = elastic(images)
        assert relative(logits, expected) < 1e-10
        with torch.no_grad():
            assert relative(elastic(images), expected) < 1e-10
            assert relative(extract(elastic, widths)(images), logits) < 1e-10

        F.cross_entropy(expected, targets).backward()
        F.cross_entropy(logits, targets).backward()
        kept, reference = masks(plain, widths), dict(plain.named_parameters())
        for name, parameter in elastic.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad[kept[name] == 0].any(), name
            wanted = reference[name].grad
            wanted = torch.zeros_like(parameter) if wanted is None else wanted
            assert (parameter.grad - wanted).abs().max() <= 1e-10 * max(wanted.abs().max().item(), 1e-3), name

    check()


def test_training_a_bypassed_super_network_moves_the_slice_alone(backbone, data):
    elastic = make_elastic(backbone)
    before = copy.deepcopy(dict(elastic.named_parameters()))
    widths = some_widths(elastic)
    kept = masks(backbone, widths)
    set_widths(elastic, widths)
    one_step(elastic, *data)
    for name, parameter in elastic.named_parameters():
        moved = parameter != before[name]
        assert not moved[kept[name] == 0].any(), name
        assert moved.any() == bool(kept[name].any()), name


def test_frozen_parameters_stay_without_gradient(backbone, data):
    elastic = make_elastic(backbone)
    for name, parameter in elastic.named_parameters():
        parameter.requires_grad_(not name.startswith(("blocks.0.mlp", "patch_embed", "cls", "pos")))
    set_widths(elastic, some_widths(elastic))
    elastic(data[0]).sum().backward()
    for parameter in elastic.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


def test_ranks_with_different_bypassed_branches_train_together(two_ranks, data):
    """DDP gives every rank the mean of the ranks' gradients, a bypassed branch counting as zero."""
    expected: dict[str, torch.Tensor] = {}
    for rank in range(2):
        plain = random_backbone()
        images, targets = (part[rank::2] for part in data)
        F.cross_entropy(masked_logits(plain, ddp_widths(rank), images), targets).backward()
        for name, parameter in plain.named_parameters():
            half = 0 if parameter.grad is None else parameter.grad / 2
            expected[name] = expected.get(name, torch.zeros_like(parameter)) + half
    for rank in two_ranks:
        assert rank["gradients"].keys() == expected.keys()
        for name, gradient in rank["gradients"].items():
            assert (gradient - expected[name]).abs().max() < 1e-10 * max(expected[name].abs().max().item(), 1e-3), name


@EACH_ATTENTION
@pytest.mark.parametrize("kind", [torch.float64, torch.bool], ids=["additive", "bool"])
def test_attention_masks_mean_what_they_mean_to_timm(fused, kind, data):
    """Cut or not: additive, or True where a token may be looked at."""
    plain = use_fused(random_backbone(), False)
    elastic = make_elastic(use_fused(random_backbone(), fused))
    widths = full_widths(plain) | {"0.attn": 5, "1.attn": 9}
    with torch.no_grad():
        for name, mask in masks(plain, widths).items():
            plain.get_parameter(name).mul_(mask)
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    if kind != torch.bool:
        mask = torch.zeros(17, 17, dtype=kind).masked_fill_(~mask, float("-inf"))
    set_widths(elastic, widths)
    expected = plain.forward_features(data[0], attn_mask=mask)
    assert relative(elastic.forward_features(data[0], attn_mask=mask), expected) < 1e-10
    assert relative(plain.forward_features(data[0]), expected) > 1e-3


def test_a_block_with_a_bypassed_branch_passes_the_attention_mask_on(backbone, data):
    elastic = make_elastic(backbone)
    set_widths(elastic, full_widths(elastic) | {"0.mlp": 0, "1.mlp": 0})
    mask = torch.zeros(17, 17, dtype=torch.float64).masked_fill_(~torch.eye(17, dtype=torch.bool), float("-inf"))
    alone = elastic.forward_features(data[0], attn_mask=mask)
    # A token that looks at itself alone does not know the other patches.
    other = data[0].clone()
    other[:, :, :8, :8] = 0
    changed = (elastic.forward_features(other, attn_mask=mask) != alone).any(-1).any(0)
    assert changed.tolist() == [False, True] + [False] * 15


def test_a_cut_attention_refuses_what_it_does_not_know(backbone, data):
    elastic = make_elastic(backbone)
    whole = random_backbone().forward_features(data[0], is_causal=True)
    assert torch.equal(elastic.forward_features(data[0], is_causal=True), whole)
    set_widths(elastic, full_widths(elastic) | {"0.attn": 8})
    with pytest.raises(NotImplementedError, match="is_causal"):
        elastic.forward_features(data[0], is_causal=True)


@EACH_ATTENTION
def test_dropout_of_a_cut_module_is_on_in_training_only(fused, data):
    model = use_fused(make_elastic(random_backbone(attn_drop_rate=0.5)), fused)
    set_widths(model, {key: width // 2 for key, width in full_widths(model).items()})
    assert torch.equal(model(data[0]), model(data[0]))
    model.train()
    assert not torch.equal(model(data[0]), model(data[0]))


@EACH_ATTENTION
def test_every_dropout_of_a_cut_module_is_in_its_place(backbone, fused):
    """One that drops everything shows where it stands."""
    block = use_fused(make_elastic(backbone), fused).train().blocks[0]
    block.attn.width, block.mlp.width = 5, 50
    x = random_data(1)[0].reshape(1, 64, 48)
    for module, dropout, left in (
        (block.attn, block.attn.attn_drop, block.attn.proj.bias),
        (block.attn, block.attn.proj_drop, torch.zeros(48)),
        (block.mlp, block.mlp.drop1, block.mlp.fc2.bias),
        (block.mlp, block.mlp.drop2, torch.zeros(48)),
    ):
        dropout.p = 1.0
        assert torch.equal(module(x), left.to(x).expand_as(x))
        dropout.p = 0.0
        assert not torch.equal(module(x)[0, 0], module(x)[0, 1])


@pytest.mark.parametrize(("rate", "same"), [(0.0, True), (0.3, False)])
def test_drop_path_of_an_elastic_block(rate, same, data):
    model = make_elastic(random_backbone(drop_path_rate=rate)).train()
    set_widths(model, some_widths(model) | {"1.attn": 4})
    assert torch.equal(model(data[0]), model(data[0])) == same


def test_widths_that_do_not_fit_leave_a_super_network_as_it_was(backbone, data):
    elastic = make_elastic(backbone)
    set_widths(elastic, some_widths(elastic))
    before = elastic(data[0])
    for widths in ({}, full_widths(elastic) | {"0.attn": 17}, full_widths(elastic) | {"7.mlp": 1}):
        with pytest.raises(UserError):
            set_widths(elastic, widths)
    assert torch.equal(elastic(data[0]), before)


def test_mixed_precision_runs_a_cut_network_in_half_precision(data):
    elastic = make_elastic(random_backbone(dtype=torch.float32))
    set_widths(elastic, some_widths(elastic))
    expected = elastic(data[0].float())
    with torch.autocast("cpu", torch.bfloat16):
        logits = elastic(data[0].float())
        F.cross_entropy(logits.float(), data[1]).backward()
    assert logits.dtype == torch.bfloat16
    assert relative(logits.float(), expected) < 0.1
    assert all(parameter.grad.dtype == torch.float32 for parameter in elastic.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Extraction


@EACH_VARIANT
def test_extracted_modules_are_timms_own(variant):
    model = random_backbone(variant)
    widths = some_widths(model)
    small = extract(make_elastic(copy.deepcopy(model)), widths)
    assert type(small) is type(model)
    for index, (block, whole) in enumerate(zip(small.blocks, model.blocks, strict=True)):
        attn, mlp = widths[f"{index}.attn"], widths[f"{index}.mlp"]
        assert type(block) is (Block if attn and mlp else BypassBlock)
        parts = ["norm1", "attn", "ls1", "drop_path1"] if attn else []
        parts += ["norm2", "mlp", "ls2", "drop_path2"] if mlp else []
        assert [name for name, _ in block.named_children()] == parts
        if attn:
            assert type(block.attn) is Attention
            assert (block.attn.head_dim, block.attn.num_heads) == (attn, whole.attn.num_heads)
            assert block.attn.scale == attn**-0.5
        if mlp:
            assert type(block.mlp) is Mlp
            assert block.mlp.fc1.out_features == block.mlp.fc2.in_features == mlp


@EACH_VARIANT
def test_a_plain_and_an_elastic_model_give_the_same_sub_network(variant, data):
    model = random_backbone(variant)
    elastic = make_elastic(copy.deepcopy(model))
    for widths in (some_widths(model), full_widths(model)):
        one, other = extract(model, widths), extract(elastic, widths)
        assert repr(one) == repr(other)
        assert one.state_dict().keys() == other.state_dict().keys()
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key
            assert value.is_contiguous(), key
        assert torch.equal(one(data[0]), other(data[0]))
    assert one.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(one(data[0]), model(data[0]))


@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize("cut", [some_widths, full_widths], ids=["cut", "full width"])
def test_an_extracted_model_lives_on_its_own(backbone, data, elastic, cut):
    model = make_elastic(backbone) if elastic else backbone
    before, logits = copy.deepcopy(model.state_dict()), model(data[0])
    small = extract(model, cut(model))
    borrowed = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not borrowed & {p.untyped_storage().data_ptr() for p in small.parameters()}
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in small.parameters())
    old = copy.deepcopy(small.state_dict())
    one_step(small, *data)
    assert any(not torch.equal(value, old[key]) for key, value in small.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(data[0]), logits)
    assert full_widths(model) == full_widths(random_backbone())


def test_an_extracted_model_holds_no_memory_but_its_own_size(backbone):
    small = extract(backbone, some_widths(backbone))
    for name, parameter in small.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size(), name


def test_shared_memory_is_read_where_a_cut_is_a_view(backbone, data):
    widths = some_widths(backbone)
    small = extract(backbone, widths, share_memory=True)
    assert torch.equal(small(data[0]), extract(backbone, widths)(data[0]))
    assert small.head.weight is backbone.head.weight
    storage = small.blocks[1].mlp.fc1.weight.untyped_storage().data_ptr()
    assert storage == backbone.blocks[1].mlp.fc1.weight.untyped_storage().data_ptr()
    with torch.no_grad():
        backbone.blocks[1].mlp.fc1.weight[0, 0] = 42.0
    assert small.blocks[1].mlp.fc1.weight[0, 0] == 42.0
    whole = extract(backbone, full_widths(backbone), share_memory=True)
    for name, parameter in whole.named_parameters():
        assert parameter.data_ptr() == backbone.get_parameter(name).data_ptr(), name


@EACH_VARIANT
def test_the_structure_alone_on_the_meta_device(variant, data):
    """What is made there takes a sub-network's weights, and then is that sub-network."""
    model = random_backbone(variant)
    widths = some_widths(model)
    small = extract(model, widths)
    for share_memory in (False, True):
        empty = extract(copy.deepcopy(model).to("meta"), widths, share_memory)
        assert all(parameter.is_meta for parameter in empty.parameters())
        empty.load_state_dict(small.state_dict(), assign=True)
        assert torch.equal(empty(data[0]), small(data[0]))


def test_training_mode_and_drop_rates_are_kept():
    model = random_backbone(proj_drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3)
    for training in (True, False):
        small = extract(model.train(training), full_widths(model) | {"1.attn": 8, "1.mlp": 64})
        assert all(module.training == training for module in small.modules())
        for block in small.blocks:
            assert (block.attn.attn_drop.p, block.attn.proj_drop.p) == (0.2, 0.1)
            assert (block.mlp.drop1.p, block.mlp.drop2.p) == (0.1, 0.1)
        assert small.blocks[1].drop_path1.drop_prob == small.blocks[1].drop_path2.drop_prob == pytest.approx(0.3)


@EACH_ATTENTION
def test_the_way_of_attention_and_the_activation_are_kept(fused, data):
    model = use_fused(random_backbone(act_layer="silu"), fused)
    small = extract(model, some_widths(model))
    assert small.blocks[0].attn.fused_attn is fused
    assert type(small.blocks[1].mlp.act) is nn.SiLU
    assert small.blocks[1].mlp.act is not model.blocks[1].mlp.act
    assert relative(small(data[0]), masked_logits(model, some_widths(model), data[0])) < 1e-10


def test_a_sub_network_of_a_sub_network_is_the_sub_network(backbone, data):
    """Cutting in two goes keeps the original scale, so it comes to the same as cutting at once."""
    first = {key: max(1, width * 3 // 4) for key, width in full_widths(backbone).items()}
    second = {key: width // 2 for key, width in first.items()} | {"0.attn": 0}
    twice, once = extract(extract(backbone, first), second), extract(backbone, second)
    assert repr(twice) == repr(once)
    assert relative(twice(data[0]), once(data[0])) < 1e-10


def test_a_sub_network_with_a_bypassed_branch_can_be_cut_again(backbone, data):
    widths = some_widths(backbone)
    small = extract(backbone, widths)
    again = extract(small, widths)
    assert torch.equal(again(data[0]), small(data[0]))


def test_widths_that_do_not_fit_are_refused(backbone):
    with pytest.raises(UserError, match=r"0\.attn is 17"):
        extract(backbone, full_widths(backbone) | {"0.attn": 17})


def test_an_extracted_model_keeps_nothing_of_the_elastic_one(backbone):
    small = extract(make_elastic(backbone), full_widths(backbone))
    assert not any(isinstance(module, ElasticAttention | BypassBlock) for module in small.modules())
    assert not any("bypassed" in vars(block) for block in small.blocks)
