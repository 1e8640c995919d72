"""Sub-networks as files for elsewhere: a folder, a .pt2 for torch alone, an .onnx for onnxruntime alone.

python export.py output/peelable/digits --macs 200K --format folder onnx torch-export --output output/small
python export.py output/peelable/digits --all 12 --format onnx --output output/sizes
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from arguments import (
    Parser,
    add_amp,
    add_data_set,
    add_mask_table,
    add_model,
    add_preprocessing,
    add_proxy_samples,
    add_refit,
    add_size_arguments,
    count,
    open_network,
    positive,
)
from datasets import Images, check_labels, eval_loader, open_images
from fidelity import FIDELITY, Evaluator
from files import check_output_dir, read_json, write_text
from models.backbone import Backbone
from models.loading import fit_head
from models.macs import CONVENTIONS
from models.targets import TARGETS
from report.frontier import cut_or_refit, table_of
from supernet import Network
from supernet.budgets import asks_for_size, chosen_op_codes, latencies_of
from supernet.facts import CONFIG, WEIGHTS
from supernet.formats import FORMATS, NEEDS, write_formats
from supernet.latency import Latencies
from supernet.saving import CODE
from supernet.selection import count_sizes
from utils import UserError, init_processes, progress_bar, run_program, say, seed_everything

IMAGES = 16  # random images, and real ones, that an export is checked on


def main() -> None:
    """Opens the network, then measures, writes and checks each size; in the end all files are there, or none."""
    args = parse_arguments()
    check_arguments(args)
    init_processes(args)
    seed_everything(args.seed)
    network = open_network(args)
    images = open_images(args.data_set, args.data_path, "val", args.index, args.seed) if args.data_set else None
    check_measures(args, network, images)
    checks = check_images(network, images)
    latencies = latencies_of(args, network)
    op_codes = choose(args, network, latencies)
    evaluator = make_evaluator(args, network, images, latencies.device)
    cut = cut_or_refit(args, network, 64, 0)
    rows = []
    with whole_folder(args.output) as folder:
        for code in progress_bar(op_codes, "sizes"):
            small = cut(code).float().eval()
            row = measure(args, network, small, code, evaluator, latencies)
            small.to("cpu")
            place = folder / f"op_{code}" if len(op_codes) > 1 else folder
            rows.append(row | write_formats(args.format, network, small, row, place, folder, checks))
        index = {
            "source": network.source.name,
            "model": network.name,
            "grade": network.grade,
            "averaged_weights": network.averaged,
            "input": "images, float32 (batch, channels, height, width), prepared as preprocessing says",
            "target": network.target,
            "output": f"{network.target}, float32 {TARGETS[network.target]}",
            "preprocessing": network.preprocessing,
            "sizes": rows,
        }
        write_text(folder / "index.json", json.dumps(index, indent=1) + "\n")
    print(table_of([table_row(row) for row in rows]))
    say(f"written: {args.output}, {len(rows)} size{'s' if len(rows) > 1 else ''}, and index.json")


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = Parser(
        description="Export sub-networks, each checked against the model it was made from.",
    )
    group = parser.add_argument_group("what to export")
    group.add_argument(
        "checkpoint",
        type=Path,
        metavar="NETWORK",
        help="folder or weights of a super-network, or the folder of a sub-network",
    )
    add_model(group)
    add_mask_table(group)
    add_preprocessing(group)
    add_refit(group)
    add_proxy_samples(group)
    add_size_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--all",
        type=positive,
        dest="frontier",
        metavar="N",
        help="N sizes evenly spaced in MACs, besides those of the other flags",
    )
    group.add_argument(
        "--format",
        nargs="+",
        default=["folder"],
        metavar="FORMAT",
        help=f"one or more of {', '.join(FORMATS)} (default: folder)",
    )
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    group.add_argument(
        "--force",
        action="store_true",
        help="replace what an earlier export wrote to --output, and files of the same names",
    )
    group = parser.add_argument_group("checks and measurements")
    add_data_set(group, default=None)
    group.add_argument(
        "--measure",
        nargs="+",
        choices=("latency", "top1", "fidelity"),
        default=[],
        help="for index.json: latency as --latency measures it; on --data-set (val/, or the images that are held back) "
        "top-1, and fidelity to the whole network, which needs no labels (default: what is known)",
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="images per batch, for latency (default: %(default)s)",
    )
    add_amp(group)
    group.add_argument("--device", default="auto", help="for measurements: cpu, cuda, cuda:1, or auto")
    group.add_argument(
        "--seed", type=count, default=0, help="of the random images, and of the images held back (default: %(default)s)"
    )
    return parser.parse_args()


def choose(args: argparse.Namespace, network: Network, latencies: Latencies) -> list[int]:
    """The op codes that the flags ask for; a sub-network has one. Raises UserError where no size is asked for."""
    if network.is_subnetwork and args.refit is not False:
        raise UserError(f"{args.checkpoint} is a sub-network, which is cut already: leave --refit out")
    if asks_for_size(args) or args.frontier:
        return chosen_op_codes(args, network, latencies)
    if len(network.table) > 1:
        raise UserError(f"{args.checkpoint} has {len(network.table)} sizes: give --macs, another budget, or --all 12")
    return [0]


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError, before any work is done, for flags that do not go together."""
    for name in args.format:
        if name not in FORMATS:
            raise UserError(f"--format {name} is not known: {', '.join(FORMATS)}")
        missing = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"--format {name} needs {', '.join(missing)}: python -m pip install -r requirements-export.txt"
            )
    for name in ("top1", "fidelity"):
        if name in args.measure and not args.data_set:
            raise UserError(f"--measure {name} needs --data-set")
    if args.refit is not False and not args.data_set:
        raise UserError("--refit needs images: give --data-set and --data-path")
    check_output_dir(args.output, "--output")
    if args.output.exists() and any(args.output.iterdir()) and not args.force:
        raise UserError(f"--output {args.output} exists and is not empty: give another folder, or --force")


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


# ---------------------------------------------------------------------------------------------------------------------
# A size


def measure(
    args: argparse.Namespace,
    network: Network,
    small: Backbone,
    code: int,
    evaluator: Evaluator | None,
    latencies: Latencies,
) -> dict[str, Any]:
    """The op code, MACs, parameters and memory (bytes) of a size.

    With its latency, where that is to be measured or was before, and with what the evaluator finds.
    """
    linear, full = (count_sizes(small, convention=convention) for convention in CONVENTIONS)
    row: dict[str, Any] = {
        "op_code": code,
        "grade": network.grade_of(small),
        **linear,
        "macs": {"linear": linear["macs"], "full": full["macs"]},
    }
    seconds = latencies.of(code) if "latency" in args.measure else latencies.seconds.get(code)
    if seconds is not None:
        where = {key: latencies.key[key] for key in ("device", "batch_size", "dtype", "torch")}
        row["latency"] = {"seconds": seconds, **where}
    found = evaluator(small.to(latencies.device)) if evaluator else {}
    if "top1" in args.measure:
        row["top1"] = found["top1"]
    elif isinstance(accuracy := network.facts.get("accuracy"), dict) and "top1" in accuracy:
        row["top1"] = accuracy["top1"]
    if "fidelity" in args.measure:
        of = {"images": len(evaluator.batches.dataset), "data_set": args.data_set}
        row["fidelity"] = {key: found[key] for key in FIDELITY if key in found} | of
    elif "fidelity" in network.facts:
        row["fidelity"] = network.facts["fidelity"]
    return row


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """A size of index.json as a row of table_of()."""
    found = {"top1": row["top1"]} if "top1" in row else {}
    macs = {f"macs_{convention}": row["macs"][convention] for convention in CONVENTIONS}
    return {"op_code": row["op_code"], **macs, "params": row["params"], **found, **row.get("fidelity", {})}


def make_evaluator(
    args: argparse.Namespace, network: Network, images: Images | None, device: torch.device
) -> Evaluator | None:
    """What measures top1 and fidelity, as far as they are asked for."""
    if not {"top1", "fidelity"} & {*args.measure}:
        return None
    whole = network.model.to(device) if "fidelity" in args.measure else None
    batches = loader(network, images, 64)
    return Evaluator(network.target, batches, device, labels="top1" in args.measure, whole=whole)


def loader(network: Network, images: Images, batch_size: int) -> DataLoader:
    """Batches of the images, prepared as the network asks."""
    return eval_loader(images, network.preprocessing, batch_size=batch_size, workers=0)


def check_images(network: Network, images: Images | None) -> dict[str, Tensor]:
    """The images that exports are checked on: random ones, and some of the data set if there is one."""
    found = {"random images": torch.randn(IMAGES, *network.preprocessing["input_size"])}
    if images is not None:
        some = images.subset(range(min(IMAGES, len(images))))
        found["real images"] = next(iter(loader(network, some, IMAGES)))[0]
    return found


if __name__ == "__main__":
    run_program(main)
