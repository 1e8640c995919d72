"""Pictures of results; nothing else in the project draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from files import atomic_file
from supernet.selection import format_amount

# Okabe and Ito's colours, told apart by colour-blind readers.
BLUE, ORANGE = "#0072B2", "#D55E00"
COLOURS = ("#999999", "#000000", ORANGE, "#E69F00", "#CC79A7", "#56B4E9", BLUE, "#882255", "#009E73", "#F0E442")
MARKERS = "sXo^vDPh*d"


def plot_frontier(rows: list[dict[str, Any]], path: Path, title: str, measured: str) -> None:
    """Top-1 accuracy (percent) against MACs, and against measured milliseconds, for one image.

    rows: as evaluate_sizes() gives them; measured: how their images_per_second were, in words.
    """
    rows = sorted(rows, key=lambda row: row["macs_linear"])
    unit, name = (1e9, "GMACs") if rows[-1]["macs_linear"] >= 1e9 else (1e6, "million MACs")
    macs = [row["macs_linear"] / unit for row in rows]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    panels[0].plot(macs, [row["top1"] for row in rows], "o-", color=BLUE, label="sub-networks of the super-network")
    if "baseline_top1" in rows[0]:
        baseline = [row["baseline_top1"] for row in rows]
        panels[0].plot(macs, baseline, "s--", color=ORANGE, label="same widths, contracted weights without PIAD")
    panels[0].set(xlabel=f"{name} for one image (linear layers)", ylabel="top-1 accuracy, %")
    milliseconds = [1000 / row["images_per_second"] for row in rows]
    panels[1].plot(milliseconds, [row["top1"] for row in rows], "o", color=BLUE)
    panels[1].set(xlabel=f"milliseconds an image, {measured}")
    for axes in panels:
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(top=101)
    panels[0].legend(loc="lower right", frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def draw_widths(sizes: list[dict[str, int]], full: dict[str, int], labels: list[str], xlabel: str) -> Figure:
    """Share of each module's width that each size keeps: blocks down, sizes across, attention and MLP apart.

    sizes: the widths of each; full: those of the whole network; labels: of the sizes, some of which are shown.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    colours = matplotlib.colormaps["cividis_r"].with_extremes(bad="white")
    for axes, (kind, name) in zip(panels, {"attn": "attention", "mlp": "MLP"}.items(), strict=True):
        keys = [key for key in full if key.endswith(kind)]
        kept = [[100 * widths[key] / full[key] if widths[key] else np.nan for widths in sizes] for key in keys]
        image = axes.imshow(kept, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
        every = -(-len(labels) // 12)
        axes.set_xticks(range(0, len(labels), every), labels[::every])
        axes.set(xlabel=xlabel, title=name)
        axes.tick_params(axis="x", labelsize=7)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set(ylabel="block")
    figure.colorbar(image, ax=panels, label="share of the width kept, % (white: bypassed)")
    return figure


def plot_widths(rows: list[dict[str, Any]], full: dict[str, int], path: Path) -> None:
    """draw_widths() of evaluated sizes, from large to small; rows: as evaluate_sizes() gives them."""
    rows = sorted(rows, key=lambda row: -row["macs_linear"])
    labels = [format_amount(row["macs_linear"]) for row in rows]
    _save(draw_widths([row["widths"] for row in rows], full, labels, "MACs for one image"), path)


def draw_spectra(spectra: dict[str, list[list[float]]], measure: str) -> Figure:
    """Cumulative share (percent) of what the first dims of each module hold, a line a block.

    spectra: module key -> the share of each dim, in order: of q and k together (where they are cut) and of v, or of
    hidden units;
    measure: what the attention's are shares of.
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
        of = "dims per head" if kind == "attn" else "hidden units"
        axes.set(xlabel=f"first {of}, %", title=f"{name}: {measure if kind == 'attn' else 'importance'}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="share in the first dims, %")
    panels[2].legend(title="block", frameon=False, fontsize=8, ncols=-(-blocks // 8), loc="lower right")
    return figure


def plot_spectra(spectra: dict[str, list[list[float]]], path: Path, measure: str) -> None:
    _save(draw_spectra(spectra, measure), path)


def plot_contraction(rows: list[dict[str, Any]], whole: dict[str, Any], path: Path, title: str) -> None:
    """Top-1 (percent) and KL to the whole model against the share of MACs, a line a method, mean over the draws.

    rows: method, share, macs, top1, kl, as studies/contraction.py measures them; whole: macs and top1.
    """
    figure, panels = _two_panels(whole, "MACs, % of the whole model's")
    for style, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = [row for row in rows if row["method"] == method]
        points = [[row for row in own if row["share"] == share] for share in sorted({row["share"] for row in own})]
        macs = [100 * _mean(group, "macs") / whole["macs"] for group in points]
        _draw_line(panels, macs, points, method, style)
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(f"{title}: every module cut, no training", fontsize=11)
    _save(figure, path)


def plot_truncation(
    lines: dict[str, list[list[dict[str, Any]]]],
    shares: tuple[float, ...],
    whole: dict[str, Any],
    paper: dict[str, tuple[float, ...]],
    path: Path,
    title: str,
) -> None:
    """Top-1 (percent) and KL to the whole model against the share of dims kept, a line a setting, mean over the draws.

    lines: label -> rows at each share, as studies/truncation.py measures them; bars reach from the least to
    the most of the draws.  paper: label -> top-1 at each share, drawn hollow.
    """
    figure, panels = _two_panels(whole, "dims kept, %")
    x = [100 * share for share in shares]
    for style, (label, points) in enumerate(lines.items()):
        _draw_line(panels, x, points, label, style, spread=True)
        if label in paper:
            marker = {"color": COLOURS[style], "marker": MARKERS[style], "fillstyle": "none", "linestyle": "none"}
            panels[0].plot(x, paper[label], **marker)
    if paper:
        hollow = {"color": "black", "marker": "o", "fillstyle": "none", "linestyle": "none"}
        panels[0].plot([], [], label="hollow: the paper's, DeiT-B on ImageNet", **hollow)
    for axes in panels:
        axes.set_xticks(x)
    panels[1].legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="lower left")
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_regimes(
    means: dict[tuple[str, str], dict[str, float]], paper: dict[str, tuple[float, ...]], path: Path, title: str
) -> None:
    """Top-1 (percent) of sub-networks by the regime that they were trained under, a panel for each kind of weights.

    means: (regime, "contracted" or "original") -> size -> top-1.  paper: regime -> top-1 at the sizes 4:12 and 8:12,
    drawn hollow.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for axes, weights in zip(panels, ("contracted", "original"), strict=True):
        for style, regime in enumerate(paper):
            look = {"color": COLOURS[style], "marker": MARKERS[style], "markersize": 5}
            if (regime, weights) in means:
                axes.plot(*zip(*means[regime, weights].items(), strict=True), label=regime, linewidth=1.2, **look)
            if weights == "contracted":
                axes.plot(["4:12", "8:12"], paper[regime], fillstyle="none", linestyle="none", **look)
        axes.set(xlabel="share of the MACs", title=f"{weights} weights")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="top-1 accuracy, %")
    hollow = {"color": "black", "marker": "o", "fillstyle": "none", "linestyle": "none"}
    panels[1].plot([], [], label="hollow, left: the paper's, DeiT-S on ImageNet", **hollow)
    panels[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(f"{title}: the same steps under each regime, not fine-tuned", fontsize=11)
    _save(figure, path)


def plot_alternatives(
    rows: list[dict[str, Any]], ways: tuple[str, ...], costs: dict[str, int], path: Path, title: str
) -> None:
    """Top-1 (percent) against MACs, a line a way, mean over the seeds; and what having many sizes costs each way.

    rows: way, size, macs, top1.  costs: way -> images trained on. What is fine-tuned has the colour of what it came
    from, and is filled.
    """
    figure, (axes, bars) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    kinds = list(dict.fromkeys(way.split(",")[0] for way in ways))
    for way in ways:
        own = [row for row in rows if row["way"] == way]
        points = [[row for row in own if row["size"] == size] for size in dict.fromkeys(row["size"] for row in own)]
        if points:
            style = kinds.index(way.split(",")[0])
            last = way == kinds[style] and any(other.startswith(f"{way},") for other in ways)
            look = {"color": COLOURS[style + 4], "marker": MARKERS[style], "linestyle": "--" if last else "-"}
            x, y = ([_mean(group, key) for group in points] for key in ("macs", "top1"))
            axes.plot([macs / 1e6 for macs in x], y, label=way, fillstyle="none" if last else "full", **look)
            bar = bars.barh(way, costs[way] / 1e3, color=look["color"], alpha=0.5 if last else 1.0)
            bars.bar_label(bar, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.set(xlabel="million MACs for one image (linear layers)", ylabel="top-1 accuracy, %")
    bars.set(xlabel="thousand images trained on, for 12 sizes")
    bars.invert_yaxis()
    bars.margins(x=0.15)
    for panel in (axes, bars):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_latency(sizes: list[dict[str, Any]], path: Path, title: str) -> None:
    """Time against MACs, both as shares (percent) of the whole network's: a panel a batch size, a line a mode.

    sizes: mode, batch_size, macs_share, ratio_size_to_whole (of the times), as benchmarks/latency.py measures them.
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
    _save(figure, path)


def _two_panels(whole: dict[str, Any], xlabel: str) -> tuple[Figure, list[Axes]]:
    """Top-1 on the left, with the whole model's; KL on the right."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    panels[0].axhline(whole["top1"], color="black", linewidth=0.8, linestyle=":", label="whole model")
    panels[0].set(xlabel=xlabel, ylabel="top-1 accuracy, %")
    panels[1].set(xlabel=xlabel, ylabel="KL divergence from the whole model, nats", yscale="log")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _draw_line(
    panels: list[Axes], x: list[float], points: list[list[dict]], label: str, style: int, spread: bool = False
) -> None:
    """A line in both panels: rows at each x, their mean, and with `spread` a bar from the least to the most."""
    look = {"color": COLOURS[style % len(COLOURS)], "marker": MARKERS[style % len(MARKERS)], "markersize": 4}
    for axes, key in zip(panels, ("top1", "kl"), strict=True):
        axes.plot(x, [_mean(rows, key) for rows in points], label=label, linewidth=1.2, **look)
        if spread:
            limits = [[bound([row[key] for row in rows]) for rows in points] for bound in (min, max)]
            axes.vlines(x, *limits, color=look["color"], linewidth=1.2)


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
