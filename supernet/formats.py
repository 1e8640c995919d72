"""The formats of an export: each writes a sub-network, reads the file back and compares it with the model."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.targets import output_of
from utils import UserError, say

from .graphs import (
    ONNX_PACKAGES,
    Outputs,
    add_metadata,
    graph_of,
    in_batches,
    onnx_outputs,
    write_onnx_graph,
)
from .network import Network
from .opening import load
from .reduction import write_float16, write_int8

LIMIT = 1e-4  # relative error, float32
# A float16 or int8 file must be this near to the same size in float32: measure -> limit.
LIMITS = {"kl": 0.01, "token_cosine": 0.99, "feature_cosine": 0.99}
REDUCED = ("onnx-fp16", "onnx-int8")
ONNX = ("onnx", *REDUCED)
METADATA = "metadata.json"  # inside of a model.pt2
NEEDS = dict.fromkeys(ONNX, ONNX_PACKAGES)


class Target(nn.Module):
    """A model whose output is its target: for "tokens" all tokens (B, N, D), for "features" (B, D)."""

    def __init__(self, model: Backbone, target: str):
        super().__init__()
        self.model, self.target = model, target

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, height, width)."""
        return output_of(self.model, images, self.target)


def model_of_target(model: Backbone, target: str) -> nn.Module:
    """The model itself where its output is the target: its weights keep their names in a file then."""
    return model if target == "logits" else Target(model, target)


@dataclass
class Checks:
    """What files are checked with, and calibrated on.

    images: what they are -> images (B, C, height, width), for the files that give what the model gives.  calibration:
    gives batches of images for int8.  fidelity: the measures of a float16 or int8 file, from the function that
    runs it and the model in float32.  force: write it, whatever they are.
    """

    images: dict[str, Tensor]
    calibration: Callable[[], Iterator[Tensor]] | None = None
    fidelity: Callable[[Outputs, Backbone], dict[str, Any]] | None = None
    force: bool = False


def write_formats(
    names: list[str],
    network: Network,
    small: Backbone,
    row: dict[str, Any],
    place: Path,
    folder: Path,
    checks: Checks,
    static_batch: int | None = None,
) -> dict[str, Any]:
    """Writes one size and checks it. Returns the files, relative to `folder`, the relative errors, and the fidelity.

    static_batch: the number of images that graphs take; None: any.
    Raises UserError for an export whose outputs differ from the model's, or whose fidelity is below LIMITS.
    """
    place.mkdir(exist_ok=True)
    size = Size(network, model_of_target(small, network.target), small, row, static_batch, checks.calibration)
    entry: dict[str, dict[str, Any]] = {"files": {}, "relative_error": {}, "reduced": {}}
    for name in dict.fromkeys(names):
        path, outputs_of = FORMATS[name](size, place)
        if static_batch and name != "folder":
            outputs_of = in_batches(outputs_of, static_batch)
        entry["files"][name] = str(path.relative_to(folder))
        if name in REDUCED:
            entry["reduced"][name] = checks.fidelity(outputs_of, small)
            check_fidelity(name, row["op_code"], entry["reduced"][name], checks.force)
        else:
            entry["relative_error"][name] = check_error(f"{name} of op code {row['op_code']}", outputs_of, size, checks)
    return {key: value for key, value in entry.items() if value}


def check_error(what: str, outputs_of: Outputs, size: Size, checks: Checks) -> dict[str, float]:
    """The relative error on each kind of image, which it prints. Raises UserError where one is not below LIMIT."""
    errors = {kind: relative_error(outputs_of, size.model, images) for kind, images in checks.images.items()}
    words = ", ".join(f"{error:.1e} on {len(checks.images[kind])} {kind}" for kind, error in errors.items())
    if not all(error < LIMIT for error in errors.values()):  # a NaN is not below the limit
        raise UserError(f"{what} differs from the model, relative error {words}")
    say(f"{what}: relative error {words}")
    return errors


def check_fidelity(name: str, op_code: int, measures: dict[str, Any], force: bool) -> None:
    """Raises UserError where the fidelity of a format, one of REDUCED, is below LIMITS; with `force`, prints it."""
    measure = next(key for key in LIMITS if key in measures)
    value, limit = measures[measure], LIMITS[measure]
    if value <= limit if measure == "kl" else value >= limit:
        return
    words = f"{name} of op code {op_code}: {measure} {value:.3g} against float32, the limit is {limit:g}"
    if not force:
        better = "calibrate on more images (--proxy-samples)" if name == "onnx-int8" else "leave this format out"
        raise UserError(f"{words}: {better}, or give --force to write it")
    say(f"{words}: written because of --force")


@torch.no_grad()
def relative_error(outputs_of: Outputs, model: nn.Module, images: Tensor) -> float:
    """The largest difference of the outputs relative to the largest one, over a batch of one image and one of all."""
    expected = model(images)
    found = torch.cat([outputs_of(images[:1]), outputs_of(images)[1:]])
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Formats: each writes a size into a folder, and returns the path and a function that runs the written file


@dataclass
class Size:
    """A sub-network, what is known of it, and its graph once a format needs it.

    model: gives the target.  static_batch: the number of images that the graph takes; None: any.  calibration: gives
    batches of images.
    """

    network: Network
    model: nn.Module
    small: Backbone
    row: dict[str, Any]
    static_batch: int | None = None
    calibration: Callable[[], Iterator[Tensor]] | None = None
    graph: torch.export.ExportedProgram | None = None
    folder: tempfile.TemporaryDirectory = field(default_factory=tempfile.TemporaryDirectory)

    def program(self) -> torch.export.ExportedProgram:
        """The model as torch.export sees it."""
        if self.graph is None:
            self.graph = graph_of(self.model, self.network.preprocessing["input_size"], self.static_batch)
        return self.graph

    def onnx_file(self) -> Path:
        """The model as an ONNX file in float32, in a temporary folder."""
        path = Path(self.folder.name) / "model.onnx"
        if not path.exists():
            write_onnx_graph(self.program(), path, self.network.target)
        return path

    def metadata(self) -> dict[str, Any]:
        """What a file says of itself, under the names of index.json."""
        counts = {key: self.row[key] for key in ("op_code", "grade", "macs_linear", "macs_full", "params")}
        network = {"model": self.network.name, "target": self.network.target}
        return network | {
            "num_classes": self.small.num_classes,
            "preprocessing": self.network.preprocessing,
            "widths": self.row["widths"],
            **counts,
        }


def write_folder(size: Size, folder: Path) -> tuple[Path, Outputs]:
    """model.safetensors, config.json and model.py, which supernet.load() opens, and model.py without this project."""
    facts: dict[str, Any] = {}
    if not size.network.is_subnetwork:
        facts = {key: size.row[key] for key in ("op_code", "accuracy", "fidelity") if key in size.row}
    size.network.save(folder, size.small, **facts)
    return folder, model_of_target(load(folder).model, size.network.target)


def write_torch_export(size: Size, folder: Path) -> tuple[Path, Outputs]:
    """model.pt2, which torch alone opens: images (B, C, height, width) to the target. Its metadata is an extra file."""
    path = folder / "model.pt2"
    torch.export.save(size.program(), path, extra_files={METADATA: json.dumps(size.metadata())})
    return path, torch.export.load(path).module()


def write_onnx(size: Size, folder: Path) -> tuple[Path, Outputs]:
    """model.onnx, which onnxruntime alone opens: "images" (B, C, height, width) to an output named as the target."""
    for part in size.onnx_file().parent.iterdir():
        shutil.copy(part, folder)
    return _finished(size, folder / "model.onnx")


def write_onnx_float16(size: Size, folder: Path) -> tuple[Path, Outputs]:
    """model_fp16.onnx: as model.onnx, with weights and operators in float16; input and output are float32."""
    write_float16(size.onnx_file(), folder / "model_fp16.onnx")
    return _finished(size, folder / "model_fp16.onnx")


def write_onnx_int8(size: Size, folder: Path) -> tuple[Path, Outputs]:
    """model_int8.onnx: as model.onnx, with the linear layers of the blocks in int8."""
    write_int8(size.onnx_file(), folder / "model_int8.onnx", size.calibration())
    return _finished(size, folder / "model_int8.onnx")


def _finished(size: Size, path: Path) -> tuple[Path, Outputs]:
    add_metadata(path, size.metadata())
    return path, onnx_outputs(path)


FORMATS = {
    "folder": write_folder,
    "torch-export": write_torch_export,
    "onnx": write_onnx,
    "onnx-fp16": write_onnx_float16,
    "onnx-int8": write_onnx_int8,
}
