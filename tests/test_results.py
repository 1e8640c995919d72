"""docs/RESULTS.md and COMPARISON.md contain the tables that the studies make of docs/results/*.json."""

from __future__ import annotations

import json
import re

import pytest
from programs import ROOT

from benchmarks import backbones, latency
from studies import (
    alternatives,
    contraction,
    devices,
    encoders,
    quantized,
    recipes,
    regimes,
    rivals,
    rivals_trained,
    training,
    truncation,
)

RESULTS = "".join((ROOT / "docs" / name).read_text() for name in ("RESULTS.md", "COMPARISON.md"))
FOLDER = ROOT / "docs" / "results"


def quoted(results: dict[str, dict[str, list]]) -> str:
    """The tables of figures that others gave."""
    tables = []
    for table in results.values():
        rule = ["|---" * len(table["columns"]) + "|"]
        head, *rows = (f"| {' | '.join(cells)} |" for cells in (table["columns"], *table["rows"]))
        tables.append("\n".join([head, *rule, *rows]))
    return "\n\n".join(tables)


TABLES = {
    "quoted.json": quoted,
    "backbones.json": backbones.markdown,
    "contraction_vit_small_cifar10.json": contraction.markdown,
    "contraction_vit_digits.json": contraction.markdown,
    "truncation_vit_small_cifar10.json": truncation.markdown,
    "truncation_encoder_probe.json": truncation.markdown,
    "regimes_vit_cifar10.json": regimes.markdown,
    "alternatives_vit_cifar10.json": alternatives.markdown,
    "latency_deit_tiny.json": latency.markdown,
    "latency_deit_tiny_steps.json": latency.markdown,
    "latency_swin_tiny.json": latency.markdown,
    "latency_swin_tiny_steps.json": latency.markdown,
    "recipes_digits.json": recipes.markdown,
    "devices_vit_small_cifar10.json": devices.markdown,
    "devices_saliency_encoder.json": devices.markdown,
    "training_digits.json": training.markdown,
    "training_vit_cifar10.json": training.markdown,
    "training_vit_small_cifar10.json": training.markdown,
    "recipes_vit_small_cifar10.json": recipes.markdown,
    "recipes_vit_cifar10.json": recipes.markdown,
    "encoders_saliency_encoder.json": encoders.markdown,
    "encoders_saliency_encoder_features.json": encoders.markdown,
    "encoders_random_dinov3.json": encoders.markdown,
    "encoders_random_siglip.json": encoders.markdown,
    "quantized_vit_small_cifar10.json": quantized.markdown,
    "rivals_vit_small_cifar10.json": rivals.markdown,
    "rivals_saliency_encoder.json": rivals.markdown,
    "rivals_trained_digits.json": rivals_trained.markdown,
    "rivals_trained_vit_cifar10.json": rivals_trained.markdown,
}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_match_the_json_files(name: str):
    text = TABLES[name](json.loads((FOLDER / name).read_text()))
    assert len(text.splitlines()) > 5
    shown = {part.strip() for part in RESULTS.split("\n\n")}
    assert [part for part in text.split("\n\n") if part.strip() not in shown] == []  # tables with more rows, too


def test_every_result_is_shown():
    assert {path.name for path in FOLDER.glob("*.json")} == TABLES.keys()
    shown = set(re.findall(r"results/(\w+\.png)", RESULTS))
    assert shown == {path.name for path in FOLDER.glob("*.png")}
