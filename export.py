"""Sub-networks as files for elsewhere: a folder, a .pt2 for torch alone, an .onnx for onnxruntime alone.

python export.py output/peelable/digits --macs 200K --format folder onnx torch-export --output output/small
python export.py output/peelable/digits --all 12 --format onnx --output output/sizes
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from arguments import open_network
from datasets import Images, check_labels, open_images
from export_arguments import check_arguments, parse_arguments, say_what_is_timed
from files import read_json, write_text
from models.loading import fit_head
from models.targets import TARGETS
from report.exports import make_checks, make_evaluator, measure, reduced_table, table_row
from report.frontier import cut_or_refit, table_of
from supernet import Network
from supernet.budgets import asks_for_size, chosen_op_codes, latencies_of
from supernet.facts import CONFIG, WEIGHTS
from supernet.formats import write_formats
from supernet.graphs import BATCH, IMAGES
from supernet.latency import Latencies
from supernet.latency_table import MEASURE, LatencyTable, write_measure
from supernet.saving import CODE
from utils import UserError, init_processes, progress_bar, run_program, say, seed_everything


def main() -> None:
    """Opens the network, then measures, writes and checks each size; in the end all files are there, or none."""
    args = parse_arguments()
    check_arguments(args)
    say_what_is_timed(args)
    init_processes(args)
    seed_everything(args.seed)
    network = open_network(args)
    images = open_images(args.data_set, args.data_path, "val", args.index, args.seed) if args.data_set else None
    check_measures(args, network, images)
    checks = make_checks(args, network, images)
    latencies = latencies_of(args, network)
    op_codes = choose(args, network, latencies)
    evaluator = make_evaluator(args, network, images, torch.device(args.device))
    cut = cut_or_refit(args, network, 64, 0)
    rows = []
    with whole_folder(args.output) as folder:
        for code in progress_bar(op_codes, "sizes"):
            small = cut(code).float().eval()
            row = measure(args, network, small, code, evaluator, latencies)
            small.to("cpu")
            place = folder / f"op_{code}" if len(op_codes) > 1 else folder
            rows.append(row | write_formats(args.format, network, small, row, place, folder, checks, args.static_batch))
        index = describe_export(network, args.static_batch) | {"sizes": rows}
        write_text(folder / "index.json", json.dumps(index, indent=1) + "\n")
        measured = [
            (path, row["op_code"], row["macs_linear"])
            for row in rows
            for name, path in row["files"].items()
            if name != "folder"
        ]
        if args.frontier and measured:
            write_measure(folder / MEASURE, measured, args.static_batch or 1)
    print("\n".join(text for text in (table_of([table_row(row) for row in rows]), reduced_table(rows)) if text))
    say(f"written: {args.output}, {len(rows)} size{'s' if len(rows) > 1 else ''}, and index.json")


def describe_export(network: Network, static_batch: int | None) -> dict[str, Any]:
    """What index.json says of all files: the network, named as in config.json and frontier.json, input and output."""
    return {
        "weights": network.source.name,
        **network.describe(),
        "grade": network.grade,
        "input": f"{IMAGES}, float32 ({BATCH}, channels, height, width), prepared as preprocessing says",
        "output": f"{network.target}, float32 {TARGETS[network.target]}",
        "static_batch": static_batch,
    }


def choose(args: argparse.Namespace, network: Network, latencies: Latencies | LatencyTable) -> list[int]:
    """The op codes that the flags ask for; a sub-network has one. Raises UserError where no size is asked for."""
    if network.is_subnetwork and args.refit is not False:
        raise UserError(f"{args.checkpoint} is a sub-network, which is cut already: leave --refit out")
    if asks_for_size(args) or args.frontier:
        return chosen_op_codes(args, network, latencies)
    if len(network.table) > 1:
        raise UserError(f"{args.checkpoint} has {len(network.table)} sizes: give --macs, another budget, or --all 12")
    return [0]


def check_measures(args: argparse.Namespace, network: Network, images: Images | None) -> None:
    """Raises UserError for what cannot be measured of the network on the images."""
    if "top1" in args.measure:
        check_labels(images, args.data_set, "--measure top1", "give fidelity")
        if network.target != "logits":
            raise UserError(f"--measure top1 needs logits, {args.checkpoint} gives {network.target}: give fidelity")
        fit_head(network.model, images.num_classes, remake=False)
    if "fidelity" in args.measure and network.is_subnetwork:
        raise UserError(f"--measure fidelity needs the whole network, and {args.checkpoint} is a sub-network")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`; at the end its files are moved there, index.json last.

    Files of an earlier export, as its index.json lists them, are removed first. Raises UserError where that fails.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}") from error
    try:
        yield temporary
        try:
            _remove_exported(folder)
            files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
            for path in sorted(files, key=lambda path: path.name == "index.json"):
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
        except OSError as error:
            raise UserError(f"--output {folder}: {error.strerror}: {error.filename}") from error
    finally:
        shutil.rmtree(temporary)


def _remove_exported(folder: Path) -> None:
    """Removes the files that the index.json of the folder names, and the folders that are empty then."""
    index = folder / "index.json"
    listed = read_json(index) if index.is_file() else {}
    sizes = listed.get("sizes") if isinstance(listed, dict) else None
    for entry in sizes if isinstance(sizes, list) else []:
        names = entry.get("files") if isinstance(entry, dict) else None
        for name in names.values() if isinstance(names, dict) else ():
            path = (folder / str(name)).resolve()
            if not path.is_relative_to(folder.resolve()):
                continue
            parts = (
                [path / WEIGHTS, path / CONFIG, path / CODE]
                if path.is_dir()
                else [path, path.with_name(path.name + ".data")]
            )
            for part in parts:
                part.unlink(missing_ok=True)
            for place in {path if path.is_dir() else path.parent} - {folder.resolve()}:
                if place.is_dir() and not any(place.iterdir()):
                    place.rmdir()
    index.unlink(missing_ok=True)
    (folder / MEASURE).unlink(missing_ok=True)


if __name__ == "__main__":
    run_program(main)
