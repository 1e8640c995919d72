"""Compression without training: methods of other papers beside this project's, on the same checkpoint and images.

    python -m studies.rivals classifier --name vit_small_cifar10 --data-path DIR --checkpoint FILE ...
    python -m studies.rivals encoder --name saliency_encoder --photos DIR --checkpoint FILE --head FILE ...

Each of studies.rivals_methods.METHODS makes networks of each of --sizes from the whole network and the same images: at
most a share of its MACs ("0.25"), or without a percentage of the hidden units, of the dims of q and k, or of the heads
("mlp61+qk60"; only the methods that can cut just so). Measures of a classifier top-1 (percent) on val/ and the KL
divergence from the outputs of the whole network; of an encoder what studies.encoders measures. Seconds are CPU seconds
of the process. Writes docs/results/rivals_NAME.json after each measurement and skips measurements that are already
there; draws a .png beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from arguments import Parser
from studies import encoders
from studies.common import CutStudy, add_study_arguments
from studies.plots import plot_rivals
from studies.rivals_methods import METHODS
from studies.rivals_task import Size, Task, macs_of
from utils import init_processes, progress_bar, run_program

SIZES = ("0.125", "0.25", "0.5", "0.75", "mlp50", "mlp61+qk60", "mlp92+qk88", "mlp35+heads20")
MEASURES = {"classifier": ("top1", "kl"), "encoder": tuple(encoders.SCORES)}
NOT_DRAWN = ("random", "magnitude", "SnapViT, not corrected", "CORP, statistics of the whole network")
FORMATS = {"top1": ".1f", "kl": ".4f", "features": ".3f", "patch": ".3f", "iou": ".3f"}


class Classifier(CutStudy):
    """A classifier: images and labels of a data set to fit on, and val/ to measure on."""

    def __init__(self, args: argparse.Namespace, device: torch.device, path: Path):
        super().__init__(args, device, path)
        self.fit = args.proxy_samples

    def task(self, draw: int) -> Task:
        return Task(self.network, self.proxy(self.fit, draw), draw)

    def measure(self, model: VisionTransformer) -> dict[str, float]:
        return self.scores(self.logits(model))

    @property
    def report(self) -> int:
        return self.val_images


class Encoder(encoders.Study):
    """An encoder without a head: photos to fit on, and others to measure on."""

    def __init__(self, args: argparse.Namespace, device: torch.device, path: Path):
        super().__init__(args, path)
        self.fit, self.report = len(self.fitted), len(self.others)

    def task(self, draw: int) -> Task:
        batches = self.fitted.split(encoders.BATCH)
        return Task(self.network, [(images, torch.zeros(len(images), dtype=torch.long)) for images in batches], draw)

    def measure(self, model: VisionTransformer) -> dict[str, float]:
        return self.scores(model)[0]


def run_method(bench: Classifier | Encoder, task: Task, name: str, sizes: list[str]) -> None:
    """Measures a method at the sizes for which there is no result; a size that it does not have gets empty values.

    What it searched for is written down, too, so that a later run need not search again.
    """
    key = {"method": name, "draw": task.seed, "fit": bench.fit, "report": bench.report}
    missing = [size for size in sizes if not bench.results.rows("rows", **key, size=size)]
    if not missing:
        return
    task.borrowed, start = 0.0, time.process_time()
    cutter = METHODS[name](task)
    prepared, whole = time.process_time() - start + task.borrowed, macs_of(task.model)
    for search, found in task.searches.items():
        searched = {"search": search, "draw": task.seed, "fit": bench.fit}
        if not bench.results.rows("searches", **searched):
            bench.results.add("searches", searched | {"found": found})
    for size in missing:
        start = time.process_time()
        small = cutter(Size.parse(size))
        seconds = {"seconds_to_prepare": prepared, "seconds_to_cut": time.process_time() - start}
        row = {"size": size, "macs_share": None if small is None else macs_of(small) / whole}
        bench.results.add("rows", key | row | ({} if small is None else bench.measure(small)) | seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def markdown(results: dict[str, Any]) -> str:
    """A table for each number of images that were fitted and reported on: means over the draws."""
    rows = results["rows"]
    lines, measures = [], measures_of(rows)
    for fit, report in sorted({(row["fit"], row["report"]) for row in rows}, reverse=True):
        own = [row for row in rows if (row["fit"], row["report"]) == (fit, report)]
        sizes = [size for size in dict.fromkeys((*SIZES, *(row["size"] for row in own)))
                 if any(row["size"] == size for row in own)]  # fmt: skip
        lines += ["", f"Fitted on {fit} images, measured on {report} others: {', '.join(measures)}.", ""]
        lines.append("| method | draws | seconds | " + " | ".join(sizes) + " |")
        lines.append("|---" * (len(sizes) + 3) + "|")
        for method in METHODS:
            same = [row for row in own if row["method"] == method]
            if same:
                cells = [_cell([row for row in same if row["size"] == size], measures) for size in sizes]
                spent = [row["seconds_to_prepare"] + row["seconds_to_cut"] for row in same if row["macs_share"]]
                seconds = f"{_mean(spent):.0f}" if spent else ""
                draws = len({row["draw"] for row in same})
                lines.append(f"| {method} | {draws} | {seconds} | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


def measures_of(rows: list[dict[str, Any]]) -> list[str]:
    """What the rows have been measured by; there is no IoU without a head."""
    return [name for names in MEASURES.values() for name in names if any(name in row for row in rows)]


def _cell(rows: list[dict[str, Any]], measures: list[str]) -> str:
    """The mean of each measure; and the share of the MACs, where it is far from what was asked for."""
    rows = [row for row in rows if row["macs_share"]]
    if not rows:
        return ""
    means = ", ".join(f"{_mean([row[key] for row in rows]):{FORMATS[key]}}" for key in measures)
    return means + off_size(rows[0]["size"], _mean([row["macs_share"] for row in rows]))


def off_size(size: str, macs_share: float) -> str:
    """The share of the MACs as a suffix, such as " at 0.107", if it is more than 5 % off the size; otherwise "".

    size: the name of a Size.
    """
    asked = Size.parse(size).macs
    return f" at {macs_share:.3f}" if asked and abs(macs_share / asked - 1) > 0.05 else ""


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw_rivals(results: dict[str, Any], path: Path, title: str) -> None:
    """Draws the shares of the MACs, without NOT_DRAWN, from the rows of the images on which most was measured."""
    rows = [row for row in results["rows"] if row["macs_share"] and Size.parse(row["size"]).macs is not None]
    if not rows:
        return
    most = Counter((row["fit"], row["report"]) for row in rows).most_common(1)[0][0]
    rows = [row for row in rows if (row["fit"], row["report"]) == most and row["method"] not in NOT_DRAWN]
    measures = measures_of(rows)
    rows.sort(key=lambda row: list(METHODS).index(row["method"]))
    whole = next((row for row in results.get("whole", []) if row["images"] == most[1]), None)
    plot_rivals(rows, measures, path, title, whole)


# ---------------------------------------------------------------------------------------------------------------------
# The program


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=Parser)
    classifier, encoder = (kinds.add_parser(name) for name in MEASURES)
    groups = add_study_arguments(classifier), encoders.add_encoder_arguments(encoder)
    classifier.set_defaults(draws=[0])
    encoder.set_defaults(draws=[0])
    for group in groups:
        group.add_argument(
            "--methods",
            nargs="+",
            choices=METHODS,
            default=[name for name in METHODS if "steps" not in name],
            metavar="NAME",
            help="methods to measure (default: all but refitting by steps, which trains)",
        )
        known = f"see above (default: {' '.join(SIZES)})"
        group.add_argument("--sizes", nargs="+", type=size_name, default=SIZES, metavar="SIZE", help=known)
    return parser.parse_args()


def size_name(text: str) -> str:
    """An argparse type: the name of a Size."""
    try:
        Size.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 0.25 or mlp61+qk60") from error
    return text


def main() -> None:
    args = parse_arguments()
    bench_of = {"classifier": Classifier, "encoder": Encoder}[args.kind]
    bench = bench_of(args, init_processes(args), args.output_dir / f"rivals_{args.name}.json")
    for draw in progress_bar(args.draws, "draws"):
        task = bench.task(draw)
        task.searches = {
            row["search"]: row["found"] for row in bench.results.rows("searches", draw=draw, fit=bench.fit)
        }
        for method in args.methods:
            run_method(bench, task, method, args.sizes)
    results = bench.results
    results.log()
    print(markdown(results.content))
    draw_rivals(results.content, results.path.with_suffix(".png"), args.name.replace("_", " "))
    print(json.dumps({"file": results.path.name, "rows": len(results.rows("rows"))}))


if __name__ == "__main__":
    run_program(main)
