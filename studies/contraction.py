"""Accuracy of a network whose modules are all cut without training, by methods from sorting to refitting.

    python -m studies.contraction --name vit_small_cifar10 --data-path DIR --checkpoint FILE ...
    python -m studies.contraction --part proxies ...        64, 256 and 1,024 proxy images, several dampings
    python -m studies.contraction --part costs ...          the costs whose gradient the method "best" uses
    python -m studies.contraction --part apart ...          attention only, with other widths for q and k than for v

Measures top-1 (percent) on val/ and the KL divergence of the outputs from those of the whole network, for each method
of METHODS and each share of the dims that every module keeps; methods with a mask table use its largest size within
the MACs of that share. Writes docs/results/contraction_NAME.json after each measurement and skips measurements that
are already there; draws the methods in a .png beside it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arguments import Parser, positive
from arguments import share as share_type
from datasets import proxy_set
from models.backbone import full_widths, modules_of
from models.extraction import extract
from models.macs import count_macs
from studies.common import Batches, CutStudy, add_study_arguments
from studies.contraction_methods import COST_METHODS, METHODS, PREPARE, Contracted, cut_apart, piad_table
from studies.plots import plot_contraction
from utils import init_processes, progress_bar, run_program
from wpac.compensation import DAMPING, Compensation, OutputMoments, ordered_layer
from wpac.refit import refit
from wpac.statistics import collect_statistics
from wpac.transform import contract

SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
# Shares of the dims kept (of q and k, of v). The first three pairs have the same MACs, and so have the last three.
APART = ((1 / 16, 3 / 16), (1 / 8, 1 / 8), (3 / 16, 1 / 16), (1 / 8, 3 / 8), (1 / 4, 1 / 4), (3 / 8, 1 / 8))
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Study(CutStudy):
    """Measures the methods one after another."""

    @functools.lru_cache(maxsize=1)  # noqa: B019 -- consecutive methods share a prepared model
    def prepared(self, prepare: str, proxy: int, draw: int, damping: float) -> tuple[Contracted, Batches, float]:
        """The prepared model, the proxy batches, and the seconds that the preparation took."""
        batches, start = self.proxy(proxy, draw), time.perf_counter()
        return PREPARE[prepare](copy.deepcopy(self.base), batches, damping), batches, time.perf_counter() - start

    def measure(self, name: str, draw: int, proxy: int, damping: float, shares: tuple[float, ...]) -> None:
        """Measures one method at the shares for which there is no result."""
        key = {"method": name, "draw": draw, "proxy": proxy, "damping": damping, "images": self.val_images}
        shares = tuple(share for share in shares if not self.results.rows("rows", **key, share=share))
        if not shares:
            return
        method = METHODS[name]
        contracted, batches, seconds = self.prepared(method.prepare, proxy, draw, damping)
        table = {"uniform": None, "allocation": contracted.table}.get(method.widths)
        if method.widths == "piad":
            table = piad_table(contracted.model, batches)
        for share in shares:
            widths = {module: int(width * share) for module, width in full_widths(self.base).items()}
            macs = count_macs(self.base, widths)
            if table:
                widths = table.widths(replace(self.network, table=table).select(max_macs=macs))
            start = time.perf_counter()
            small = extract(contracted.model, widths)
            if method.refitted:
                refit(contracted.model, small, (images for images, _ in batches))
            times = {"seconds_to_prepare": seconds, "seconds_to_cut": time.perf_counter() - start}
            row = {**key, "share": share, "macs": count_macs(self.base, widths), **self.scores(self.logits(small))}
            self.results.add("rows", row | times)

    def apart(self, draw: int, proxy: int) -> None:
        """Cuts only attention, with different widths for q and k than for v at the same MACs."""
        for qk, v in APART:
            key = {"qk": qk, "v": v, "images": self.val_images, "draw": draw, "proxy": proxy}
            if not self.results.rows("apart", **key):
                contracted, _, _ = self.prepared("best", proxy, draw, DAMPING)
                self.results.add("apart", key | self.scores(self.logits(cut_apart(contracted.model, qk, v))))

    def held_out(self, number: int, draw: int) -> None:
        """Relative error of compensation for each damping, fitted on half of the proxy images, measured on the rest."""
        if self.results.rows("damping", proxy=number, draw=draw):
            return
        batches = self.batches(proxy_set(self.images, number, draw))
        images, targets = (torch.cat(part) for part in zip(*batches, strict=True))
        halves = [list(zip(images[i::2].split(64), targets[i::2].split(64), strict=True)) for i in (0, 1)]
        model = copy.deepcopy(self.base)
        statistics = collect_statistics(model, halves[0], outputs=True)
        contract(model, statistics, "fisher", "fisher")
        others = collect_statistics(model, halves[1], outputs=True).outputs
        errors = dict.fromkeys(DAMPINGS, 0.0)
        for key, module in modules_of(model).items():
            order = torch.arange(module.heads * module.width).view(module.heads, module.width).T.flatten()
            weight, bias = ordered_layer(model, module)
            other = others[key].reordered(order)
            for damping in DAMPINGS:
                fitted = statistics.outputs[key]
                lower = torch.linalg.cholesky(fitted.damped(damping))
                cut, _ = Compensation(fitted.mean, lower, fitted.positions)(weight, bias, weight.shape[1] // 4)
                errors[damping] += relative_error(weight, cut, other) / len(others)
        row = {"proxy": number, "draw": draw, "held_out_error": {f"{d:g}": e for d, e in errors.items()}}
        self.results.add("damping", row)


def relative_error(weight: Tensor, cut: Tensor, moments: OutputMoments) -> float:
    """Squared error of a layer cut to weight `cut` (D, k), relative to the variance of its output.

    Both are taken in the metric of the loss. weight: (D, n), of the whole layer.
    """
    lost = weight.clone()
    lost[:, : cut.shape[1]] -= cut
    error, whole = ((moments.metric * (w @ moments.covariance @ w.T)).sum() for w in (lost, weight))
    return (error / whole).item()


def markdown(results: dict[str, Any]) -> str:
    """The results as tables of means over the draws: top-1 and KL of methods, damping, other widths for q and k."""
    lines = []
    for whole in sorted(results["whole"], key=lambda whole: -whole["images"]):
        rows = [row for row in results["rows"] if row["images"] == whole["images"]]
        if rows:
            lines += [
                f"Whole: {whole['top1']:.1f} % of {whole['images']} images, {whole['macs'] / 1e6:.4g} M MACs.",
                "",
            ]
            lines += [*_rows(rows), ""]
    if results.get("damping"):
        dampings = list(results["damping"][0]["held_out_error"])
        lines += ["| proxy images | " + " | ".join(f"damping {damping}" for damping in dampings) + " |"]
        lines += ["|---" * (len(dampings) + 1) + "|"]
        for row in results["damping"]:
            errors = " | ".join(f"{error:.4f}" for error in row["held_out_error"].values())
            lines.append(f"| {row['proxy']} (draw {row['draw']}) | {errors} |")
        lines.append("")
    if results.get("apart"):
        lines += ["| q and k kept | v kept | images | top-1 | KL |", "|---|---|---|---|---|"]
        for row in results["apart"]:
            lines.append(f"| {row['qk']:g} | {row['v']:g} | {row['images']} | {row['top1']:.1f} | {row['kl']:.4f} |")
    return "\n".join(lines).strip()


def _rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of the table of methods."""
    shares = sorted({row["share"] for row in rows})
    yield "| method | proxy images x draws, damping | " + " | ".join(f"{share:g}" for share in shares) + " |"
    yield "|---" * (len(shares) + 2) + "|"
    groups = {(row["proxy"], row["damping"], row["method"]) for row in rows}
    order = list(METHODS)
    for proxy, damping, method in sorted(groups, key=lambda g: (-g[0], g[1] != DAMPING, g[1], order.index(g[2]))):
        same = [row for row in rows if (row["proxy"], row["damping"], row["method"]) == (proxy, damping, method)]
        cells = []
        for share in shares:
            found = [row for row in same if row["share"] == share]
            values = [sum(row[key] for row in found) / max(len(found), 1) for key in ("top1", "kl")]
            cells.append(f"{values[0]:.1f}, {values[1]:.4f}" if found else "")
        draws = len({row["draw"] for row in same})
        yield f"| {method} | {proxy} x {draws}, {damping:g} | " + " | ".join(cells) + " |"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = add_study_arguments(parser)
    group.add_argument(
        "--part",
        choices=("methods", "proxies", "costs", "apart"),
        default="methods",
        help="see above (default: %(default)s)",
    )
    group.add_argument(
        "--proxies", type=positive, nargs="+", default=[64, 256, 1024], metavar="N", help="numbers of proxy images"
    )
    group.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=[name for name in METHODS if name not in COST_METHODS],
        metavar="NAME",
        help="methods to measure (default: all but those with a cost)",
    )
    group.add_argument(
        "--shares", type=share_type, nargs="+", default=SHARES, metavar="X", help="shares of the dims that are kept"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    study = Study(args, init_processes(args), args.output_dir / f"contraction_{args.name}.json")
    results, whole = study.results, study.reference
    print(f"whole: top-1 {whole['top1']:.2f} % on {whole['images']} images, {whole['macs'] / 1e9:.3f} GMACs")
    for draw in progress_bar(args.draws, "draws"):
        if args.part in ("methods", "costs"):
            for method in args.methods if args.part == "methods" else sorted(COST_METHODS):
                study.measure(method, draw, args.proxy_samples, DAMPING, args.shares)
            continue
        if args.part == "apart":
            study.apart(draw, args.proxy_samples)
            continue
        for number in args.proxies:
            study.held_out(number, draw)
            for damping in (DAMPING / 10, DAMPING * 10, DAMPING):
                study.measure("+ bases and order (best)", draw, number, damping, args.shares)
            study.measure("best, refitted", draw, number, DAMPING, args.shares)
            study.measure("WPAC + compensation", draw, number, DAMPING, args.shares)
    results.log()
    print(markdown(results.content))
    draw_methods(results.content, results.path.with_suffix(".png"), args.name.replace("_", " "))
    print(json.dumps({"file": results.path.name, "rows": len(results.rows("rows")), "whole": whole}))


def draw_methods(results: dict[str, Any], path: Path, title: str) -> None:
    """Draws the methods, from the results on the most val/ and proxy images with the default damping."""
    whole = max(results["whole"], key=lambda whole: whole["images"])
    rows = [row for row in results["rows"] if (row["images"], row["damping"]) == (whole["images"], DAMPING)]
    rows = [row for row in rows if METHODS[row["method"]].prepare != "rounded"]  # equal to "best", which it would hide
    most = max((row["proxy"] for row in rows), default=0)
    rows = sorted((row for row in rows if row["proxy"] == most), key=lambda row: list(METHODS).index(row["method"]))
    plot_contraction(rows, whole, path, f"{title}, {whole['images']} images")


if __name__ == "__main__":
    run_program(main)
