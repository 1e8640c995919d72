"""The ONNX operators of linear layers and attention, which ONNX Runtime runs faster than those of PyTorch's exporter.

docs/EXPORT.md says by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def translations() -> dict[Any, Callable[..., Any]]:
    """The custom_translation_table of torch.onnx.export()."""
    from onnxscript import opset20 as op  # here, because it is an optional package

    def linear(input: Any, weight: Any, bias: Any = None) -> Any:
        """One Gemm on all tokens, (..., in) to (..., out); the exporter's MatMul and Add read the result twice.

        In int8, Gemm adds the bias while it computes, too.
        """
        *shape, features = input.shape
        inside = op.Reshape(input, op.Constant(value_ints=[-1, features])) if len(shape) > 1 else input
        result = op.Gemm(inside, weight, *([] if bias is None else [bias]), transB=1)
        if len(shape) == 1:
            return result
        sizes = [size if isinstance(size, int) else -1 for size in shape]  # the one without a number is the batch
        return op.Reshape(result, op.Constant(value_ints=[*sizes, weight.shape[0]]))

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, *unused: Any, scale: Any = None, **also_unused: Any
    ) -> Any:
        """softmax(scale q k^T + mask) v of (..., N, d); the exporter scales q and k, and reshapes k twice.

        Dropout and causal masks, which the unused arguments are about, do not occur in vision transformers.
        """
        *rest, rows, columns = range(len(key.shape))
        factor = op.Constant(value_float=1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[*rest, columns, rows]))
        return op.MatMul(op.Softmax(scores if attn_mask is None else op.Add(scores, attn_mask), axis=-1), value)

    return {
        torch.ops.aten.linear.default: linear,
        torch.ops.aten.scaled_dot_product_attention.default: attention,
    }
