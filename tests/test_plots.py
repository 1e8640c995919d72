"""The contents of the pictures, read back from the figures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from programs import ROOT

from report import plots
from report.plots import draw_spectra, draw_widths, plot_frontier, plot_spectra, plot_widths
from studies import alternatives, contraction, regimes, truncation
from studies.plots import plot_regimes

FULL = {"0.attn": 8, "0.mlp": 32, "1.attn": 8, "1.mlp": 32}
SIZES = [FULL, {"0.attn": 8, "0.mlp": 16, "1.attn": 4, "1.mlp": 8}, {"0.attn": 2, "0.mlp": 1, "1.attn": 0, "1.mlp": 0}]
ROWS = [
    {"widths": widths, "macs_linear": macs, "top1": top1, "images_per_second": speed}
    for widths, macs, top1, speed in zip(
        SIZES, (1000, 500, 100), (90.0, 80.0, 50.0), (100.0, 250.0, 1000.0), strict=True
    )
]


def test_draw_widths_has_a_row_per_block_and_a_column_per_size():
    attention, mlp, _ = draw_widths(SIZES, FULL, ["a", "b", "c"], "size").axes
    for axes, expected in ((attention, [[100, 100, 25], [100, 50, 0]]), (mlp, [[100, 50, 3.125], [100, 25, 0]])):
        (image,) = axes.get_images()
        shown = image.get_array()
        assert shown.filled(0).tolist() == expected
        assert np.ma.getmaskarray(shown).tolist() == [[value == 0 for value in row] for row in expected]  # bypassed
        assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]


def test_draw_widths_labels_some_of_many_sizes():
    axes = draw_widths([FULL] * 300, FULL, list(map(str, range(300))), "op code").axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == [str(place) for place in axes.get_xticks()] and names[0] == "0" and 6 <= len(names) <= 12


def test_plot_widths_sorts_the_sizes(tmp_path: Path):
    plot_widths(ROWS[::-1], FULL, tmp_path / "one.png")
    plot_widths(ROWS, FULL, tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_draw_spectra_shows_cumulative_shares():
    spectra = {"0.attn": [[0.5, 0.25, 0.25, 0], [1, 0, 0, 0]], "0.mlp": [[0.4, 0.3, 0.2, 0.1]],
               "1.attn": [[0.25] * 4] * 2, "1.mlp": [[0.25] * 4]}  # fmt: skip
    qk, v, mlp = draw_spectra(spectra, "variance").axes
    for axes, first in ((qk, [0, 50, 75, 100, 100]), (v, [0, 100, 100, 100, 100]), (mlp, [0, 40, 70, 90, 100])):
        zero, one, _ = axes.get_lines()
        assert zero.get_ydata().tolist() == pytest.approx(first)
        assert list(zero.get_xdata()) == [0, 25, 50, 75, 100]
        assert one.get_ydata().tolist() == [0, 25, 50, 75, 100]


@pytest.mark.parametrize("blocks", [1, 24])
def test_pictures_are_complete(blocks: int, tmp_path: Path):
    spectra = {f"{i}.{kind}": [[0.5, 0.5]] * rows for i in range(blocks) for kind, rows in (("attn", 2), ("mlp", 1))}
    plot_spectra(spectra, tmp_path / "spectra.png", "variance")
    plot_frontier(ROWS, tmp_path / "frontier.png", "title", "64 at a time, cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"spectra.png", "frontier.png"}
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            picture.load()
            assert picture.size[0] >= 1500


@pytest.mark.parametrize(
    ("measures", "panels"),
    [
        (["top1", "top5", "agreement", "kl", "baseline_top1"],
         {"%": ["top1", "agreement", "baseline_top1"], "KL divergence, nats": ["kl"]}),
        (["agreement", "kl"], {"%": ["agreement"], "KL divergence, nats": ["kl"]}),
        (["knn", "feature_cosine"], {"%": ["knn"], "cosine with the whole network": ["feature_cosine"]}),
        (["feature_cosine", "token_cosine", "token_cosine_p5"],
         {"cosine with the whole network": ["token_cosine", "token_cosine_p5", "feature_cosine"]}),
    ],
)  # fmt: skip
def test_a_frontier_shows_what_was_measured(measures: list[str], panels: dict[str, list[str]], monkeypatch):
    """Lines against MACs by unit, and the first measure against milliseconds."""
    rows = [
        {"macs_linear": row["macs_linear"], "images_per_second": row["images_per_second"]}
        | {key: 0.1 * place + 0.01 * number for number, key in enumerate(measures)}
        for place, row in enumerate(ROWS)
    ]
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, _path: figures.append(figure))
    plots.plot_frontier(rows, Path("unused"), "title", "64 at a time, cpu")
    first, speed, *others = figures[0].axes
    assert [axes.get_ylabel() for axes in (first, *others)] == [*panels]
    for axes, keys in zip((first, *others), panels.values(), strict=True):
        drawn = [list(line.get_ydata()) for line in axes.get_lines()]
        assert drawn == [[row[key] for row in reversed(rows)] for key in keys]
        assert len(axes.get_legend().get_texts()) == len(keys)
    main = next(iter(panels.values()))[0]
    assert list(speed.get_lines()[0].get_xdata()) == [1, 4, 10]
    assert list(speed.get_lines()[0].get_ydata()) == [row[main] for row in reversed(rows)]


def test_studies_draw_their_results(tmp_path: Path):
    def results(name: str) -> dict:
        return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())

    contraction.draw_methods(results("contraction_vit_digits"), tmp_path / "contraction.png", "title")
    args = SimpleNamespace(name="name", output_dir=tmp_path)
    truncation.pictures(results("truncation_vit_small_cifar10"), "truncation", args)
    alternatives.draw(results("alternatives_vit_cifar10")["rows"], tmp_path / "alternatives.png", "title")
    means = {("piad", "contracted"): dict.fromkeys(regimes.SHARES, 50.0)}
    plot_regimes(means, regimes.PAPER, tmp_path / "regimes.png", "title")
    expected = {f"truncation_{part}.png" for part in truncation.PARTS}
    expected |= {"contraction.png", "alternatives.png", "regimes.png"}
    assert {path.name for path in tmp_path.iterdir()} == expected
