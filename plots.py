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
