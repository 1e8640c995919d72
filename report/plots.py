"""The pictures of reports, and what the pictures of studies and benchmarks share with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from files import atomic_file
from supernet.amounts import format_amount

from .measures import AXES, curves_of

# The colours of Okabe and Ito, which colour-blind readers can distinguish, and a few more.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLOURS = ("#999999", "#000000", ORANGE, "#E69F00", PURPLE, "#56B4E9", BLUE, "#882255", GREEN, "#F0E442")
MARKERS = "sXo^vDPh*d"


def plot_frontier(
    rows: list[dict[str, Any]],
    path: Path,
    title: str,
    measured: str,
    compared: dict[str, list[dict[str, Any]]] | None = None,
) -> None:
    """Plots what was measured of each size against MACs, and the first measure against milliseconds per image.

    rows: as returned by report.frontier.evaluate_sizes().  measured: describes how images_per_second was measured, for
    the axis label. Measures of one unit share a panel.  compared: name -> rows of another evaluation, of which the
    first measure is drawn.
    """
    rows = sorted(rows, key=lambda row: row["macs_linear"])
    unit, name = (1e9, "GMACs") if rows[-1]["macs_linear"] >= 1e9 else (1e6, "million MACs")
    macs = [row["macs_linear"] / unit for row in rows]
    measures = curves_of(rows[0])
    main, units = next(iter(measures)), list(dict.fromkeys(measure.unit for measure in measures.values()))
    count = 1 + len(units)
    figure, panels = plt.subplots(1, count, figsize=(5 * count, 4.2), layout="constrained")
    panels[1].sharey(panels[0])
    for axes, kind in zip([panels[0], *panels[2:]], units, strict=True):
        own = [key for key, measure in measures.items() if measure.unit == kind]
        for key, colour, marker in zip(own, (BLUE, GREEN, PURPLE), "o^v", strict=False):
            values = [row[key] for row in rows]
            axes.plot(macs, values, f"{marker}-", color=colour, label=measures[key].label)
        axes.set(xlabel=f"{name} for one image (linear layers)", ylabel=AXES[kind])
        if kind == "nats":
            axes.set_ylim(bottom=0)
    if f"baseline_{main}" in rows[0]:
        baseline = [row[f"baseline_{main}"] for row in rows]
        panels[0].plot(macs, baseline, "s--", color=ORANGE, label="same widths, untrained")
    for name, others in (compared or {}).items():
        found = sorted((row["macs_linear"] / unit, row[main]) for row in others if main in row)
        panels[0].plot(*zip(*found, strict=True), "D:", color=COLOURS[0], label=name)
    milliseconds = [1000 / row["images_per_second"] for row in rows]
    panels[1].plot(milliseconds, [row[main] for row in rows], "o", color=BLUE, label=measures[main].label)
    panels[1].set(xlabel=f"milliseconds per image, {measured}")
    for axes in panels:
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    if units[0] == "%":
        panels[0].set_ylim(top=min(101, panels[0].get_ylim()[1]))
    figure.suptitle(title)
    save_figure(figure, path)


def draw_widths(sizes: list[dict[str, int]], full: dict[str, int], labels: list[str], xlabel: str) -> Figure:
    """Draws the share of each module's width that each size keeps, as two heat maps: attention and MLP.

    Blocks run from top to bottom, sizes from left to right.
    sizes: the widths of each size.  full: the widths of the whole network.  labels: of the sizes; at most about 12 are
    shown.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    colours = matplotlib.colormaps["cividis_r"].with_extremes(bad="white")
    for axes, (kind, name) in zip(panels, {"attn": "attention", "mlp": "MLP"}.items(), strict=True):
        keys = [key for key in full if key.endswith(kind)]
        kept = [[100 * widths[key] / full[key] if widths[key] else np.nan for widths in sizes] for key in keys]
        image = axes.imshow(kept, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
        step = -(-len(labels) // 12)
        axes.set_xticks(range(0, len(labels), step), labels[::step])
        axes.set(xlabel=xlabel, title=name)
        axes.tick_params(axis="x", labelsize=7)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set(ylabel="block")
    figure.colorbar(image, ax=panels, label="share of the width kept, % (white: bypassed)")
    return figure


def plot_widths(rows: list[dict[str, Any]], full: dict[str, int], path: Path) -> None:
    """Writes draw_widths() of the evaluated sizes, largest first; rows as for plot_frontier()."""
    rows = sorted(rows, key=lambda row: -row["macs_linear"])
    labels = [format_amount(row["macs_linear"]) for row in rows]
    save_figure(draw_widths([row["widths"] for row in rows], full, labels, "MACs for one image"), path)


def draw_spectra(spectra: dict[str, list[list[float]]], measure: str) -> Figure:
    """Draws the cumulative share (percent) in the first dims of each module: one line per block.

    spectra: module key -> rows of shares, one share per dim in order. Attention has a row for q and k together (if they
    are cut) and one for v; an MLP has one for its hidden units.
    measure: names the quantity that attention's shares are taken of, such as "variance".
    """
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained", sharey=True)
    columns = {"q and k": ("attn", -2), "v": ("attn", -1), "MLP": ("mlp", -1)}
    blocks = max(int(key.split(".")[0]) for key in spectra) + 1
    for axes, (name, (kind, row)) in zip(panels, columns.items(), strict=True):
        for key in (key for key, rows in spectra.items() if key.endswith(kind) and len(rows) >= -row):
            shares = spectra[key][row]
            kept = [100 * k / len(shares) for k in range(len(shares) + 1)]
            colour = matplotlib.colormaps["viridis"](0.9 * int(key.split(".")[0]) / max(blocks - 1, 1))
            axes.plot(kept, 100 * np.cumsum([0, *shares]), color=colour, linewidth=1.2, label=key.split(".")[0])
        axes.plot([0, 100], [0, 100], color="black", linewidth=0.8, linestyle=":")
        dims = "dims per head" if kind == "attn" else "hidden units"
        axes.set(xlabel=f"first {dims}, %", title=f"{name}: {measure if kind == 'attn' else 'importance'}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="share in the first dims, %")
    panels[2].legend(title="block", frameon=False, fontsize=8, ncols=-(-blocks // 8), loc="lower right")
    return figure


def plot_spectra(spectra: dict[str, list[list[float]]], path: Path, measure: str) -> None:
    """Writes draw_spectra()."""
    save_figure(draw_spectra(spectra, measure), path)


def plot_latency(sizes: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plots time against MACs, both in percent of the whole network's: one panel per batch size, one line per mode.

    sizes: rows with mode, batch_size, macs_share and ratio_size_to_whole (of the times), see benchmarks/latency.py.
    """
    batches = list(dict.fromkeys(size["batch_size"] for size in sizes))
    figure, panels = plt.subplots(1, len(batches), figsize=(10, 4.2), layout="constrained", sharey=True, squeeze=False)
    for axes, batch_size in zip(panels[0], batches, strict=True):
        for style, mode in enumerate(dict.fromkeys(size["mode"] for size in sizes)):
            own = [size for size in sizes if (size["mode"], size["batch_size"]) == (mode, batch_size)]
            times = [100 * size["ratio_size_to_whole"]["median"] for size in own]
            look = {"color": (BLUE, ORANGE)[style], "marker": "os"[style], "markersize": 4, "linewidth": 1.2}
            axes.plot([100 * size["macs_share"] for size in own], times, label=mode, **look)
        axes.plot([0, 100], [0, 100], color="black", linewidth=0.8, linestyle=":", label="ideal line")
        axes.set(xlabel="MACs, % of the whole network's", title=f"batch {batch_size}")
        axes.set_xlim(0, 105)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set(ylabel="time, % of the whole network's")
    panels[0][0].legend(frameon=False, loc="lower right")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, atomically, and closes it."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
