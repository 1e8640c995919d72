"""An ONNX file in float16 or int8, made by ONNX Runtime's own tools."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from utils import UserError

from .graphs import IMAGES

LINEAR = ("MatMul", "Gemm")  # what the exporter makes of a linear layer


def write_float16(source: Path, path: Path) -> None:
    """Writes a float32 ONNX file in float16; input and output stay float32.

    Operators without a float16 form in ONNX stay float32, between casts.
    """
    import onnx  # here, because it is an optional package
    from onnxruntime.transformers.float16 import convert_float_to_float16  # here, because it is an optional package

    large = _is_large(source)  # then ONNX cannot infer its shapes, which it does in one piece
    with _quiet():
        model = convert_float_to_float16(onnx.load(source), keep_io_types=True, disable_shape_infer=large)
    onnx.save(model, path, save_as_external_data=large, location=f"{path.name}.data")


def write_int8(source: Path, path: Path, batches: Iterable[Tensor], operators: str = "blocks") -> None:
    """Writes a float32 ONNX file with int8 weights, one scale per output channel, in the linear layers of the blocks.

    Their inputs are uint8, with the range that they have on `batches` of images, (B, C, height, width). Everything else
    stays float32, as benchmarks/quantized.py found it best. operators: "blocks"; "linear", with the head; "products",
    with the attention products, too; "all" that ONNX Runtime has in int8.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # here, because it is optional
    from onnxruntime.quantization.shape_inference import quant_pre_process  # here, because it is optional

    large = _is_large(source)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder) / source.name
        quant_pre_process(source, prepared, save_as_external_data=large, all_tensors_to_one_file=large)
        quantize_static(
            prepared,
            path,
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=None if operators == "all" else list(LINEAR),
            nodes_to_quantize=_nodes(prepared, operators),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=large,
            extra_options={"OpTypesToExcludeOutputQuantization": list(LINEAR)},
        )


def _nodes(path: Path, operators: str) -> list[str] | None:
    """The names of the nodes to quantize, None for all.

    A linear layer has a weight, which has its name in the model; the layers of the blocks are "blocks.0.mlp.fc1" and so
    on, in a Swin "layers.0.blocks.0.mlp.fc1". Heads, attention pooling and patch merging are no blocks.
    """
    import onnx  # here, because it is an optional package

    graph = onnx.load(path, load_external_data=False).graph
    weights = {weight.name for weight in graph.initializer}
    products = [node for node in graph.node if node.op_type in LINEAR]
    linear = [node for node in products if weights & {*node.input[:2]}]
    blocks = [node for node in linear if any("blocks." in name for name in weights & {*node.input[:2]})]
    found = {"blocks": blocks, "linear": linear, "products": products, "all": None}[operators]
    if found == []:  # for ONNX Runtime, an empty list would mean all nodes
        raise UserError(
            "--format onnx-int8: all blocks of this size are bypassed, so nothing is left to quantize: leave it out"
        )
    return found and [node.name for node in found]


class _Reader:
    """The images as ONNX Runtime's calibration reads them: a dict per call, None at the end."""

    def __init__(self, batches: Iterable[Tensor]):
        self.batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {IMAGES: batch.numpy()}


def _is_large(source: Path) -> bool:
    """Whether the weights lie beside the file, see graphs.write_onnx_graph()."""
    return source.with_name(f"{source.name}.data").exists()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the log messages of ONNX Runtime's tools, which describe their own steps."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
