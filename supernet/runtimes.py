"""What runs a model where its speed matters: PyTorch as it is, torch.compile, or ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from utils import UserError, first_line

from .graphs import ONNX_PACKAGES, Outputs, check_packages, graph_of, onnx_outputs, write_onnx_graph

# Of ONNX Runtime, whatever the model: the name is not seen by who times it.
OUTPUT = "output"


def runner(model: Backbone, batch_size: int = 1, amp: torch.dtype | None = None, runtime: str = "eager") -> Outputs:
    """What runs a model in a runtime: images (B, C, height, width), B = `batch_size`, to its output.

    The images are on the model's device, in its dtype. The model is put into eval mode. amp: the dtype of autocast, in
    PyTorch alone.  runtime: "eager"; "compile", which is torch.compile for this batch size; "onnxruntime", with as many
    threads as PyTorch uses, on the CPU.
    Raises UserError for a runtime that is not known, not installed, or does not run this model on its device.
    """
    return RUNTIMES_OF[check_runtime(runtime)](model.eval(), batch_size, amp)


def check_runtime(runtime: str) -> str:
    """The name of a runtime. Raises UserError for one that is not known or not installed."""
    if runtime not in RUNTIMES_OF:
        raise UserError(f"runtime {runtime!r} is not known: {', '.join(RUNTIMES_OF)}")
    if runtime == "onnxruntime":
        check_packages(ONNX_PACKAGES, f"--runtime {runtime}")
    return runtime


def version_of(runtime: str) -> str:
    """The runtime, ONNX Runtime with its version. Raises UserError where that is not installed."""
    if runtime != "onnxruntime":
        return runtime
    check_runtime(runtime)
    import onnxruntime  # here, because it is an optional package

    return f"{runtime} {onnxruntime.__version__}"


def _eager(model: Backbone, batch_size: int, amp: torch.dtype | None) -> Outputs:
    device = next(model.parameters()).device.type

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast(device, dtype=amp, enabled=amp is not None):
            return model(images)

    return run


def compiled(model: nn.Module) -> nn.Module:
    """torch.compile for one input shape, with the whole model in one graph."""
    # All sizes share the code of one forward(), so each counts as a recompilation and the default limit is too low.
    torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = 1000
    return torch.compile(model, dynamic=False, fullgraph=True)


def _compiled(model: Backbone, batch_size: int, amp: torch.dtype | None) -> Outputs:
    run = _eager(compiled(model), batch_size, amp)
    parameter = next(model.parameters())
    size = (batch_size, model.in_chans, *model.patch_embed.img_size)
    try:
        run(torch.zeros(size, device=parameter.device, dtype=parameter.dtype))
    except Exception as error:  # the compiler's errors are of many types
        raise UserError(f"torch.compile does not run this model here: {first_line(error)}") from error
    return run


def _onnxruntime(model: Backbone, batch_size: int, amp: torch.dtype | None) -> Outputs:
    parameter = next(model.parameters())
    if amp is not None:
        raise UserError("--amp is of PyTorch alone: leave it out beside --runtime onnxruntime")
    if parameter.device.type != "cpu":
        raise UserError("--runtime onnxruntime measures on the CPU: give --device cpu")
    graph = graph_of(model, [model.in_chans, *model.patch_embed.img_size], static_batch=batch_size)
    with tempfile.TemporaryDirectory() as folder:  # once the session is made, the file is not needed
        write_onnx_graph(graph, Path(folder) / "model.onnx", OUTPUT)
        return onnx_outputs(Path(folder) / "model.onnx")


RUNTIMES_OF: dict[str, Callable[[Backbone, int, torch.dtype | None], Outputs]] = {
    "eager": _eager,
    "compile": _compiled,
    "onnxruntime": _onnxruntime,
}
RUNTIMES = tuple(RUNTIMES_OF)
