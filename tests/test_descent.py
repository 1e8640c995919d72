"""Refitting by gradient descent: each block learns what the whole network's gives."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from ranks import run_in_ranks
from test_families import EACH, made
from test_refit import COUNT, compensated, halves, images
from tiny import random_backbone, random_data, relative, some_widths
from torch import nn

from models.extraction import extract
from models.targets import default_target, output_of
from supernet.contraction import network_of
from utils import UserError
from wpac.refit import refit


def error(model: nn.Module, small: nn.Module) -> float:
    """Squared error of the target on other images, relative to its square."""
    others, target = random_data(COUNT, seed=2)[0], default_target(model)
    with torch.no_grad():
        expected, found = output_of(model, others, target), output_of(small, others, target)
    return ((found - expected).square().mean() / expected.square().mean()).item()


@EACH
def test_it_comes_nearer_on_other_images_and_leaves_the_whole_network_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("wpac.descent.RATE", 3e-3)  # the weights are larger than those of trained networks
    model = made(family)
    before = copy.deepcopy(model.state_dict())
    small = extract(model, some_widths(model), share_memory=True)
    start = error(model, small)
    assert refit(model, small, images().split(16), steps=80).helped
    assert error(model, small) < 0.9 * start
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_it_does_not_depend_on_the_batches_and_repeats(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wpac.descent.RATE", 3e-3)
    model, found = made("siglip"), []
    for size in (16, 7):
        small = extract(model, halves(model))
        refit(model, small, images().split(size), steps=20)
        found.append(small.state_dict())
    assert all(relative(found[1][key], found[0][key]) < 1e-6 for key in found[0])
    other = extract(model, halves(model))
    refit(model, other, images().split(16), steps=20, seed=1)
    assert any(relative(value, found[0][key]) > 1e-4 for key, value in other.state_dict().items())


def test_it_starts_from_least_squares(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wpac.descent.RATE", 0.0)
    model = random_backbone()
    solved, small = (extract(model, halves(model)) for _ in range(2))
    assert refit(model, solved, images().split(16)).helped and refit(model, small, images().split(16), steps=2).helped
    assert all(relative(value, solved.state_dict()[key]) < 1e-9 for key, value in small.state_dict().items())


def descended(rank: int) -> tuple[dict[str, torch.Tensor], float, float]:
    """The weights after gradient descent on every other image, and the errors before it and after it."""
    model = random_backbone()
    small = extract(model, some_widths(model))
    before = error(model, small)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wpac.descent.RATE", 3e-3)
        refit(model, small, images()[rank::2].split((8, 5)[rank]), steps=40)
    return {key: value.detach() for key, value in small.state_dict().items()}, before, error(model, small)


def test_two_processes_end_with_the_same_weights_and_a_lower_error(tmp_path: Path):
    (first, before, after), (second, *_) = run_in_ranks(descended, 2, tmp_path)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert after < 0.9 * before


def test_where_it_does_not_help_nothing_changes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wpac.descent.RATE", 10.0)
    model = compensated("dinov3")
    small = extract(model, halves(model))
    before = copy.deepcopy(small.state_dict())
    assert not refit(model, small, images().split(16), steps=3).helped
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


def test_the_class_token_counts_more_where_all_tokens_are_kept():
    model = random_backbone(num_classes=0)
    small = extract(model, halves(model))
    refit(model, small, [images()], "tokens", steps=40)
    alike = extract(model, halves(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wpac.descent.CLASS_SHARE", 0.0)
        refit(model, alike, [images()], "tokens", steps=40)
    whole = output_of(model, images(), "tokens")[:, 0]
    first, second = ((output_of(m, images(), "tokens")[:, 0] - whole).square().mean() for m in (small, alike))
    assert first < second


def test_the_grade_says_how_it_was_made():
    network = network_of(random_backbone(dtype=torch.float32))
    network.table.rows.append(halves(network.model))
    small = network.cut(-1, refit=images().float().split(16), refit_steps=30)
    assert network.grade_of(small) == "refitted, 30 steps per block"
    assert network.grade_of(network.cut(0, refit=images().float().split(16), refit_steps=30)) == "cut"
    with pytest.raises(UserError, match="at least two different images"):
        network.cut(-1, refit=[images().float()[:1]], refit_steps=1)
