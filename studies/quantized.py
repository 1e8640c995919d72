"""Sizes in float32 and in int8 side by side in ONNX Runtime: for a given number of milliseconds, which is best?

    python -m studies.quantized --name vit_small_cifar10 --checkpoint output/best --data-set cifar10 \
        --data-path cifar10 --threads 2

Sizes of the mask table, evenly spaced in MACs, are written as the ONNX files of `export.py --format onnx onnx-int8`.
Each file is compared with the whole network in float32 on the images of val/: KL divergence (nats) or cosine and, with
labels, top-1. Then all files are timed in alternation, at each batch size. Writes docs/results/quantized_NAME.json and
.png, and skips what is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import supernet
from arguments import Parser, add_data_set, positive
from benchmarks.common import CLOCKS, describe_machine, milliseconds
from datasets import drawn, eval_loader, open_images, proxy_set
from fidelity import Evaluator
from models.macs import count_macs
from report.exports import FileModel
from report.measures import MEASURES, curves_of, measures_of
from studies.common import RESULTS, Results, facts_of
from studies.plots import plot_quantized
from supernet.amounts import format_amount
from supernet.formats import model_of_target
from supernet.graphs import ONNX_PACKAGES, check_packages, graph_of, onnx_outputs, write_onnx_graph
from supernet.known_fidelity import SIGNS
from supernet.reduction import write_int8
from supernet.runtimes import version_of
from supernet.timing import random_images, time_alternately
from utils import UserError, run_program, say, seed_everything

DTYPES = ("float32", "int8")


class Study:
    """The files of the sizes, what they lose and how long they take."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        """folder: where the ONNX files are written."""
        self.args, self.folder = args, folder
        self.network = supernet.load(args.checkpoint)
        self.codes = self.network.evenly_spaced(args.sizes)
        if len(self.codes) < 2:
            raise UserError(f"{args.checkpoint} has no mask table of several sizes: contract with --mask-table")
        train, val = (open_images(args.data_set, args.data_path, part, args.index, 0) for part in ("train", "val"))
        proxy = proxy_set(train, args.calibration, 0)
        val = drawn(val, args.val_images, 0) if args.val_images else val
        self.compared = {"images": len(val), "calibration": len(proxy)}
        load = partial(eval_loader, config=self.network.preprocessing, batch_size=16, workers=0)
        self.calibration = [images for images, _ in load(proxy)]
        labels = self.network.target == "logits" and val.num_classes == self.network.model.num_classes
        cpu, whole = torch.device("cpu"), self.network.model
        self.evaluator = Evaluator(self.network.target, load(val), cpu, labels=labels, whole=whole)
        facts = facts_of(self.network) | {"machine": describe_machine(cpu) | {"runtime": version_of("onnxruntime")}}
        self.results = Results(args.output_dir / f"quantized_{args.name}.json", **facts)

    def file(self, code: int, dtype: str) -> Path:
        """The ONNX file of a size, written when it is first asked for."""
        path = self.folder / f"{code}_{dtype}.onnx"
        if not path.exists() and dtype == "int8":
            write_int8(self.file(code, "float32"), path, self.calibration)
        elif not path.exists():
            model = model_of_target(self.network.cut(code).eval(), self.network.target)
            write_onnx_graph(graph_of(model, self.network.preprocessing["input_size"]), path, self.network.target)
        return path

    def compare(self) -> None:
        """Adds a row for each file that was not compared yet: MACs, bytes, and the measures of report.measures."""
        for code in self.codes:
            for dtype in DTYPES:
                key = {"op_code": code, "dtype": dtype, **self.compared}
                if self.results.rows("sizes", **key):
                    continue
                path, small = self.file(code, dtype), self.network.cut(code)
                found = self.evaluator(FileModel(onnx_outputs(path), small, self.network.target))
                numbers = {"macs": count_macs(small), "bytes": path.stat().st_size}
                self.results.add("sizes", key | numbers | {name: found[name] for name in MEASURES if name in found})

    def time(self, batch_size: int) -> None:
        """Adds a row for each file: milliseconds for a batch, all of them timed in alternation."""
        args = self.args
        key = {"batch_size": batch_size, "threads": torch.get_num_threads(), "clock": args.clock, "count": args.sizes}
        if self.results.rows("times", **key):
            return
        images = random_images(self.network.model, batch_size, torch.device("cpu"))
        files = [(code, dtype) for code in self.codes for dtype in DTYPES]
        calls = {file: partial(onnx_outputs(self.file(*file)), images) for file in files}
        seconds = time_alternately(calls, images.device, repeats=args.repeats, warmup=3, now=CLOCKS[args.clock])
        for code, dtype in files:
            row = {"op_code": code, "dtype": dtype, "milliseconds": milliseconds(seconds[code, dtype])}
            self.results.add("times", key | row)


def joined(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of times, each with what was compared of its file."""
    sizes = {(row["op_code"], row["dtype"]): row for row in results["sizes"]}
    return [sizes[row["op_code"], row["dtype"]] | row for row in results["times"]]


def score(row: dict[str, Any]) -> float:
    """How near a file is to the whole network; more is better."""
    return next(sign * row[key] for key, sign in SIGNS.items() if key in row)


def best_within(rows: list[dict[str, Any]], limit: float) -> dict[str, Any] | None:
    """Of the rows that take at most `limit` milliseconds, the one that is nearest to the whole network."""
    return max((row for row in rows if row["milliseconds"] <= limit), key=score, default=None)


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/RESULTS.md: all files; and for the time of each float32 size, the best file of each dtype."""
    rows, whole = joined(results), max(row["macs"] for row in results["sizes"])
    batches = list(dict.fromkeys(row["batch_size"] for row in rows))
    measures = curves_of(rows[0])
    names = [measure.name for measure in measures.values()]
    times = [f"ms, {batch} image{'s' if batch > 1 else ''}" for batch in batches]
    lines = _head(["MACs", "numbers", "MB", *names, *times])
    for size in results["sizes"]:
        own = [row for row in rows if (row["op_code"], row["dtype"]) == (size["op_code"], size["dtype"])]
        cells = [format_amount(size["macs"]), size["dtype"], f"{size['bytes'] / 1e6:.1f}"]
        cells += [measure.text(size[key]) for key, measure in measures.items()]
        lines.append(_line([*cells, *(f"{row['milliseconds']:.3g}" for row in own)]))
    lines += ["", *_head(["images", "at most, ms", *(f"best in {dtype}" for dtype in DTYPES)])]
    for batch in batches:
        of = {dtype: [row for row in rows if (row["batch_size"], row["dtype"]) == (batch, dtype)] for dtype in DTYPES}
        for limit in sorted((row["milliseconds"] for row in of["float32"]), reverse=True):
            found = [_in_words(best_within(of[dtype], limit), whole) for dtype in DTYPES]
            lines.append(_line([str(batch), f"{limit:.3g}", *found]))
    return "\n".join(lines)


def _in_words(row: dict[str, Any] | None, whole: int) -> str:
    if row is None:
        return "none"
    measures = [f"{measure.name} {measure.with_unit(row[key])}" for key, measure in measures_of(row).items()]
    return ", ".join([f"{row['macs'] / whole:.0%} of the MACs", *measures])


def _head(names: list[str]) -> list[str]:
    return [_line(names), "|---" * len(names) + "|"]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("study")
    group.add_argument("--name", required=True, help="of the model and data, used in file names")
    group.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a super-network's folder")
    add_data_set(group, default="folder")
    group.add_argument("--val-images", type=positive, metavar="N", help="images of val/ to use (default: all)")
    group.add_argument("--calibration", type=positive, default=256, metavar="N", help="images of int8 (default: 256)")
    group.add_argument("--sizes", type=positive, default=8, metavar="N", help="evenly spaced in MACs (default: 8)")
    group.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 16], metavar="N", help="that are timed")
    group.add_argument("--repeats", type=positive, default=20, metavar="N", help="timed rounds (default: 20)")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: those of PyTorch)")
    group.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: CPU time, for a shared machine, one thread"
    )
    group.add_argument("--output-dir", type=Path, default=RESULTS, metavar="DIR", help="where results go")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    check_packages(ONNX_PACKAGES, "studies.quantized")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    seed_everything(0)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(args, Path(folder))
        study.compare()
        for batch_size in args.batch_sizes:
            study.time(batch_size)
    study.results.log()
    content = study.results.content
    say(markdown(content))
    rows, picture = joined(content), study.results.path.with_suffix(".png")
    keys = dict.fromkeys([*measures_of(rows[0])][:1] + [key for key in SIGNS if key in rows[0]][:1])
    plot_quantized(rows, [*keys], picture, f"{content['model']} in ONNX Runtime, {args.name}")
    print(json.dumps({"file": study.results.path.name, "picture": picture.name}))


if __name__ == "__main__":
    run_program(main)
