"""A model as a graph of torch.export, and as an ONNX file that ONNX Runtime runs on the CPU."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils import UserError

from .onnx_operators import translations

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

OPSET = 20  # the first with an operator for GELU, which ONNX Runtime runs faster than the five that it replaces
IMAGES, BATCH = "images", "batch"  # the names of the input of every file, and of its first axis
LARGEST_FILE = 1.5e9  # bytes of weights inside an .onnx; a protobuf holds 2 GB
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
Outputs = Callable[[Tensor], Tensor]  # images (B, C, height, width) to the target of the network


def check_packages(packages: tuple[str, ...], flag: str) -> None:
    """Raises UserError for packages that are not installed. flag: what needs them, as the user gave it."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{flag} needs {', '.join(missing)}: python -m pip install -r requirements-export.txt")


def graph_of(model: nn.Module, input_size: list[int], static_batch: int | None = None) -> torch.export.ExportedProgram:
    """The model as torch.export sees it, for any number of images, or for exactly `static_batch` of them.

    input_size: of an image, (C, height, width).
    """
    images = torch.randn(static_batch or 2, *input_size)
    shapes = None if static_batch else {0: torch.export.Dim(BATCH, min=1)}
    graph = torch.export.export(model, (images,), dynamic_shapes=(shapes,))
    for node in graph.graph.nodes:
        node.meta.pop("stack_trace", None)  # it would name folders of this machine
    return graph


def write_onnx_graph(graph: torch.export.ExportedProgram, path: Path, output: str) -> None:
    """Writes an ONNX file: "images" (batch, C, height, width) to `output`, whose first axis is the batch, too.

    Weights of more than 1.5 GB lie beside it, in a file whose name ends in .data.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        torch.onnx.export(
            graph,
            f=path,
            input_names=[IMAGES],
            output_names=[output],
            dynamic_shapes=({0: BATCH},) if graph.range_constraints else None,  # again, or the axis has another name
            opset_version=OPSET,
            dynamo=True,
            custom_translation_table=translations(),
            external_data=sum(value.nbytes for value in graph.state_dict.values()) > LARGEST_FILE,
            verbose=False,
        )


def add_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Adds metadata_props to an ONNX file: strings as they are, other values as JSON."""
    import onnx  # here, because it is an optional package

    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(
        model, {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    )
    onnx.save(model, path)


def onnx_session(path: Path) -> InferenceSession:
    """The file in ONNX Runtime, on as many threads as PyTorch uses."""
    import onnxruntime  # here, because it is an optional package

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; warnings are about the optimization of the graph
    # Threads that wait actively after a run would take the cores from the network that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def onnx_outputs(path: Path) -> Outputs:
    """What runs an ONNX file of one output, on images (B, C, height, width) on the CPU."""
    session = onnx_session(path)
    return lambda images: torch.from_numpy(session.run(None, {IMAGES: images.numpy()})[0])


def in_batches(outputs_of: Outputs, size: int) -> Outputs:
    """`outputs_of`, which takes exactly `size` images, for any number of images: a last batch is filled with zeros."""

    def run(images: Tensor) -> Tensor:
        whole = torch.cat([images, images.new_zeros(-len(images) % size, *images.shape[1:])])
        return torch.cat([outputs_of(batch) for batch in whole.split(size)])[: len(images)]

    return run
