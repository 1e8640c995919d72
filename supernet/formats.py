"""The formats of an export: each writes a sub-network, reads the file back and compares it with the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.targets import output_of
from utils import UserError, say

from .network import Network
from .opening import load

OPSET = 18
LIMIT = 1e-4  # relative error, float32
LARGEST_FILE = 1.5e9  # bytes of weights inside an .onnx; a protobuf holds 2 GB
NEEDS = {"onnx": ("onnx", "onnxruntime", "onnxscript")}
Outputs = Callable[[Tensor], Tensor]  # images (B, C, height, width) to the target of the network


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


def write_formats(
    names: list[str],
    network: Network,
    small: Backbone,
    row: dict[str, Any],
    place: Path,
    folder: Path,
    checks: dict[str, Tensor],
) -> dict[str, Any]:
    """Writes one size and checks it. Returns the files, relative to `folder`, and the relative errors.

    Raises UserError for an export whose outputs differ from the model's.
    """
    place.mkdir(exist_ok=True)
    size = Size(network, model_of_target(small, network.target), small, row)
    entry: dict[str, dict[str, Any]] = {"files": {}, "relative_error": {}}
    for name in dict.fromkeys(names):
        path, outputs_of = FORMATS[name](size, place)
        errors = {what: relative_error(outputs_of, size.model, images) for what, images in checks.items()}
        words = ", ".join(f"{error:.1e} on {len(checks[what])} {what}" for what, error in errors.items())
        if not all(error < LIMIT for error in errors.values()):  # a NaN is not below the limit
            raise UserError(f"{name} of op code {row['op_code']} differs from the model, relative error {words}")
        say(f"op code {row['op_code']}, {name}: relative error {words}")
        entry["files"][name] = str(path.relative_to(folder))
        entry["relative_error"][name] = errors
    return entry


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
    """A sub-network, what is known of it, and its graph once it was asked for. model: gives the target."""

    network: Network
    model: nn.Module
    small: Backbone
    row: dict[str, Any]
    graph: torch.export.ExportedProgram | None = None

    def program(self) -> torch.export.ExportedProgram:
        """The model as torch.export sees it, for any number of images."""
        if self.graph is None:
            images = torch.randn(2, *self.network.preprocessing["input_size"])
            batch = torch.export.Dim("batch", min=1)
            self.graph = torch.export.export(self.model, (images,), dynamic_shapes=({0: batch},))
            for node in self.graph.graph.nodes:
                node.meta.pop("stack_trace", None)  # it would name folders of this machine
        return self.graph


def write_folder(size: Size, folder: Path) -> tuple[Path, Outputs]:
    """model.safetensors, config.json and model.py, which supernet.load() opens, and model.py without this project."""
    facts: dict[str, Any] = {}
    if not size.network.is_subnetwork:
        facts = {"op_code": size.row["op_code"]}
        facts |= {"accuracy": {"top1": size.row["top1"]}} if "top1" in size.row else {}
        facts |= {"fidelity": size.row["fidelity"]} if "fidelity" in size.row else {}
    size.network.save(folder, size.small, **facts)
    return folder, model_of_target(load(folder).model, size.network.target)


def write_torch_export(size: Size, folder: Path) -> tuple[Path, Outputs]:
    """model.pt2, which torch alone opens: images (B, C, height, width) to the target, any B."""
    path = folder / "model.pt2"
    torch.export.save(size.program(), path)
    return path, torch.export.load(path).module()


def write_onnx(size: Size, folder: Path) -> tuple[Path, Outputs]:
    """model.onnx, which onnxruntime alone opens: "images" (B, C, height, width) to an output named as the target."""
    import onnxruntime  # here, because it is an optional package

    path, target = folder / "model.onnx", size.network.target
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        torch.onnx.export(
            size.program(),
            f=path,
            input_names=["images"],
            output_names=[target],
            opset_version=OPSET,
            dynamo=True,
            external_data=size.row["memory"] > LARGEST_FILE,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return path, lambda images: torch.from_numpy(session.run([target], {"images": images.numpy()})[0])


FORMATS = {"folder": write_folder, "torch-export": write_torch_export, "onnx": write_onnx}
