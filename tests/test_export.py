"""Exports: each file opens where neither this repository nor timm is, and gives what the model gives."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import MODEL, NAME, ROOT, Road, exit_code, run, snapshot
from safetensors.torch import save_file

from models.extraction import extract
from models.macs import count_macs, count_params
from supernet import formats, load
from supernet.formats import relative_error
from supernet.latency import Latencies
from utils import UserError

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in formats.NEEDS["onnx"]),
    reason="needs requirements-export.txt",
)

# What a fresh process runs: images.npy beside the file to logits.npy. Nothing of ours can be imported there.
ALONE = """
import sys
for name in {blocked}:
    sys.modules[name] = None  # an import of it fails
for name in ("models", "piad", "files", "utils"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{{name}} can be imported")
import numpy as np
images = np.load(sys.argv[2])
{body}
np.save(sys.argv[3], logits)
"""
BODIES = {
    "torch-export": (["timm", "onnxruntime"], """
import torch
logits = torch.export.load(sys.argv[1]).module()(torch.from_numpy(images)).detach().numpy()
"""),
    "onnx": (["timm", "torch"], """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
(taken,) = session.get_inputs()
logits = session.run(None, {taken.name: images})[0]
"""),
}  # fmt: skip


def export(road: Road, folder: Path, *flags: object) -> dict:
    run("export.py", road.peelable, *flags, "--output", folder, "--device", "cpu")
    return json.loads((folder / "index.json").read_text())


def run_alone(code: str, file: Path, images: np.ndarray, folder: Path, *flags: str) -> np.ndarray:
    """The logits that a fresh isolated Python makes of the images, from a folder that is not the repository's."""
    np.save(folder / "images.npy", images)
    command = [sys.executable, *flags, "-c", code, str(file), str(folder / "images.npy"), str(folder / "logits.npy")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "logits.npy")


@pytest.mark.parametrize("name", ["torch-export", pytest.param("onnx", marks=needs_onnx)])
def test_a_file_opens_alone_at_any_batch_size(name: str, road: Road, tmp_path: Path, capsys):
    index = export(road, tmp_path / "out", "--op-code", 5, "--format", name, "--data-set", "digits")
    (row,) = index["sizes"]
    said = capsys.readouterr().out
    for what, error in row["relative_error"][name].items():
        assert 0 <= error < 1e-4 and f"{error:.1e} on 16 {what}" in said
    assert row["relative_error"][name].keys() == {"random images", "real images"}
    network = load(road.peelable)
    small = extract(network.model, network.table.widths(5))
    blocked, body = BODIES[name]
    for count in (1, 3):
        images = torch.randn(count, *index["preprocessing"]["input_size"])
        code = ALONE.format(blocked=blocked, body=body)
        found = run_alone(code, tmp_path / "out" / row["files"][name], images.numpy(), tmp_path, "-I")
        with torch.no_grad():
            np.testing.assert_allclose(found, small(images).numpy(), rtol=1e-4, atol=1e-5)


def test_a_torch_export_file_says_what_it_is(road: Road, tmp_path: Path):
    index = export(road, tmp_path / "out", "--all", 2, "--format", "torch-export")
    (row, _) = index["sizes"]
    assert (tmp_path / "out" / "measure.csv").read_text().splitlines()[1] == f"op_0/model.pt2,0,{row['macs_linear']},1,"
    extra = {"metadata.json": ""}
    torch.export.load(tmp_path / "out" / "op_0" / "model.pt2", extra_files=extra)
    found, row = json.loads(extra["metadata.json"]), index["sizes"][0]
    assert {key: found[key] for key in ("op_code", "grade", "macs_linear", "params", "widths")}.items() <= row.items()
    assert found["preprocessing"] == index["preprocessing"] and found["num_classes"] == 10


@needs_onnx
def test_the_onnx_file_says_what_it_takes(road: Road, tmp_path: Path):
    import onnx

    export(road, tmp_path, "--op-code", 1, "--format", "onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    assert next(entry.version for entry in model.opset_import if not entry.domain) >= 17
    (taken,), (given,) = model.graph.input, model.graph.output
    assert (taken.name, given.name) == ("images", "logits")
    shape = taken.type.tensor_type.shape.dim
    assert shape[0].dim_param == given.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [place.dim_value for place in shape[1:]] == [1, 16, 16]


@pytest.mark.parametrize("name", ["torch-export", pytest.param("onnx", marks=needs_onnx)])
def test_files_name_no_folder_of_this_machine(name: str, road: Road, tmp_path: Path):
    (row,) = export(road, tmp_path / "out", "--op-code", 1, "--format", name)["sizes"]
    content = (tmp_path / "out" / row["files"][name]).read_bytes()
    for folder in (ROOT, tmp_path, Path(torch.__file__).parent.parent):
        assert str(folder).encode() not in content


def test_a_folder_opens_with_supernet_load_in_a_fresh_process(road: Road, tmp_path: Path):
    index = export(road, tmp_path / "out", "--macs-ratio", 0.5)
    network = load(road.peelable)
    small = extract(network.model, network.table.widths(index["sizes"][0]["op_code"]))
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, torch, supernet
network = supernet.load(sys.argv[1])
np.save(sys.argv[3], network.model(torch.from_numpy(np.load(sys.argv[2]))).detach().numpy())
"""
    images = torch.randn(3, 1, 16, 16)
    found = run_alone(code, tmp_path / "out", images.numpy(), tmp_path, "-I")
    with torch.no_grad():
        np.testing.assert_allclose(found, small(images).numpy(), rtol=1e-5, atol=1e-6)


def test_a_folder_is_plain_files(road: Road, tmp_path: Path):
    """Without this repository: the weights with safetensors, the rest with json."""
    export(road, tmp_path / "out", "--op-code", 5)
    code = ALONE.format(blocked=["timm"], body="""
import json, pathlib
from safetensors.numpy import load_file
folder = pathlib.Path(sys.argv[1])
config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
heads = 3
widths = [len(weights[f"blocks.{i}.attn.qkv.weight"]) // 3 // heads if f"blocks.{i}.attn.qkv.weight" in weights else 0
          for i in range(2)]
assert widths == [config["widths"][f"{i}.attn"] for i in range(2)]
logits = np.array([sum(value.size for value in weights.values()) == config["params"]])
""")  # fmt: skip
    assert run_alone(code, tmp_path / "out", np.zeros(1), tmp_path, "-I").all()


def test_all_sizes_are_in_one_index(road: Road, tmp_path: Path):
    measured = ("--measure", "latency", "top1", "fidelity", "--data-set", "digits")
    peelable = tmp_path / "peelable"  # latency.json is written beside the table
    shutil.copytree(road.peelable, peelable)
    run("export.py", peelable, "--all", 3, *measured, "--format", "folder", "--output", tmp_path / "out",
        "--device", "cpu")  # fmt: skip
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    network = load(peelable)
    assert [row["op_code"] for row in index["sizes"]][::2] == [0, len(network.table) - 1] and len(index["sizes"]) == 3
    for row in index["sizes"]:
        widths = network.table.widths(row["op_code"])
        assert row["files"] == {"folder": f"op_{row['op_code']}"}
        small = load(tmp_path / "out" / row["files"]["folder"])
        assert small.table.rows == [widths] and small.facts["accuracy"] == row["accuracy"]
        assert small.facts["fidelity"] == row["fidelity"]
        assert row["fidelity"].keys() == {"agreement", "kl", "images", "data_set"} and row["fidelity"]["images"] == 360
        macs = [count_macs(network.model, widths, convention) for convention in ("linear", "full")]
        assert [row["macs_linear"], row["macs_full"]] == macs and row["params"] == count_params(network.model, widths)
        assert row["memory"] == 4 * row["params"] and 0 <= row["accuracy"]["top1"] <= 100
        assert row["latency"]["seconds"] > 0 and row["latency"]["batch_size"] == 1
    assert index["preprocessing"] == network.preprocessing
    assert index["output"] == "logits, float32 (batch, classes)"
    first, _, last = (row["fidelity"] for row in index["sizes"])
    assert (first["agreement"], first["kl"]) == (100, 0) and last["agreement"] < 100 and last["kl"] > 1e-3
    run("export.py", tmp_path / "out" / "op_0", "--output", tmp_path / "copy", "--device", "cpu")
    (row,) = json.loads((tmp_path / "copy" / "index.json").read_text())["sizes"]
    assert (row["accuracy"], row["fidelity"]) == (index["sizes"][0]["accuracy"], first)
    # What is known is told without being measured again, and what is not known is left out.
    run("export.py", peelable, "--op-code", 0, 1, "--output", tmp_path / "again", "--device", "cpu")
    rows = json.loads((tmp_path / "again" / "index.json").read_text())["sizes"]
    assert (
        rows[0]["latency"] == index["sizes"][0]["latency"] and not {"latency", "accuracy", "fidelity"} & rows[1].keys()
    )


def test_a_sub_network_is_exported_as_it_is(road: Road, tmp_path: Path):
    run("export.py", road.peeled, "--format", "folder", "torch-export", "--output", tmp_path, "--device", "cpu")
    (row,) = json.loads((tmp_path / "index.json").read_text())["sizes"]
    before, after = load(road.peeled), load(tmp_path)
    assert after.facts == before.facts and row["accuracy"] == before.facts["accuracy"]
    extra = {"metadata.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert row["op_code"] == json.loads(extra["metadata.json"])["op_code"] == before.facts["op_code"]
    images = torch.randn(3, 1, 16, 16)
    assert torch.equal(after.model(images), before.model(images))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert exit_code("export.py", *arguments, "--device", "cpu") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export.py: error: ")
    return line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ("--format", "onyx", "--op-code", 0),
            ("--format onyx is not known: folder, torch-export, onnx, onnx-fp16, onnx-int8",),
        ),
        ((), ("sizes: give --macs", "--all 12")),
        (("--macs", "1K"), ("no sub-network has at most 1K MACs",)),
        (("--latency", "0.001us"), ("no sub-network takes at most 1e-06 ms", "the fastest, op code")),
        (("--macs", "100K", "50K", "--memory", "1MB"), ("--macs has 2 values beside --memory",)),
        (("--op-code", 0, "--measure", "top1"), ("--measure top1 needs --data-set",)),
        (("--op-code", 0, "--measure", "fidelity"), ("--measure fidelity needs --data-set",)),
        (("--op-code", 0, "--data-set", "folder", "--data-path", "/none"), ("/none does not exist",)),
        (("--op-code", 0, "--static-batch", 2), ("--static-batch is for torch-export and ONNX files",)),
        (
            ("--latency", "5ms", "--latency-table", "measure.csv", "--runtime", "compile"),
            ("--latency-table holds times that were measured elsewhere: leave --runtime and --amp out",),
        ),
    ],
)
def test_what_cannot_be_exported_is_one_line(flags: tuple, says: tuple, road: Road, tmp_path: Path, capsys):
    line = refused(capsys, road.peelable, *flags, "--output", tmp_path / "out")
    assert all(part in line for part in says)
    assert snapshot(tmp_path) == {}


def test_a_sub_network_has_no_whole_network_to_be_compared_with(road: Road, tmp_path: Path, capsys):
    line = refused(capsys, road.peeled, "--measure", "fidelity", "--data-set", "digits", "--output", tmp_path / "out")
    assert f"--measure fidelity needs the whole network, and {road.peeled} is a sub-network" in line


def test_a_missing_package_is_named_with_what_to_type(road: Road, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else real(name))
    line = refused(capsys, road.peelable, "--op-code", 0, "--format", "folder", "onnx", "--output", tmp_path / "out")
    assert "--format onnx needs onnx, onnxruntime, onnxscript: python -m pip install -r requirements-export.txt" in line
    assert (ROOT / "requirements-export.txt").is_file() and snapshot(tmp_path) == {}


def test_a_folder_that_is_no_network(tmp_path: Path, capsys):
    (tmp_path / "bare").mkdir()
    line = refused(capsys, tmp_path / "bare", "--op-code", 0, "--output", tmp_path / "out")
    assert "bare is not a super-network" in line and "mask_table.json" in line and "config.json" in line
    assert "none does not exist" in refused(capsys, tmp_path / "none", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_say_their_model(road: Road, tmp_path: Path, capsys):
    save_file(road.weights(), tmp_path / "released.safetensors")
    table = json.loads(road.mask_table.read_text())
    del table["meta"]  # a released table has no stamp of the weights
    (tmp_path / "mask_table.json").write_text(json.dumps(table))
    asked = (tmp_path / "released.safetensors", "--op-code", 3, "--output", tmp_path / "out")
    assert "released.safetensors does not say of which model it is" in refused(capsys, *asked)
    run("export.py", *asked, *MODEL, "--device", "cpu")
    assert load(tmp_path / "out").name == NAME


def test_an_output_that_exists_is_written_over_only_with_force(road: Road, tmp_path: Path, capsys):
    output = tmp_path / "out"
    export(road, output, "--op-code", 3)
    (output / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    line = refused(capsys, road.peelable, "--op-code", 5, "--output", output)
    assert "exists and is not empty" in line and "--replace" in line and snapshot(tmp_path) == before
    export(road, output, "--op-code", 5, "--replace")
    assert load(output).facts["op_code"] == 5
    assert snapshot(tmp_path).keys() == before.keys() and (output / "notes.txt").read_text() == "mine"
    line = refused(capsys, road.peelable, "--op-code", 5, "--output", output / "notes.txt", "--replace")
    assert "--output " in line and "notes.txt is a file" in line


def test_an_export_that_differs_is_not_written(road: Road, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    def off(size: formats.Size, folder: Path) -> tuple[Path, formats.Outputs]:
        path, outputs_of = formats.write_folder(size, folder)
        return path, lambda images: outputs_of(images) * 1.001

    monkeypatch.setitem(formats.FORMATS, "folder", off)
    line = refused(capsys, road.peelable, "--op-code", 3, "--output", tmp_path / "out")
    assert "folder of op code 3 differs from the model, relative error 1.0e-03 on 16 random images" in line
    assert snapshot(tmp_path) == {}


def test_relative_error_sees_one_image_and_a_nan(road: Road):
    model, images = load(road.peeled).model, torch.randn(4, 1, 16, 16)
    assert relative_error(model, model, images) < 1e-6
    assert relative_error(lambda batch: model(batch) * (2 if len(batch) == 1 else 1), model, images) > 1e-3
    assert not relative_error(lambda batch: model(batch) * float("nan"), model, images) < 1e-4


def test_force_removes_what_the_earlier_export_left(road: Road, tmp_path: Path):
    export(road, tmp_path / "out", "--all", 3)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    index = export(road, tmp_path / "out", "--op-code", 2, "--replace")
    left = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert left == {"notes.txt", "index.json", "model.safetensors", "config.json", "model.py"}
    assert index["averaged_weights"] is False


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seed", -1], "'-1' is not a whole number 0 or more"),
        (["--output", "/proc/nowhere/x"], "--output /proc/nowhere/x"),
        (["--model-kwargs", "depth=3"], "says depth=2, --model-kwargs says depth=3: leave it out"),
    ],
)
def test_one_line_for_what_cannot_be(flags: list, says: str, road: Road, tmp_path: Path, capsys):
    flags = flags if "--output" in flags else [*flags, "--output", tmp_path / "out"]
    assert exit_code("export.py", road.peelable, "--op-code", 1, *flags, "--device", "cpu") == 2
    assert says in capsys.readouterr().err


def test_what_is_wrong_is_said_before_anything_is_measured(road: Road, tmp_path: Path, capsys, monkeypatch):
    peelable, asked = tmp_path / "peelable", ("--latency", "1s", "--output", tmp_path / "out")
    shutil.copytree(road.peelable, peelable)
    with monkeypatch.context() as patch:
        patch.setattr(Latencies, "of", lambda *_: pytest.fail("a size was measured"))
        assert "/none does not exist" in refused(
            capsys, peelable, *asked, "--data-set", "folder", "--data-path", "/none"
        )
        three = tmp_path / "three"
        for part in ("train/a", "train/b", "train/c", "val/a", "val/b", "val/c"):
            (three / part).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(three / part / "0.png")
        wrong = ("--measure", "top1", "--data-set", "folder", "--data-path", three)
        assert "the model has 10 classes, the data has 3" in refused(capsys, peelable, *asked, *wrong)
    (peelable / "latency.json").write_text("{}")
    assert "latency.json does not hold latencies; delete it" in refused(
        capsys, peelable, "--op-code", 0, "--output", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_a_sub_network_is_not_cut_again(road: Road, tmp_path: Path):
    export(road, tmp_path / "out", "--op-code", 1)
    with pytest.raises(UserError, match="is a sub-network, which is cut already"):
        load(tmp_path / "out", compensate=True)
    with pytest.raises(UserError, match="holds no averaged weights"):
        load(tmp_path / "out", use_ema=True)
    assert load(tmp_path / "out", name=NAME).name == NAME  # which says the same
