"""What an export measures: its sizes, and its float16 and int8 files compared with float32."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datasets import Images, drawn, eval_loader, open_images, proxy_set
from fidelity import FIDELITY, Evaluator
from models.backbone import Backbone
from supernet import Network
from supernet.formats import REDUCED, Checks
from supernet.graphs import Outputs
from supernet.latency import Latencies
from supernet.latency_table import LatencyTable
from supernet.selection import count_sizes
from utils import UserError

from .frontier import describe
from .measures import MEASURES

CHECKED = 16  # random images, and real ones, that an export is checked on
FEWEST = 32  # images to calibrate on: with fewer, the range of an activation depends too much on which ones they are
BATCH = 16  # images per batch of calibration


def measure(
    args: argparse.Namespace,
    network: Network,
    small: Backbone,
    code: int,
    evaluator: Evaluator | None,
    latencies: Latencies | LatencyTable,
) -> dict[str, Any]:
    """Op code, grade, MACs, parameters, memory (bytes) and widths of a size, named as in config.json.

    With its latency, where that is to be measured or was before, and with what the evaluator finds.
    """
    row: dict[str, Any] = {"op_code": network.known_code(code), "grade": network.grade_of(small), **describe(small)}
    row |= {"memory": count_sizes(small)["memory"], "widths": network.table.widths(code)}
    seconds = latencies.of(code) if "latency" in args.measure else latencies.seconds.get(code)
    if seconds is not None:
        where = {key: value for key, value in latencies.key.items() if key != "network"}
        row["latency"] = {"seconds": seconds, **where}
    found = evaluator(small.to(args.device)) if evaluator else {}
    if "top1" in args.measure:
        row["accuracy"] = {"top1": found["top1"]}
    elif "accuracy" in network.facts:
        row["accuracy"] = network.facts["accuracy"]
    if "fidelity" in args.measure:
        of = {"images": len(evaluator.batches.dataset), "data_set": args.data_set}
        row["fidelity"] = {key: found[key] for key in FIDELITY if key in found} | of
    elif "fidelity" in network.facts:
        row["fidelity"] = network.facts["fidelity"]
    return row


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """A size of index.json as a row of table_of(), which has its measures among its numbers."""
    found = {**row.get("accuracy", {}), **row.get("fidelity", {})}
    return {key: value for key, value in row.items() if key not in MEASURES} | {
        key: value for key, value in found.items() if key in MEASURES
    }


def make_evaluator(
    args: argparse.Namespace, network: Network, images: Images | None, device: torch.device
) -> Evaluator | None:
    """What measures top1 and fidelity, as far as the flags say."""
    if not {"top1", "fidelity"} & {*args.measure}:
        return None
    whole = network.model.to(device) if "fidelity" in args.measure else None
    batches = loader(network, images, 64)
    return Evaluator(network.target, batches, device, labels="top1" in args.measure, whole=whole)


def loader(network: Network, images: Images, batch_size: int) -> DataLoader:
    """Batches of the images, prepared as the network asks."""
    return eval_loader(images, network.preprocessing, batch_size=batch_size, workers=0)


# ---------------------------------------------------------------------------------------------------------------------
# What files are checked on


def make_checks(args: argparse.Namespace, network: Network, images: Images | None) -> Checks:
    """Random images, and some of the data set if there is one; for float16 and int8, the proxy set and held-out images.

    Raises UserError where the proxy set is too small to calibrate on.
    """
    found = {"random images": torch.randn(CHECKED, *network.preprocessing["input_size"])}
    if images is not None:
        some = images.subset(range(min(CHECKED, len(images))))
        found["real images"] = next(iter(loader(network, some, CHECKED)))[0]
    checks = Checks(found, force=args.force)
    if "onnx-int8" in args.format:
        checks.calibration = calibration(args, network)
    if {*args.format} & {*REDUCED}:
        checks.fidelity = FileFidelity(args, network, images)
    return checks


def calibration(args: argparse.Namespace, network: Network) -> Callable[[], Iterator[Tensor]]:
    """A function that yields the proxy set in batches (B, C, height, width).

    With --static-batch, all batches have that size, and images that do not fill a batch are left out.

    Raises UserError where it is too small.
    """
    train = open_images(args.data_set, args.data_path, "train", args.index, args.seed)
    proxy = proxy_set(train, args.proxy_samples, args.seed)
    size = args.static_batch or BATCH
    needed = -(-FEWEST // size) * size if args.static_batch else FEWEST
    if len(proxy) < needed:
        raise UserError(
            f"--format onnx-int8 has {len(proxy)} images to calibrate on, and needs {needed}: give more with "
            "--proxy-samples, or another --data-set"
        )
    batches = loader(network, proxy, size)
    return lambda: (images for images, _ in batches if len(images) == size or not args.static_batch)


class FileFidelity:
    """Compares a float16 or int8 file with the same size in float32, on images that are held out.

    With labels and logits, also the top-1 of both. At most --proxy-samples images, drawn from the seed.
    """

    def __init__(self, args: argparse.Namespace, network: Network, images: Images):
        self.target, self.data_set = network.target, args.data_set
        self.labels = network.target == "logits" and images.num_classes == network.model.num_classes
        self.batches = loader(network, drawn(images, args.proxy_samples, args.seed), 64)

    def __call__(self, outputs_of: Outputs, small: Backbone) -> dict[str, Any]:
        """outputs_of: what runs the file.  small: the size in float32, on the CPU."""
        evaluator = Evaluator(self.target, self.batches, torch.device("cpu"), labels=self.labels, whole=small)
        found = evaluator(FileModel(outputs_of, small, self.target))
        measures = {key: found[key] for key in FIDELITY if key in found}
        if self.labels:
            measures |= {"top1": found["top1"], "top1_float32": evaluator(small)["top1"]}
        return measures | {"images": len(self.batches.dataset), "data_set": self.data_set}


class FileModel(nn.Module):
    """Wraps an exported file, whose output is the target, so that it can be evaluated like a model."""

    def __init__(self, outputs_of: Outputs, small: Backbone, target: str):
        super().__init__()
        self.outputs_of, self.small, self.target = outputs_of, small, target

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, height, width) to the output of the file."""
        return self.outputs_of(images)

    def forward_features(self, images: Tensor) -> Tensor:
        """The output of the file: features (B, D), or tokens (B, N, D), for a Swin (B, H, W, D)."""
        found = self.outputs_of(images)
        return found if self.target == "features" else found.view_as(self.small.forward_features(images))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to features (B, D); features are returned as they are."""
        return tokens if self.target == "features" else self.small.forward_head(tokens, pre_logits=pre_logits)


def reduced_table(rows: list[dict[str, Any]]) -> str:
    """A text table with one line per float16 or int8 file; an empty string if there are no such files."""
    found = [(row["op_code"], name, measures) for row in rows for name, measures in row.get("reduced", {}).items()]
    if not found:
        return ""
    keys = [key for key in MEASURES if key in found[0][2]]
    columns = ["op code", "format", *(MEASURES[key].name for key in keys), *["float32"] * ("top1" in keys)]
    lines = ["  ".join(f"{name:>9}" for name in columns)]
    for code, name, measures in found:
        cells = [str(code), name, *(MEASURES[key].text(measures[key]) for key in keys)]
        cells += [MEASURES["top1"].text(measures["top1_float32"])] if "top1" in keys else []
        lines.append("  ".join(f"{cell:>9}" for cell in cells))
    return "\n".join([*lines, f"Against the same size in float32, on {found[0][2]['images']} images held out."])
