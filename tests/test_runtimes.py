"""Runtimes: each gives what the model gives, and says in one line why it cannot."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tiny import random_backbone
from torch import Tensor

from supernet import runtimes
from supernet.graphs import ONNX_PACKAGES
from supernet.latency import measure_latency
from supernet.runtimes import RUNTIMES, runner
from utils import UserError

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ONNX_PACKAGES), reason="needs requirements-export.txt"
)


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without its code generator, which needs a compiler and takes long."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **flags: compiled(model, backend="eager", **flags))


@pytest.mark.parametrize("runtime", ["eager", "compile", pytest.param("onnxruntime", marks=needs_onnx)])
def test_a_runtime_gives_what_the_model_gives(runtime: str, eager_backend: None):
    model = random_backbone(dtype=torch.float32)
    images = torch.randn(3, 3, 32, 32)
    found = runner(model, 3, runtime=runtime)(images)
    with torch.no_grad():
        torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-5)
    assert 0 < measure_latency(model, 3, runtime=runtime) < 10


def test_a_runtime_that_cannot_run_it_is_one_line(monkeypatch: pytest.MonkeyPatch):
    model = random_backbone(dtype=torch.float32)
    with pytest.raises(UserError, match="runtime 'tensorrt' is not known: eager, compile, onnxruntime"):
        runner(model, runtime="tensorrt")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else real(name))
    asked = "--runtime onnxruntime needs onnx, onnxruntime, onnxscript: python -m pip install -r"
    with pytest.raises(UserError, match=asked):
        runner(model, runtime="onnxruntime")
    with pytest.raises(UserError, match=asked):
        runtimes.version_of("onnxruntime")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="--amp is of PyTorch alone"):
        runner(model, amp=torch.bfloat16, runtime="onnxruntime")

    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("no compiler\nand a trace")

    monkeypatch.setattr(torch, "compile", lambda model, **flags: model)
    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(UserError, match=r"torch\.compile does not run this model here: no compiler$"):
        runner(model, runtime="compile")


def test_every_runtime_has_its_version():
    assert [runtimes.version_of(name) for name in RUNTIMES[:2]] == ["eager", "compile"]
