"""Targets (logits, features, tokens), and the costs that draw at random for each image."""

from __future__ import annotations

import pytest
import torch
from test_families import EACH, FAMILIES
from test_wpac import difference
from tiny import CLASSES, PLAIN, SHAPE, batches, draw_parameters, random_backbone, random_data, relative
from torch import nn

import supernet
from models import taylor
from models.backbone import create_backbone
from models.targets import COSTS, TARGETS, check_cost, default_target, output_of
from supernet.contraction import contract_network, network_of
from utils import UserError
from wpac.statistics import Statistics, collect_statistics


def encoder(family: str) -> nn.Module:
    """A tiny model of a family without a head, in float64."""
    name, model_kwargs = FAMILIES[family]
    return draw_parameters(create_backbone(name, **{**model_kwargs, "num_classes": 0}).double())


class Labels:
    """Labels that must not be used."""

    def to(self, *_: object, **__: object) -> Labels:
        return self

    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"a label was used ({name})")


@EACH
@pytest.mark.parametrize("target", ["features", "tokens"])
def test_contraction_keeps_the_target_of_an_encoder_without_labels(family: str, target: str):
    net, images = network_of(encoder(family), FAMILIES[family][1]), random_data(6)[0]
    net.target, before = target, output_of(net.model, images, target)
    contraction = contract_network(net, [(images, Labels())], method="best", dropout_ratio=0.8)
    assert contraction.difference < 1e-10
    assert relative(output_of(net.model, images, target), before) < 1e-10
    assert len(net.table) > 10
    small = net.cut(-1)
    assert output_of(small, images, target).shape == before.shape


def test_outputs():
    model, images = random_backbone("registers"), random_data(3)[0]
    tokens = output_of(model, images, "tokens")
    assert tokens.shape == (3, 20, 48)  # 4 registers and 16 patches
    features = output_of(model, images, "features")
    assert relative(features, model.fc_norm(tokens[:, 4:].mean(1))) < 1e-12
    assert relative(output_of(model, images, "logits"), model.head(features)) < 1e-12
    swin = encoder("swin")
    assert output_of(swin, images, "tokens").shape == (3, 64, 32)
    assert relative(output_of(swin, images, "features"), swin(images)) < 1e-12


def of(cost: str, target: str, size: int = 8) -> Statistics:
    return collect_statistics(random_backbone(), batches(*random_data(8), size), cost, outputs=True, target=target)


@pytest.mark.parametrize(("cost", "target"), [("fisher", "logits"), ("signs", "features"), ("signs", "tokens")])
def test_what_is_drawn_belongs_to_the_image(cost: str, target: str, monkeypatch: pytest.MonkeyPatch):
    """The statistics are equal for any batch size, and add up over processes."""
    whole = of(cost, target)
    assert difference(of(cost, target, size=3), whole) < 1e-10
    images, labels = random_data(8)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(taylor, "world", lambda rank=rank: (rank, 2))
        share = [(images[rank::2], labels[rank::2])]
        halves.append(collect_statistics(random_backbone(), share, cost, target=target))
    for key, expected in whole.importance.items():
        assert relative((halves[0].importance[key] + halves[1].importance[key]) / 2, expected) < 1e-10


def test_a_class_is_drawn_as_often_as_it_is_predicted():
    logits = torch.randn(1, CLASSES, dtype=torch.float64).mul(2).repeat(4000, 1).requires_grad_()
    COSTS["fisher"](logits, None, range(4000)).backward()
    drawn = (logits.softmax(1) - logits.grad).round().mean(0)  # the gradient is the prediction less one at the class
    assert (drawn - logits[0].softmax(0)).abs().max() < 0.03


def test_signs_give_the_metric_of_the_squared_error():
    output = torch.zeros(4000, 2, 3, dtype=torch.float64, requires_grad=True)
    COSTS["signs"](output, None, range(4000)).backward()
    g = output.grad.flatten(1)
    assert g.abs().eq(1).all() and (g.mT @ g / 4000 - torch.eye(6)).abs().max() < 0.08
    again = torch.zeros(5, 2, 3, dtype=torch.float64, requires_grad=True)
    COSTS["signs"](again, None, range(7, 12)).backward()
    assert torch.equal(again.grad, output.grad[7:12])


def test_a_target_or_cost_that_does_not_fit_is_one_line():
    model = create_backbone(PLAIN, **{**SHAPE, "num_classes": 0})
    assert default_target(model) == "tokens" and default_target(random_backbone()) == "logits"
    with pytest.raises(UserError, match="no classifier head, so it has no logits: give the target features or tokens"):
        supernet.contract(model, torch.randn(4, 3, 32, 32), target="logits")
    with pytest.raises(UserError, match="target 'pixels' is not known: logits, features, tokens"):
        supernet.contract(model, torch.randn(4, 3, 32, 32), target="pixels")
    for cost in COSTS:
        for target in TARGETS:
            if (cost == "signs") == (target == "logits"):
                with pytest.raises(UserError, match=f"the cost {cost} is not for the target {target}: give "):
                    check_cost(cost, target)
            else:
                check_cost(cost, target)
