"""Fidelity, accuracy and k-NN, against the same counted plainly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from ranks import SHARDS, measured
from test_families import FAMILIES
from test_targets import Labels, encoder
from tiny import CLASSES, batches, random_backbone, random_data, some_widths
from torch import Tensor

import fidelity
from engine import evaluate
from fidelity import KEPT, Evaluator, Neighbours
from models.backbone import full_widths
from models.extraction import extract
from models.targets import TARGETS, output_of

CPU = torch.device("cpu")


def evaluator(target: str, images: Tensor, whole: torch.nn.Module, size: int = 3, **more: Any) -> Evaluator:
    data = [(batch, Labels()) for batch in images.split(size)]
    return Evaluator(target, data, CPU, labels=False, whole=whole, **more)


def test_the_whole_network_runs_in_the_precision_of_the_models_unless_told():
    """Otherwise the rounding of half precision would count as a difference."""
    whole, images = random_backbone(dtype=torch.float32).eval(), random_data(6, dtype=torch.float32)[0]
    assert evaluator("logits", images, whole, amp=torch.bfloat16)(whole)["kl"] == pytest.approx(0, abs=1e-12)
    assert evaluator("logits", images, whole, whole_amp=torch.bfloat16)(whole)["kl"] > 1e-9


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a @ a).sqrt() / (b @ b).sqrt()).item()


def plain_fidelity(model: torch.nn.Module, whole: torch.nn.Module, images: Tensor, target: str) -> dict[str, float]:
    """One image after the other."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with torch.no_grad():
        for image in images:
            if target == "logits":
                p, q = (m(image[None])[0].softmax(0) for m in (whole, model))
                note("kl", sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
                note("agreement", 100.0 * (int(p.argmax()) == int(q.argmax())))
                continue
            note("feature_cosine", cosine(*(output_of(m, image[None], "features")[0] for m in (whole, model))))
            if target == "tokens":
                for one, other in zip(*(output_of(m, image[None], "tokens")[0] for m in (whole, model)), strict=True):
                    note("token_cosine", cosine(one, other))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    if target == "tokens":
        means["token_cosine_p5"] = sorted(found["token_cosine"])[math.ceil(0.05 * len(found["token_cosine"])) - 1]
    return means


@pytest.mark.parametrize("target", TARGETS)
def test_fidelity_is_what_counting_gives(target: str):
    whole, images = random_backbone("registers"), random_data(24)[0]
    small = extract(whole, {key: width * 7 // 8 for key, width in full_widths(whole).items()})
    found, expected = evaluator(target, images, whole)(small), plain_fidelity(small, whole, images, target)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=2e-5)  # float32 outputs, and bins of 1e-5
    if target == "logits":
        assert 0 < found["agreement"] < 100 and found["kl"] > 0.01
    else:
        assert all(value < 0.99 for value in found.values())


@pytest.mark.parametrize("target", TARGETS)
def test_the_whole_network_has_perfect_fidelity(target: str):
    whole = random_backbone()
    found = evaluator(target, random_data(8)[0], whole)(whole)
    perfect = {"agreement": 100.0, "kl": 0.0}
    assert found == pytest.approx({name: perfect.get(name, 1.0) for name in found}, abs=1e-9)


@pytest.mark.parametrize("family", ["swin", "eva02"])
def test_tokens_and_features_of_other_families(family: str):
    whole, images = encoder(next(name for name in FAMILIES if name.startswith(family))), random_data(4)[0]
    found = evaluator("tokens", images, whole)(whole)
    assert found == pytest.approx(dict.fromkeys(("feature_cosine", "token_cosine", "token_cosine_p5"), 1.0))


def test_outputs_of_the_whole_network_are_kept_within_the_limit(monkeypatch: pytest.MonkeyPatch):
    whole, images = random_backbone(), random_data(8)[0]
    small, runs = extract(whole, some_widths(whole)), []
    whole.register_forward_hook(lambda *_: runs.append(1))
    expected = evaluator("logits", images, whole)
    results = [expected(small), expected(small)]
    assert len(runs) == 3 and expected.room == KEPT - 4 * 8 * CLASSES
    for limit, computed in ((0, 6), (4 * 3 * CLASSES, 5)):  # none of the three batches, the first
        runs.clear()
        monkeypatch.setattr(fidelity, "KEPT", limit)
        again = evaluator("logits", images, whole)
        results += [again(small), again(small)]
        assert len(runs) == computed
    assert all(found == results[0] for found in results)


def test_a_cosine_that_is_not_a_number_counts_as_the_lowest():
    cosines = fidelity.Cosines(CPU, "tokens")
    tokens = torch.ones(1, 10, 4)
    broken = tokens.clone()
    broken[0, 3] = torch.nan
    cosines.update({"tokens": broken, "features": tokens[:, 0]}, {"tokens": tokens, "features": tokens[:, 0]})
    found = cosines.finalize()
    assert math.isnan(found["token_cosine"]) and found["token_cosine_p5"] == pytest.approx(-1)


def test_neighbours_vote_as_in_dino():
    """Against the sums written out: 20 of 50, each weighted by exp(cosine / 0.07)."""
    torch.manual_seed(0)
    centres = torch.randn(5, 16)
    labels, own = torch.randint(5, (50,)), torch.randint(5, (30,))
    training, features = (2 * torch.randn(len(of), 16) + centres[of] for of in (labels, own))
    neighbours = Neighbours(training, labels)
    for part in range(0, 30, 8):
        neighbours.update(features[part : part + 8], own[part : part + 8])
    correct = 0
    for feature, label in zip(features, own.tolist(), strict=True):
        near = sorted(((cosine(feature, other), int(of)) for other, of in zip(training, labels, strict=True)))[-20:]
        votes = [sum(math.exp(value / 0.07) for value, of in near if of == number) for number in range(5)]
        correct += max(range(5), key=votes.__getitem__) == label
    assert neighbours.finalize()["knn"] == pytest.approx(100 * correct / 30) and 9 <= correct <= 29


def test_labels_add_accuracy():
    whole, (images, targets) = random_backbone(), random_data(8)
    small, data = extract(whole, some_widths(whole)), batches(images, targets, 3)
    found = Evaluator("logits", data, CPU, labels=True, whole=whole)(small)
    assert found == pytest.approx(evaluate(small, data, CPU) | evaluator("logits", images, whole)(small))
    found = Evaluator("features", data, CPU, labels=True, training=data)(small)
    assert found.keys() == {"knn"}
    with torch.no_grad():
        features = output_of(small, images, "features").float()
    neighbours = Neighbours(features, targets)
    neighbours.update(features, targets)
    assert found == neighbours.finalize()


def test_two_processes_measure_what_one_does(two_ranks: list[dict[str, Any]]):
    expected = measured(slice(None))
    for found in (rank["measured"] for rank in two_ranks):
        assert found.keys() == expected.keys() == {*TARGETS}
        for target, values in expected.items():
            assert found[target] == pytest.approx(values, abs=1e-7)
    assert measured(SHARDS[0])["tokens"] != pytest.approx(expected["tokens"], abs=1e-3)  # its part alone would show
