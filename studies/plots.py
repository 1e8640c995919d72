"""The pictures of the studies."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from report.measures import MEASURES
from report.plots import BLUE, COLOURS, MARKERS, ORANGE, save_figure


def plot_contraction(rows: list[dict[str, Any]], whole: dict[str, Any], path: Path, title: str) -> None:
    """Plots top-1 (percent) and KL divergence against the share of MACs: one line per method, averaged over draws.

    rows: with method, share, macs, top1 and kl, see studies/contraction.py.  whole: macs and top1 of the whole network.
    """
    figure, panels = _two_panels(whole, "MACs, % of the whole network's")
    for style, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = [row for row in rows if row["method"] == method]
        points = [[row for row in own if row["share"] == share] for share in sorted({row["share"] for row in own})]
        macs = [100 * _mean(group, "macs") / whole["macs"] for group in points]
        _draw_line(panels, macs, points, method, style)
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(f"{title}: every module cut, no training", fontsize=11)
    save_figure(figure, path)


def plot_truncation(
    lines: dict[str, list[list[dict[str, Any]]]],
    shares: tuple[float, ...],
    whole: dict[str, Any],
    paper: dict[str, tuple[float, ...]],
    path: Path,
    title: str,
) -> None:
    """Plots top-1 (percent) and KL divergence against the share of dims kept: one line per setting, mean over draws.

    lines: label -> for each share, the rows of its draws, see studies/truncation.py; bars show their range.
    paper: label -> the paper's top-1 at each share, drawn with hollow markers.
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
        panels[0].plot([], [], label="hollow: the paper, DeiT-B on ImageNet", **hollow)
    for axes in panels:
        axes.set_xticks(x)
    panels[1].legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="lower left")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def plot_regimes(
    means: dict[tuple[str, str], dict[str, float]], paper: dict[str, tuple[float, ...]], path: Path, title: str
) -> None:
    """Plots top-1 (percent) of sub-networks: one line per training regime, one panel per kind of starting weights.

    means: (regime, "contracted" or "original") -> size -> mean top-1.  paper: regime -> the paper's top-1 at the sizes
    4:12 and 8:12, drawn with hollow markers.
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
    panels[1].plot([], [], label="hollow, left: the paper, DeiT-S on ImageNet", **hollow)
    panels[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(f"{title}: the same steps under each regime, not fine-tuned", fontsize=11)
    save_figure(figure, path)


def plot_alternatives(
    rows: list[dict[str, Any]], ways: tuple[str, ...], costs: dict[str, int], path: Path, title: str
) -> None:
    """Plots top-1 (percent) against MACs, one line per way, averaged over seeds; and the training cost of 12 sizes.

    rows: with way, size, macs and top1, see studies/alternatives.py.  costs: way -> number of images trained on.
    A way and its fine-tuned version share a colour; markers are hollow before fine-tuning.
    """
    figure, (axes, bars) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    kinds = list(dict.fromkeys(way.split(",")[0] for way in ways))
    for way in ways:
        own = [row for row in rows if row["way"] == way]
        points = [[row for row in own if row["size"] == size] for size in dict.fromkeys(row["size"] for row in own)]
        if points:
            style = kinds.index(way.split(",")[0])
            before = way == kinds[style] and any(other.startswith(f"{way},") for other in ways)  # fine-tuning
            look = {"color": COLOURS[style + 4], "marker": MARKERS[style], "linestyle": "--" if before else "-"}
            x, y = ([_mean(group, key) for group in points] for key in ("macs", "top1"))
            axes.plot([macs / 1e6 for macs in x], y, label=way, fillstyle="none" if before else "full", **look)
            bar = bars.barh(way, costs[way] / 1e3, color=look["color"], alpha=0.5 if before else 1.0)
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
    save_figure(figure, path)


def plot_curves(lines: dict[str, dict[str, dict[int, float]]], images: int, path: Path) -> None:
    """Plots top-1 (percent) against images trained on, one panel per share of the MACs.

    lines: share -> way -> epoch -> top-1. A way with one point is a line across the panel if nothing was trained, else
    a marker.  images: of an epoch.
    """
    figure, panels = plt.subplots(1, len(lines), figsize=(3.4 * len(lines), 3.6), layout="constrained", squeeze=False)
    ways = list(dict.fromkeys(way for ways in lines.values() for way in ways))
    for (part, curves), axes in zip(lines.items(), panels[0], strict=True):
        for way, points in curves.items():
            style = ways.index(way)
            if list(points) == [0]:
                axes.axhline(points[0], color=COLOURS[style], linestyle=":", label=way)
            else:
                x = [epoch * images / 1e3 for epoch in points]
                axes.plot(
                    x, list(points.values()), color=COLOURS[style], marker=MARKERS[style], markersize=4, label=way
                )
        axes.set(title=f"{float(part):.1%} of the MACs", xlabel="thousand images trained on")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("top-1 accuracy, %")
    panels[0][0].legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def plot_quantized(rows: list[dict[str, Any]], keys: list[str], path: Path, title: str) -> None:
    """Plots measures (`keys`, a row of panels each) against milliseconds (a column per batch size): a line per dtype.

    rows: with dtype, batch_size, milliseconds and the measures, see studies/quantized.py. A KL divergence that is far
    below the others, such as the whole network's own, is not drawn: that axis is logarithmic.
    """
    batches, dtypes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("batch_size", "dtype"))
    size = (5 * len(batches), 3.4 * len(keys))
    figure, panels = plt.subplots(len(keys), len(batches), figsize=size, layout="constrained", squeeze=False)
    for (key, batch), axes in zip(itertools.product(keys, batches), panels.flat, strict=True):
        for dtype, colour, marker in zip(dtypes, (BLUE, ORANGE), "os", strict=True):
            own = [row for row in rows if (row["batch_size"], row["dtype"]) == (batch, dtype)]
            own = [row for row in own if key != "kl" or row[key] > max(row["kl"] for row in rows) / 1e5]
            look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2}
            axes.plot([row["milliseconds"] for row in own], [row[key] for row in own], label=dtype, **look)
        axes.set(xlabel=f"milliseconds for {batch} image{'s' if batch > 1 else ''}")
        unit = MEASURES[key].suffix and f", {MEASURES[key].unit}"
        axes.set_ylabel(MEASURES[key].label + unit, fontsize=8)
        axes.set_yscale("log" if key == "kl" else "linear")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def plot_rivals(
    rows: list[dict[str, Any]],
    measures: list[str],
    path: Path,
    title: str,
    whole: dict[str, Any] | None = None,
) -> None:
    """Plots each measure against the share of MACs, one panel per measure, one line per method, mean over draws.

    rows: with method, size, macs_share and the measures, see studies/rivals.py.  whole: the whole network's measures.
    """
    labels = {"top1": "top-1 accuracy, %", "kl": "KL divergence from the whole network, nats", "iou": "IoU of the maps"}
    labels |= {"features": "cosine of the features", "patch": "cosine of the patch tokens"}
    figure, panels = plt.subplots(1, len(measures), figsize=(5 * len(measures), 5), layout="constrained")
    for axes, measure in zip(panels, measures, strict=True):
        for style, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            own = [row for row in rows if row["method"] == method]
            points = [[row for row in own if row["size"] == size] for size in {row["size"]: None for row in own}]
            points.sort(key=lambda group: _mean(group, "macs_share"))
            x, y = ([_mean(group, key) for group in points] for key in ("macs_share", measure))
            axes.plot([100 * share for share in x], y, label=method, **_one_of_many(style))
        axes.set(xlabel="MACs, % of the whole network's", ylabel=labels[measure])
        axes.set_yscale("log" if measure == "kl" else "linear")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if whole:
        panels[0].axhline(whole[measures[0]], color="black", linewidth=0.8, linestyle=":", label="whole network")
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=4
    )
    figure.suptitle(f"{title}: no training", fontsize=11)
    save_figure(figure, path)


def plot_rivals_trained(
    lines: list[tuple[str, bool, list[dict[str, Any]]]], whole: dict[str, Any], path: Path, title: str
) -> None:
    """Plots top-1 (percent) against the share of MACs: networks of many sizes left, one size at a time right.

    lines: name of a method, whether its sizes train alone, and the rows of its seeds, see studies/rivals_trained.py.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for style, (method, one_size, rows) in enumerate(lines):
        parts = sorted((part for part, share in rows[0]["macs_share"].items() if share is not None), key=float)
        x, y = ([sum(row[name][part] for row in rows) / len(rows) for part in parts] for name in ("macs_share", "top1"))
        panels[int(one_size)].plot([100 * share for share in x], y, label=method, **_one_of_many(style))
    for axes, name in zip(panels, ("one network for all sizes", "one size at a time"), strict=True):
        axes.axhline(whole["top1"], color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel="MACs, % of the whole network's", title=name)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(edgecolor="none", fontsize=8)
    panels[0].set_ylabel("top-1 accuracy, %")
    figure.suptitle(f"{title}: the same images for each network", fontsize=11)
    save_figure(figure, path)


def plot_maps(photos: Tensor, maps: dict[str, Tensor], path: Path) -> None:
    """Draws photos (n, 3, height, width), of values 0..1, and below them a row of maps (n, height, width) per name."""
    rows = {"photo": photos.permute(0, 2, 3, 1), **maps}
    size = (1.6 * len(photos) + 0.6, 1.6 * len(rows))
    figure, panels = plt.subplots(len(rows), len(photos), figsize=size, layout="constrained", squeeze=False)
    for (name, images), line in zip(rows.items(), panels, strict=True):
        for image, axes in zip(images, line, strict=True):
            axes.imshow(image.clamp(0, 1), cmap="magma", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    save_figure(figure, path)


def _two_panels(whole: dict[str, Any], xlabel: str) -> tuple[Figure, list[Axes]]:
    """Axes for top-1, with a line at the whole network's, and for KL divergence."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    panels[0].axhline(whole["top1"], color="black", linewidth=0.8, linestyle=":", label="whole network")
    panels[0].set(xlabel=xlabel, ylabel="top-1 accuracy, %")
    panels[1].set(xlabel=xlabel, ylabel="KL divergence from the whole network, nats", yscale="log")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _draw_line(
    panels: list[Axes], x: list[float], points: list[list[dict]], label: str, style: int, spread: bool = False
) -> None:
    """Draws one line in both panels: the mean of the rows at each x; with `spread`, also a bar for their range."""
    look = {"color": COLOURS[style % len(COLOURS)], "marker": MARKERS[style % len(MARKERS)], "markersize": 4}
    for axes, key in zip(panels, ("top1", "kl"), strict=True):
        axes.plot(x, [_mean(rows, key) for rows in points], label=label, linewidth=1.2, **look)
        if spread:
            limits = [[bound([row[key] for row in rows]) for rows in points] for bound in (min, max)]
            axes.vlines(x, *limits, color=look["color"], linewidth=1.2)


def _one_of_many(style: int) -> dict[str, Any]:
    """How a line looks where there are more lines than colours: those after the first round are dashed."""
    rounds, colour = divmod(style, len(COLOURS))
    marker = MARKERS[(style + rounds) % len(MARKERS)]
    look = {"color": COLOURS[colour], "linestyle": "--" if rounds else "-", "marker": marker}
    return look | {"markersize": 4, "linewidth": 1.2}


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)
