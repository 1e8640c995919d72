"""Exports in float16 and int8, for a fixed batch, and what an ONNX file says of itself."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import Road, exit_code, run
from test_families import FAMILIES
from tiny import SHAPE, random_backbone

from models.backbone import blocks_of, create_backbone, full_widths
from models.extraction import extract
from report import exports
from supernet import formats, load
from supernet.graphs import ONNX_PACKAGES, graph_of, in_batches, write_onnx_graph
from supernet.reduction import write_int8
from utils import UserError

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ONNX_PACKAGES), reason="needs requirements-export.txt"
)
DIGITS = ("--data-set", "digits", "--proxy-samples", 64, "--device", "cpu")


@pytest.fixture(scope="module")
def exported(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole network and its smallest size in every kind of ONNX file."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    run("export.py", road.peelable, "--all", 2, "--format", *formats.ONNX, *DIGITS, "--force", "--output", folder)
    return folder


def test_files_in_smaller_numbers_are_compared_with_float32(exported: Path, road: Road):
    index = json.loads((exported / "index.json").read_text())
    for row in index["sizes"]:
        assert row["files"].keys() == {*formats.ONNX} and row["relative_error"].keys() == {"onnx"}
        for measures in row["reduced"].values():
            assert measures.keys() == {"agreement", "kl", "top1", "top1_float32", "images", "data_set"}
            assert 0 <= measures["kl"] < 0.02 and measures["images"] == 64
            assert abs(measures["top1"] - measures["top1_float32"]) < 10
    row = index["sizes"][0]
    whole, half, int8 = ((exported / row["files"][name]).stat().st_size for name in formats.ONNX)
    assert half < 0.7 * whole and int8 < 0.7 * whole
    table = exports.reduced_table(index["sizes"])
    assert table.count("onnx-int8") == 2 and "on 64 images held out" in table


def test_int8_files_run_alone_and_are_near_the_model(exported: Path, road: Road):
    import onnx
    import onnxruntime

    row = json.loads((exported / "index.json").read_text())["sizes"][0]
    path = exported / row["files"]["onnx-int8"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(3, 1, 16, 16)).astype(np.float32)
    (found,) = session.run(["logits"], {"images": images})
    with torch.no_grad():
        expected = load(road.peelable).model(torch.from_numpy(images)).numpy()
    assert 0 < np.abs(found - expected).max() < 0.2 * np.abs(expected).max()
    graph = onnx.load(path).graph
    quantized = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert quantized and not any("softmax" in name.lower() for node in quantized for name in node.input)


@pytest.mark.parametrize(
    ("name", "kwargs", "target", "others"),
    [
        ("deit_small_distilled_patch16_224", SHAPE, "logits", {"head", "head_dist"}),
        (FAMILIES["siglip"][0], {**SHAPE, "num_classes": 0}, "features", {"attn_pool"}),
        (*FAMILIES["swin"], "logits", {"head", "downsample"}),
    ],
)
def test_only_linear_layers_of_blocks_are_in_int8(name: str, kwargs: dict, target: str, others: set, tmp_path: Path):
    import onnx

    model = create_backbone(name, **kwargs).eval()
    size = (model.in_chans, *model.patch_embed.img_size)
    write_onnx_graph(graph_of(formats.model_of_target(model, target), size), tmp_path / "a.onnx", target)
    write_int8(tmp_path / "a.onnx", tmp_path / "b.onnx", [torch.randn(4, *size)])
    weights = {weight.name: weight.data_type for weight in onnx.load(tmp_path / "b.onnx").graph.initializer}
    int8 = {key for key in weights if key.endswith(".weight_quantized")}
    assert len(int8) == 4 * len(blocks_of(model)) and all("blocks." in key for key in int8)
    in_float = {key for key, kind in weights.items() if kind == onnx.TensorProto.FLOAT}
    assert all(any(other in key for key in in_float) for other in others)


def test_a_size_without_blocks_has_nothing_in_int8(tmp_path: Path):
    model = random_backbone(dtype=torch.float32)
    small = extract(model, dict.fromkeys(full_widths(model), 0)).eval()
    write_onnx_graph(graph_of(small, (3, 32, 32)), tmp_path / "a.onnx", "logits")
    with pytest.raises(UserError, match="all blocks of this size are bypassed"):
        write_int8(tmp_path / "a.onnx", tmp_path / "b.onnx", [torch.randn(4, 3, 32, 32)])


def test_times_of_other_files_are_said(road: Road, tmp_path: Path, capsys):
    flags = ("--op-code", -1, "--measure", "latency", "--device", "cpu", *DIGITS, "--force", "--output", tmp_path)
    run("export.py", road.peelable, *flags, "--format", "onnx-int8")
    said = capsys.readouterr().out
    assert "times are those of --runtime eager, not of the ONNX files: give --runtime onnxruntime" in said
    assert "times are those of float32: to choose by those of onnx-int8, see --latency-table" in said
    run("export.py", road.peelable, *flags, "--replace", "--format", "onnx", "--runtime", "onnxruntime")
    assert "times are those" not in capsys.readouterr().out


def test_an_onnx_file_says_what_it_is(exported: Path, road: Road):
    import onnx

    index = json.loads((exported / "index.json").read_text())
    described = load(road.peelable).describe()
    assert {key: index[key] for key in described} == described
    for row in index["sizes"]:
        for name in formats.ONNX:
            model = onnx.load(exported / row["files"][name])
            said = {entry.key: entry.value for entry in model.metadata_props}
            assert (said["model"], said["target"]) == (index["model"], "logits")
            assert json.loads(said["preprocessing"]) == index["preprocessing"]
            assert json.loads(said["widths"]) == row["widths"] and said["num_classes"] == "10"
            for key in ("op_code", "macs_linear", "macs_full", "params"):
                assert json.loads(said[key]) == row[key]
            (taken,), (given,) = model.graph.input, model.graph.output
            assert (taken.name, given.name) == ("images", "logits")
            assert {place.type.tensor_type.shape.dim[0].dim_param for place in (taken, given)} == {"batch"}


def test_all_sizes_come_with_a_table_to_fill_in(exported: Path, road: Road, tmp_path: Path, capsys):
    lines = (exported / "measure.csv").read_text().splitlines()
    last = len(load(road.peelable).table) - 1
    macs = load(road.peelable).macs()
    assert lines[0] == "file,op_code,macs_linear,batch_size,milliseconds" and len(lines) == 7
    assert lines[1:3] == [f"op_0/model.onnx,0,{macs},1,", f"op_0/model_fp16.onnx,0,{macs},1,"]
    measured = tmp_path / "measure.csv"
    measured.write_text("\n".join([lines[0], *(line + ("4" if ",0," in line else "2") for line in lines[1::3])]))
    flags = ("--latency", "3ms", "--latency-table", measured, "--device", "cpu", "--output", tmp_path / "out")
    run("export.py", road.peelable, *flags)
    (row,) = json.loads((tmp_path / "out" / "index.json").read_text())["sizes"]
    assert row["op_code"] == -(-last // 2) and row["latency"]["table"] == str(measured)
    assert f"for 1 image, as {measured} says" in capsys.readouterr().out


def test_a_fixed_batch(road: Road, tmp_path: Path):
    import onnx

    flags = ("--op-code", 3, "--format", "torch-export", "onnx", "--static-batch", 3, "--device", "cpu")
    run("export.py", road.peelable, *flags, "--output", tmp_path)
    assert json.loads((tmp_path / "index.json").read_text())["static_batch"] == 3
    (taken,), (given,) = (getattr(onnx.load(tmp_path / "model.onnx").graph, kind) for kind in ("input", "output"))
    assert [place.dim_value for place in taken.type.tensor_type.shape.dim] == [3, 1, 16, 16]
    assert [place.dim_value for place in given.type.tensor_type.shape.dim] == [3, 10]
    with pytest.raises(Exception, match="3"):
        torch.export.load(tmp_path / "model.pt2").module()(torch.randn(2, 1, 16, 16))


def test_batches_of_one_size_take_any_number_of_images():
    def doubled(images: torch.Tensor) -> torch.Tensor:
        assert len(images) == 4
        return 2 * images

    for count in (1, 4, 9):
        images = torch.randn(count, 5)
        assert torch.equal(in_batches(doubled, 4)(images), 2 * images)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ("--format", "onnx-int8"),
            "--format onnx-int8 needs images to be checked on: give --data-set and --data-path",
        ),
        (
            ("--format", "onnx-int8", "--data-set", "digits", "--proxy-samples", 31),
            "--format onnx-int8 has 31 images to calibrate on, and needs 32: give more with --proxy-samples",
        ),
        (
            ("--format", "onnx-int8", "--data-set", "digits", "--proxy-samples", 39, "--static-batch", 20),
            "--format onnx-int8 has 39 images to calibrate on, and needs 40",
        ),
    ],
)
def test_too_little_to_calibrate_on_is_one_line(flags: tuple, says: str, road: Road, tmp_path: Path, capsys):
    command = (road.peelable, "--op-code", 0, *flags, "--output", tmp_path / "out", "--device", "cpu")
    assert exit_code("export.py", *command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and not (tmp_path / "out").exists()


def test_a_file_below_the_limit_is_written_only_with_force(road: Road, tmp_path: Path, capsys, monkeypatch):
    """Nothing of the export is written, not even the files of the other formats."""
    monkeypatch.setitem(formats.LIMITS, "kl", 1e-9)  # which no int8 file reaches
    command = (road.peelable, "--op-code", 0, "--format", "folder", "onnx-int8", *DIGITS, "--output", tmp_path / "out")
    assert exit_code("export.py", *command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "onnx-int8 of op code 0: kl " in line and "the limit is 1e-09" in line and "--force" in line
    assert not (tmp_path / "out").exists()
    run("export.py", *command, "--force")
    said = capsys.readouterr().out
    assert "the limit is 1e-09: written because of --force" in said and "onnx-int8" in said.splitlines()[-3]
    (row,) = json.loads((tmp_path / "out" / "index.json").read_text())["sizes"]
    assert (tmp_path / "out" / "model_int8.onnx").exists()
    assert {"kl", "top1", "top1_float32"} <= row["reduced"]["onnx-int8"].keys()


@pytest.mark.parametrize(
    ("measures", "limit"), [({"kl": 0.03}, "kl 0.03"), ({"feature_cosine": 0.98}, "feature_cosine 0.98")]
)
def test_a_low_fidelity_is_written_only_with_force(measures: dict, limit: str, capsys):
    with pytest.raises(UserError, match=f"int8 of op code 3: {limit} against float32, the limit is .*--force to write"):
        formats.check_fidelity("onnx-int8", 3, measures, force=False)
    with pytest.raises(UserError, match=r"fp16 of op code 3: .* leave this format out, or give --force"):
        formats.check_fidelity("onnx-fp16", 3, measures, force=False)
    formats.check_fidelity("onnx-int8", 3, measures, force=True)
    assert "written because of --force" in capsys.readouterr().out
    with pytest.raises(UserError):
        formats.check_fidelity("onnx-int8", 3, {"kl": float("nan")}, force=False)
    formats.check_fidelity("onnx-int8", 3, {"kl": 0.001, "agreement": 99.0}, force=False)
