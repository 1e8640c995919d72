"""Sizes by times that were measured elsewhere, and by the fidelity that a report knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import Road, exit_code, run
from timm.models.vision_transformer import VisionTransformer
from tiny import evenly_dropped, random_backbone

from piad.mask_table import MaskTable
from supernet import Network
from supernet.known_fidelity import known_fidelity
from supernet.latency_table import LatencyTable, write_measure
from utils import UserError

TABLE = MaskTable([{"0.attn": 16 - 2 * code, "0.mlp": 64} for code in range(5)])
STAMP = "0123456789abcd"


def macs(op_code: int) -> int:
    """The MACs of a size of TABLE."""
    return 1000 - op_code


def filled(path: Path, rows: dict[object, object], batch_size: int = 1, of: Callable[[int], int] = macs) -> Path:
    """A measure.csv with these rows, op code -> milliseconds."""
    write_measure(path, [(f"op_{code}/model.onnx", code, of(int(code))) for code in rows], batch_size)
    lines = path.read_text().splitlines()
    assert lines[0] == "file,op_code,macs_linear,batch_size,milliseconds"
    assert all(line.endswith(f",{batch_size},") for line in lines[1:])
    path.write_text("\n".join([lines[0], *(f"{line}{ms}" for line, ms in zip(lines[1:], rows.values(), strict=True))]))
    return path


def test_sizes_between_the_rows_are_interpolated(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = filled(tmp_path / "measure.csv", {0: 10, 2: 6, 4: 1}, batch_size=2)
    path.write_text(path.read_text(), encoding="utf-8-sig")  # as spreadsheets write it
    found = LatencyTable(path, TABLE, macs)
    assert found.batch_size == 2
    assert [found.of(code) for code in range(5)] == pytest.approx([0.010, 0.008, 0.006, 0.0035, 0.001])
    assert found.where == f"2 images, as {tmp_path / 'measure.csv'} says" and capsys.readouterr().out == ""


def test_a_smaller_size_that_is_slower_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture):
    LatencyTable(filled(tmp_path / "measure.csv", {4: 1, 3: 7, 0: 10, 1: 6}), TABLE, macs)
    assert "op code 3, 7 ms, is slower than the larger op code 1, 6 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({0: 10, 2: "", 4: 1}, r"line 3: milliseconds is empty: fill it in, or remove the line"),
        ({0: 10, 2: "fast", 4: 1}, r"line 3: milliseconds 'fast' is not a number above 0"),
        ({0: 10, 4: "nan"}, r"line 3: milliseconds 'nan' is not a number above 0"),
        ({0: 10, 4: -1}, r"line 3: milliseconds '-1' is not a number above 0"),
        ({0: 10, 5: 1}, r"line 3: op_code '5' is not of this network: its op codes are 0 to 4"),
        ({0: 10, "00": 10, 4: 1}, r"line 3: op code 00 has two rows: keep those of one kind of file"),
        ({2: 10, 4: 1}, r"no row for op code 0, the largest size"),
        ({0: 10, 2: 5}, r"no row for op code 4, the smallest size"),
        ({0: 1, 2: 5, 4: 10}, r"the times grow: op code 4, the smallest size, takes 10 ms, op code 0, .* 1 ms"),
        ({}, r"holds no latencies: it needs the columns op_code and milliseconds"),
    ],
)
def test_a_table_that_is_wrong_is_one_line(rows: dict, says: str, tmp_path: Path):
    with pytest.raises(UserError, match=says) as error:
        LatencyTable(filled(tmp_path / "measure.csv", rows), TABLE, macs)
    assert "\n" not in str(error.value)


def test_times_of_another_network_or_mask_table_are_one_line(tmp_path: Path):
    path = filled(tmp_path / "measure.csv", {0: 10, 4: 1})
    says = r"line 3: op code 4 has 996 MACs there and 500 here: the times are of another network or mask table; export"
    with pytest.raises(UserError, match=says):
        LatencyTable(path, TABLE, lambda code: 500 if code else 1000)
    path.write_text("op_code,milliseconds\n0,10\n4,1\n")  # written by hand, without them
    assert LatencyTable(path, TABLE, macs).of(2) == pytest.approx(0.0055)


@pytest.mark.parametrize("batches", [("1", "2"), ("0", "0"), ("many", "many"), ("4", "")])
def test_times_of_several_batch_sizes_are_one_line(batches: tuple[str, str], tmp_path: Path):
    path = tmp_path / "measure.csv"
    path.write_text("op_code,batch_size,milliseconds\n" + f"0,{batches[0]},10\n4,{batches[1]},1\n")
    with pytest.raises(UserError, match=r"batch_size is .*, not the same number of images in all rows"):
        LatencyTable(path, TABLE, macs)


@pytest.mark.parametrize(
    "content",
    [b"", b"op_code,milliseconds\n" + b"9" * 5000 + b",1\n", b"\xff\xfe", b"a,b\n1,2\n", b"op_code,milliseconds\n1\n"],
)
def test_a_file_that_is_no_table_is_one_line(content: bytes, tmp_path: Path):
    (tmp_path / "measure.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"measure\.csv"):
        LatencyTable(tmp_path / "measure.csv", TABLE, macs)
    with pytest.raises(UserError, match=r"none\.csv cannot be read: No such file"):
        LatencyTable(tmp_path / "none.csv", TABLE, macs)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


@pytest.fixture
def network(tmp_path: Path) -> Network:
    """A tiny network whose weights lie in a folder of their own."""
    model: VisionTransformer = random_backbone(dtype=torch.float32)
    source = tmp_path / "net" / "contracted.safetensors"
    source.parent.mkdir()
    return Network(model, evenly_dropped(model), "", {}, {}, "logits", stamp=STAMP, source=source)


def report(network: Network, kl: dict[int, float], **more: Any) -> None:
    """A frontier.json of the network's sizes beside its weights."""
    grade = more.pop("grade", network.grade)
    sizes = [{"op_code": code, "widths": network.table.widths(code), "grade": grade, "kl": kl[code]} for code in kl]
    facts = {"weights": str(network.source), "averaged_weights": False, "stamp": STAMP, "sizes": sizes, **more}
    (network.source.parent / "frontier.json").write_text(json.dumps(facts))


def test_the_size_is_chosen_by_the_table(network: Network, tmp_path: Path):
    last = len(network.table) - 1
    path = filled(tmp_path / "measure.csv", {0: 1000, last: 1000 - last}, of=network.macs)
    latencies = LatencyTable(path, network.table, network.macs)
    assert network.select(max_latency=0.9975, latencies=latencies) == 3
    assert network.select(min_throughput=1 / 0.9965, latencies=latencies) == 4
    with pytest.raises(UserError, match=r"no sub-network takes at most .* says: the fastest, op code"):
        network.select(max_latency=1e-9, latencies=latencies)


def test_of_the_sizes_that_are_fast_enough_the_one_nearest_to_the_whole_network_is_chosen(
    network: Network, tmp_path: Path, capsys: pytest.CaptureFixture
):
    last = len(network.table) - 1
    path = filled(tmp_path / "measure.csv", {0: 10, last: 5}, of=network.macs)
    latencies = LatencyTable(path, network.table, network.macs)
    limit = latencies.of(4)
    assert network.select(max_latency=limit, latencies=latencies) == 4
    report(network, {0: 0.0, 3: 0.1, 4: 0.3, 6: 0.2, last: 2.0})
    assert network.select(max_latency=limit, latencies=latencies) == 6
    assert "op code 6 is chosen, not the larger op code 4: its fidelity is better" in capsys.readouterr().out
    assert network.select(max_latency=1.0, latencies=latencies) == 0
    assert network.select(max_macs=network.macs(4)) == 4  # MACs alone: the largest, as ever
    report(network, {0: 0.0, 3: 0.1, 4: 0.2, last: 2.0})  # the usual case: it falls with the size
    assert network.select(max_latency=limit, latencies=latencies) == 4


@pytest.mark.parametrize(
    "more",
    [
        {"stamp": "another"},
        {"averaged_weights": True},
        {"weights": "checkpoint_1.pth"},
        {"sizes": 3},
        {"sizes": [1]},
        {"grade": "refitted"},
    ],
)
def test_a_report_of_other_weights_says_nothing(more: dict, network: Network):
    report(network, {0: 0.0, 5: 1.0})
    asked = (network.source, STAMP, False, network.table, network.grade)
    assert known_fidelity(*asked)[:2] == pytest.approx([0.0, -0.2])
    report(network, {0: 0.0, 5: 1.0}, **more)
    assert known_fidelity(*asked) == []
    (network.source.parent / "frontier.json").write_text("[")
    assert known_fidelity(*asked) == known_fidelity(None, *asked[1:]) == []


def test_a_table_is_given_with_a_limit(road: Road, tmp_path: Path, capsys: pytest.CaptureFixture):
    flags = (road.peelable, "--op-code", 0, "--latency-table", tmp_path / "measure.csv", "--output", tmp_path / "out")
    assert exit_code("export.py", *flags, "--device", "cpu") == 2
    assert "--latency-table is for --latency or --throughput: give one of them" in capsys.readouterr().err


def test_a_table_that_is_filled_in_is_not_replaced(road: Road, tmp_path: Path, capsys: pytest.CaptureFixture):
    write_measure(tmp_path / "measure.csv", [("op_0/model.onnx", 0, 1)])
    flags = (road.peelable, "--op-code", 5, "--output", tmp_path, "--device", "cpu", "--replace")
    run("export.py", *flags)  # it is empty, and goes
    filled(tmp_path / "measure.csv", {0: 3})
    assert exit_code("export.py", *flags) == 2
    assert "measure.csv holds times that would be lost: move it elsewhere" in capsys.readouterr().err
    (tmp_path / "measure.csv").write_bytes(b"\xff\xfe")  # what cannot be read is kept, too
    assert exit_code("export.py", *flags) == 2
