"""Pictures of results; nothing else in the project draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from files import atomic_file

# Okabe and Ito's colours, told apart by colour-blind readers.
BLUE, ORANGE = "#0072B2", "#D55E00"
COLOURS = ("#999999", "#000000", ORANGE, "#E69F00", "#CC79A7", "#56B4E9", BLUE, "#882255", "#009E73", "#F0E442")
MARKERS = "sxo^vDPh*d"


def plot_frontier(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Top-1 accuracy (percent) against MACs for one image; rows as evaluate_sizes() gives them."""
    rows = sorted(rows, key=lambda row: row["macs_linear"])
    unit, name = (1e9, "GMACs") if rows[-1]["macs_linear"] >= 1e9 else (1e6, "million MACs")
    macs = [row["macs_linear"] / unit for row in rows]
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.plot(macs, [row["top1"] for row in rows], "o-", color=BLUE, label="sub-networks of the super-network")
    if "baseline_top1" in rows[0]:
        baseline = [row["baseline_top1"] for row in rows]
        axes.plot(macs, baseline, "s--", color=ORANGE, label="same widths, contracted weights without PIAD")
    axes.set(xlabel=f"{name} for one image (linear layers)", ylabel="top-1 accuracy, %", title=title)
    axes.set_xlim(left=0)
    axes.set_ylim(top=101)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def plot_contraction(rows: list[dict[str, Any]], whole: dict[str, Any], path: Path, title: str) -> None:
    """Top-1 (percent) and KL to the whole model against the share of MACs, a line a method, mean over the draws.

    rows: method, share, macs, top1, kl, as benchmarks/study_contraction.py measures them; whole: macs and top1.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for style, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = [row for row in rows if row["method"] == method]
        points = {share: [row for row in own if row["share"] == share] for share in sorted({r["share"] for r in own})}

        def mean(key: str, points: dict[float, list[dict[str, Any]]] = points) -> list[float]:
            return [sum(row[key] for row in group) / len(group) for group in points.values()]

        macs = [100 * value / whole["macs"] for value in mean("macs")]
        for axes, key in zip(panels, ("top1", "kl"), strict=True):
            line = {"color": COLOURS[style % len(COLOURS)], "marker": MARKERS[style % len(MARKERS)], "markersize": 4}
            axes.plot(macs, mean(key), label=method, linewidth=1.2, **line)
    panels[0].axhline(whole["top1"], color="black", linewidth=0.8, linestyle=":", label="whole model")
    panels[0].set(xlabel="MACs, % of the whole model's", ylabel="top-1 accuracy, %")
    panels[1].set(
        xlabel="MACs, % of the whole model's", ylabel="KL divergence from the whole model, nats", yscale="log"
    )
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(f"{title}: every module cut, no training", fontsize=11)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
