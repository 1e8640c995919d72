"""The rivals that train: shared weights, nested sizes, thresholds, folding, against plain references; the program."""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from tiny import PLAIN, SHAPE, random_backbone, random_data, relative
from torch import nn
from torch.nn import functional as F

from datasets import Images
from models.backbone import create_backbone, full_widths
from models.elastic import make_elastic, set_widths
from models.macs import count_macs
from models.targets import default_cost
from piad.distillation import Distillation, Teacher
from piad.mask_table import MaskTable
from studies import rivals_depth, rivals_trained
from studies.common import run_entry_point
from studies.criteria import importance_by
from studies.rivals_depth import Albert, DepthRule, SharedDepth, Tleg, Wave
from studies.rivals_one_size import Gated, Thresholds, folded, idle_share, mask_of, pruned, shares_of, with_idle
from studies.rivals_task import macs_of, macs_without
from studies.rivals_trained_methods import repavit
from studies.rivals_widths import Ladder, ScalaRule, matformer_sizes, mixed_sizes, uniform_sizes
from supernet import Network
from utils import UserError

IMAGES, LABELS = random_data(4)
CLOSE = 1e-10


def place(step: int, number: int = 0) -> dict[str, int]:
    return {"epoch": 0, "step": step, "rank": 0, "number": number}


# ---------------------------------------------------------------------------------------------------------------------
# Shared blocks


@pytest.mark.parametrize("kind", [Albert, Tleg, Wave])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_plain_network_of_a_depth_gives_the_same_outputs(kind: type, depth: int):
    model = SharedDepth(random_backbone(depth=4), kind)
    model.depth = depth
    plain = model.plain(depth)
    assert len(plain.blocks) == depth
    assert relative(plain(IMAGES), model(IMAGES)) < CLOSE
    assert macs_of(plain) == count_macs(random_backbone(depth=depth))


def test_blocks_that_can_be_shared_are_found(monkeypatch: pytest.MonkeyPatch):
    """Equal blocks for ALBERT, blocks on a line for TLEG, enough templates for WAVE: the outputs are the whole's."""
    model = random_backbone(depth=4)
    first, slope = (dict(block.state_dict()) for block in model.blocks[:2])
    equal, on_line = copy.deepcopy(model), copy.deepcopy(model)
    for number, (one, other) in enumerate(zip(equal.blocks, on_line.blocks, strict=True), 1):
        one.load_state_dict(first)
        other.load_state_dict({name: first[name] + number / 4 * 0.1 * slope[name] for name in first})
    assert relative(SharedDepth(equal, Albert)(IMAGES), equal(IMAGES)) < CLOSE
    assert relative(SharedDepth(on_line, Tleg)(IMAGES), on_line(IMAGES)) < 1e-8
    assert relative(SharedDepth(on_line, Albert)(IMAGES), on_line(IMAGES)) > 0.01
    monkeypatch.setattr(rivals_depth, "TEMPLATES", 16)  # all that there are in four blocks
    assert relative(SharedDepth(model, Wave)(IMAGES), model(IMAGES)) < 1e-8
    monkeypatch.setattr(rivals_depth, "TEMPLATES", 8)
    assert relative(SharedDepth(model, Wave)(IMAGES), model(IMAGES)) > 0.01


def test_a_block_of_tleg_depends_on_its_place():
    shared = SharedDepth(random_backbone(depth=4), Tleg).shared
    weights = {name: value for name, value in shared.weights.items() if name.startswith("mlp-fc1-weight")}
    first, slope = weights["mlp-fc1-weight-first"], weights["mlp-fc1-weight-slope"]
    assert torch.equal(shared.weight("mlp.fc1.weight", 1, 3), first + 2 / 3 * slope)


def test_a_weight_of_wave_is_a_sum_of_kronecker_products():
    shared = SharedDepth(random_backbone(depth=4), Wave).shared
    scalers, templates = (shared.weights[f"mlp-fc1-weight-{part}"] for part in ("scalers", "templates"))
    assert templates.shape == (8, 96, 24) and scalers.shape == (4, 2, 2, 8)
    expected = sum(torch.kron(scalers[3][..., t], templates[t]) for t in range(8))
    assert relative(shared.weight("mlp.fc1.weight", 3, 4), expected) < CLOSE
    assert Wave.taken(6, 4) == [1, 2, 4, 5] and Wave.taken(4, 4) == [0, 1, 2, 3] and Wave.taken(6, 1) == [5]
    assert torch.equal(shared.weight("norm1.bias", 0, 2), shared.weights["norm1-bias-own"][1])


def test_every_depth_is_drawn():
    model = SharedDepth(random_backbone(depth=4), Tleg)
    rule = DepthRule(model, seed=0)
    drawn = [rule.choose(**place(step)) for step in range(400)]
    assert drawn == [rule.choose(**place(step)) for step in range(400)]
    counts = np.bincount(drawn, minlength=5)[1:] / 400
    assert counts == pytest.approx(np.log([2, 3 / 2, 4 / 3, 5 / 4]) / np.log(5), abs=0.08)


@pytest.mark.parametrize("kind", [Albert, Tleg, Wave])
def test_all_shared_weights_learn_and_what_timm_does_not_decay_is_not_decayed(kind: type):
    model = SharedDepth(random_backbone(depth=4), kind)
    F.cross_entropy(model(IMAGES), LABELS).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    groups = create_optimizer_v2(model, "adamw", weight_decay=0.1).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    decayed = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert not any(word in name for name in decayed for word in ("pos_embed", "cls_token", "bias", "norm"))
    assert any("fc1-weight" in name for name in decayed)


# ---------------------------------------------------------------------------------------------------------------------
# Nested sizes


def test_scala_trains_the_whole_one_of_each_half_and_the_smallest():
    model = make_elastic(random_backbone())
    table = uniform_sizes(model, 0.25)
    macs = [count_macs(model, widths) for widths in table.rows]
    assert macs[-1] <= 0.25 * macs[0] < macs[-2]
    rule, last = ScalaRule(model, [], ratio=1, epochs=0, seed=0, table=table, sizes_per_step=4), len(table) - 1
    for step in range(50):
        drawn = [rule.choose(**place(step, number)) for number in range(4)]
        assert drawn == sorted(drawn) and (drawn[0], drawn[3]) == (0, last)
        assert 0 < drawn[1] < len(table) // 2 <= drawn[2] < last
    shares = [macs[code] / macs[0] for code in drawn]
    assert rule.sampled_shares == shares and rule.step_scalars() == {"macs_share": sum(shares) / 4}


def test_matformer_cuts_mlps_alone_and_mixes_them():
    trained, mixed = (make(random_backbone(depth=2)) for make in (matformer_sizes, mixed_sizes))
    assert [widths["1.mlp"] for widths in trained.rows] == [192, 96, 48, 24]
    pairs = [(widths["0.mlp"], widths["1.mlp"]) for widths in mixed.rows]
    assert pairs[:4] == [(192, 192), (96, 192), (96, 96), (48, 96)] and len(pairs) == 7
    assert {widths["0.attn"] for widths in mixed.rows} == {16}


def ladder(model: nn.Module, teacher: nn.Module | None = None) -> Ladder:
    distillation = None if teacher is None else Distillation(Teacher(teacher, "logits"), "soft", 0.5, 1.0)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    return Ladder(model, sgd, nn.CrossEntropyLoss(), torch.device("cpu"), 0, distillation=distillation)


def test_each_size_learns_from_the_next_larger_one():
    model = make_elastic(random_backbone())
    training = ladder(model)
    assert training.expected(IMAGES) is None
    whole = model(IMAGES)
    assert training.loss(IMAGES, LABELS, None).item() == pytest.approx(F.cross_entropy(whole, LABELS).item())
    set_widths(model, uniform_sizes(model, 0.25).widths(-1))
    small = model(IMAGES)
    kl = F.kl_div(small.log_softmax(1), whole.log_softmax(1).detach(), log_target=True, reduction="batchmean")
    expected = 0.5 * kl + 0.5 * F.cross_entropy(small, LABELS)
    found = training.loss(IMAGES, LABELS, None)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)  # the divergence is in float32
    grads = [torch.autograd.grad(loss, model.blocks[0].mlp.fc1.weight)[0] for loss in (found, expected)]
    assert relative(*grads) < 1e-5
    training.expected(IMAGES)
    assert training.larger is None  # a new batch begins with the whole network


def test_the_largest_size_learns_from_the_teacher():
    model, teacher = make_elastic(random_backbone()), random_backbone(seed=1)
    training = ladder(model, teacher)
    training.runner = lambda images: {"logits": model(images)}
    expected = training.expected(IMAGES)
    kl = F.kl_div(model(IMAGES).log_softmax(1), teacher(IMAGES).log_softmax(1), log_target=True, reduction="batchmean")
    both = 0.5 * kl + 0.5 * F.cross_entropy(model(IMAGES), LABELS)
    assert training.loss(IMAGES, LABELS, expected).item() == pytest.approx(both.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# One size at a time


@pytest.mark.parametrize("idle", [0.0, 0.4, 1.0])
def test_folding_changes_nothing(idle: float):
    model = with_idle(random_backbone(), idle)
    assert relative(folded(model)(IMAGES), model(IMAGES)) < CLOSE
    reference = random_backbone()
    for block in reference.blocks:
        active = torch.arange(192) < 192 - int(idle * 192)
        block.mlp.act.forward = lambda x, active=active: torch.where(active, F.gelu(x), x)
    assert relative(model(IMAGES), reference(IMAGES)) < CLOSE


def test_the_units_of_least_importance_are_idle():
    model = random_backbone()
    network = Network(model, MaskTable([full_widths(model)]), PLAIN, SHAPE, {}, "logits")
    batches = [(IMAGES, LABELS)]
    budget = Namespace(network=network, model=model, settings=None, epochs=2)
    budget.proxy, budget.train, budget.spend = lambda: batches, lambda model: model, lambda **_: None
    small = repavit(budget, [0.7, 1.0])[0.7]
    cost = default_cost("logits")  # that of the paper's contraction
    importance = importance_by("taylor", copy.deepcopy(model), batches, cost)
    for index, (cut, whole) in enumerate(zip(small.blocks, model.blocks, strict=True)):
        active = [(whole.mlp.fc1.weight == row).all(1).nonzero().item() for row in cut.mlp.fc1.weight]
        order = importance[f"{index}.mlp"].argsort(descending=True)
        assert 0 < len(active) < 192 and set(active) == set(order[: len(active)].tolist())


def test_idle_units_are_as_few_as_the_macs_allow():
    model = random_backbone()
    idle = idle_share(model, 0.7)
    small, whole = folded(with_idle(copy.deepcopy(model), idle)), count_macs(model)
    assert 0.68 * whole < macs_of(small) <= 0.7 * whole
    assert idle_share(model, 0.3) is None
    assert macs_of(folded(with_idle(copy.deepcopy(model), 1.0))) > 0.3 * whole


def importance() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"heads": (2, 3), "units": (2, 192)}
    return {kind: torch.rand(size, generator=generator, dtype=torch.float64) for kind, size in sizes.items()}


def test_a_mask_has_the_gradient_of_the_scores():
    scores, threshold = (torch.tensor(values, requires_grad=True) for values in ([0.1, 0.5, 0.9], [0.4]))
    mask = mask_of(scores, threshold)
    assert mask.tolist() == [0, 1, 1]
    (mask * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert scores.grad.tolist() == [10, 20, 30] and threshold.grad.tolist() == [-60]


@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
def test_what_the_thresholds_leave_is_cut_out(share: float):
    model = Gated(random_backbone(), importance())
    assert relative(model(IMAGES), model.model(IMAGES)) == 0  # all take part at the start
    with torch.no_grad():
        model.scores["heads"] -= 0.03
        model.scores["units"][1] += 0.05
        for block in model.model.blocks:  # a branch that is bypassed loses its bias
            block.attn.proj.bias.zero_()
            block.mlp.fc2.bias.zero_()
    small, whole = pruned(model, share), count_macs(model.model)
    assert share * whole * 0.7 < macs_of(small) <= share * whole
    above = torch.cat([scores.flatten() for scores in model.scores.values()]).sort().values
    kept = sum((block.attn.num_heads if hasattr(block, "attn") else 0) for block in small.blocks)
    kept += sum((block.mlp.fc2.in_features if hasattr(block, "mlp") else 0) for block in small.blocks)
    for threshold in model.thresholds.values():  # just below the lowest score that is kept: the masks cut the same
        threshold.data.fill_(above[len(above) - kept] - 1e-9)
    assert relative(small(IMAGES), model(IMAGES)) < CLOSE
    assert pruned(model, 0.01) is None


def test_the_macs_of_the_masks_are_held_at_the_goal():
    model = Gated(random_backbone(), importance())
    for threshold in model.thresholds.values():
        threshold.data.fill_(0.05)
    masks = {kind: model.masks(kind) for kind in ("heads", "units")}
    gone = {kind: int((mask == 0).sum()) for kind, mask in masks.items()}
    macs = macs_without(model.model, **gone) / count_macs(model.model)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    fields = {"share": 0.2, "shares": shares_of(model.model)}
    training = Thresholds(model, sgd, nn.CrossEntropyLoss(), torch.device("cpu"), 0, **fields)
    loss, labels_alone = training.loss(IMAGES, LABELS, None), F.cross_entropy(model(IMAGES), LABELS)
    assert (loss - labels_alone).item() == pytest.approx(10 * (macs - 0.2) ** 2)
    (loss - labels_alone).backward()
    assert all(threshold.grad.item() < 0 for threshold in model.thresholds.values())  # they rise: fewer MACs


# ---------------------------------------------------------------------------------------------------------------------
# The program


TINY = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}


def watched(study: rivals_trained.Study, seen: list) -> rivals_trained.Study:
    seen.append(study.network.model.state_dict())
    return study


def test_the_program_measures_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch_pruning")
    start, seen, study = create_backbone(PLAIN, **TINY, num_classes=10).state_dict(), [], rivals_trained.Study
    save_file(start, tmp_path / "plain.safetensors")
    monkeypatch.setattr(rivals_trained, "Study", lambda *args: watched(study(*args), seen))
    words = ["--name", "tiny", "--data-set", "digits", "--checkpoint", tmp_path / "plain.safetensors", "--crop-pct", 1]
    words += ["--model", PLAIN, "--model-kwargs", *(f"{key}={value}" for key, value in TINY.items())]
    words += ["--epochs", 2, "--lrs", 0.001, "--draws", 0, "--batch-size", 256, "--workers", 0, "--device", "cpu"]
    words += ["--proxy-samples", 64, "--output-dir", tmp_path, "--dropout-ratio", 0.9, "--shares", 0.5, 1, "--"]
    words += ["--aa", "none", "--mixup", 0, "--cutmix", 0, "--reprob", 0, "--ema-decay", 0.5, "--repeated-aug", 0]
    run_entry_point(rivals_trained.main, *words)
    rows = json.loads((tmp_path / "rivals_trained_tiny.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(rivals_trained.METHODS)
    for row in rows:
        if row["method"] == "best, one size" or not rivals_trained.METHODS[row["method"]].one_size:
            assert row["top1"]["1"] is not None and row["macs_share"]["1"] == pytest.approx(1, abs=0.02)
        else:
            assert row["top1"]["1"] is None  # nothing to prune
        if row["method"] not in ("ALBERT", "TLEG", "WAVE"):  # whose depth is rounded
            assert all(part is None or part <= float(name) * 1.001 for name, part in row["macs_share"].items())
    images = {row["method"]: row["images"] for row in rows}
    assert (images["best, untrained"], images["Scala"], images["RePaViT"]) == (0, 2 * 1437, 24 * 1437)
    assert (tmp_path / "rivals_trained_tiny.png").stat().st_size > 10_000
    assert all(torch.equal(value, start[name]) for name, value in seen[0].items())  # methods work on copies
    before = (tmp_path / "rivals_trained_tiny.json").read_text()
    assert "| RECIPE=best | 1 | 0.001 |" in rivals_trained.markdown(json.loads(before))
    monkeypatch.setattr(rivals_trained, "Budget", None)  # nothing is trained again
    run_entry_point(rivals_trained.main, *words)
    assert (tmp_path / "rivals_trained_tiny.json").read_text() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--epochs", 1], "--epochs 1: some methods train in two parts, so give 2 or more"),
        (["--epochs", 2, "--alpha", 1], "--alpha 1: some methods learn from labels alone"),
        (["--epochs", 2, "--", "--freeze-embedding"], "--freeze-embedding is not followed by this study"),
    ],
)
def test_what_not_every_method_can_follow_is_one_line(flags: list, said: str, tmp_path: Path):
    save_file(create_backbone(PLAIN, **TINY, num_classes=10).state_dict(), tmp_path / "plain.safetensors")
    words = ["--name", "tiny", "--data-set", "digits", "--checkpoint", tmp_path / "plain.safetensors", "--crop-pct", 1]
    words += ["--model", PLAIN, "--model-kwargs", *(f"{key}={value}" for key, value in TINY.items())]
    with pytest.raises(UserError, match=said):
        run_entry_point(rivals_trained.main, *words, "--lrs", 0.1, "--output-dir", tmp_path, *flags)


@pytest.mark.parametrize(("method", "chosen", "runs"), [("Scala", [0.2, 0.2], 3), ("RePaViT", [0.2, 0.6], 5)])
def test_the_learning_rate_is_chosen_on_held_out_training_images(
    method: str, chosen: list[float], runs: int, monkeypatch: pytest.MonkeyPatch
):
    study = object.__new__(rivals_trained.Study)
    study.args, study.images = Namespace(lrs=[0.1, 0.2, 0.3], shares=[0.5, 1.0]), Images(list(range(25)), 2)
    top1 = {0.1: (50.0, None), 0.2: (60.0, 58.0), 0.3: (57.0, 59.0), 0.6: (10.0, 61.0), 1.2: (10.0, 60.0)}
    seen = []

    def run(method: str, seed: int, rates: dict[float, float], images: Images, val: Images) -> dict:
        seen.append((method, seed, list(images.indices), list(val.indices)))
        return {"top1": dict(zip(("0.5", "1"), top1[rates[0.5]], strict=True))}

    monkeypatch.setattr(study, "run", run)
    assert list(study.rates(method).values()) == chosen and len(seen) == runs
    held_out = [0, 10, 20]
    assert seen[0] == (method, 0, [index for index in range(25) if index not in held_out], held_out)
    study.args.lrs = [0.3]
    assert study.rates(method) == {0.5: 0.3, 1.0: 0.3} and len(seen) == runs  # there is nothing to choose
    assert study.rates("best, untrained") == {0.5: 0.0, 1.0: 0.0}


def test_rates_are_tried_beyond_the_edges_while_these_are_the_best():
    assert rivals_trained.beyond({0.2: {1.0: 5.0}, 0.4: {1.0: 5.0}}) == []  # a tie is no lead
    assert rivals_trained.beyond({0.2: {0.5: 1.0, 1.0: 6.0}, 0.4: {0.5: 2.0, 1.0: 5.0}}) == [0.8, 0.1]


def test_rows_of_other_setups_are_not_mixed_into_the_table():
    row = {"measured on": "val", "epochs": 10, "alpha": 0.5, "dropout_ratio": 0.9, "flags": [], "images": 5}
    row |= {"macs_share": {"0.5": 0.4, "1": 1.0}}

    def of(method: str, seed: int, top1: float, **changes: object) -> dict:
        lr = {"0.5": 0.1, "1": 0.1}
        return row | {"method": method, "seed": seed, "lr": lr, "top1": {"0.5": top1, "1": None}} | changes

    rows = [of("Scala", 0, 10.0, epochs=3), of("Scala", 0, 20.0, lr={"0.5": 0.3, "1": 0.3}), of("Scala", 0, 30.0)]
    rows += [of("Scala", 1, 32.0), of("Scala", 0, 99.0, **{"measured on": "held-out training images"})]
    lines = rivals_trained.markdown({"rows": [*rows, of("RECIPE=best", 0, 40.0)]}).splitlines()
    assert lines[2:] == ["| RECIPE=best | 1 | 0.1 | 40.0 at 0.400 |  | 5 |",
                         "| Scala | 2 | 0.1 | 31.0 (30.0 to 32.0) at 0.400 |  | 5 |"]  # fmt: skip
