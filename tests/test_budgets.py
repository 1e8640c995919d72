"""Sizes by budget: what is counted, what is measured, several at once; and the latencies that are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import COMMON, Road, exit_code, run, tiny_digits_model
from timm.models.vision_transformer import VisionTransformer
from tiny import evenly_dropped, random_backbone

from models.backbone import full_widths
from models.extraction import extract
from models.macs import count_macs, count_params
from piad.mask_table import MaskTable
from supernet import Network, latency
from supernet.amounts import format_amount, format_seconds, parse_amount
from supernet.latency import LATENCY, Latencies, measure_latency
from supernet.selection import count_sizes
from utils import UserError


@pytest.fixture
def network() -> tuple[VisionTransformer, MaskTable]:
    """A tiny float32 backbone and a table that drops its units evenly."""
    model = random_backbone(dtype=torch.float32)
    return model, evenly_dropped(model)


def select(model: VisionTransformer, table: MaskTable, **limits: object) -> int:
    """The op code of a network that is known by its model and its table alone."""
    return Network(model, table, "", {}, {}, "logits").select(**limits)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[float], float]], list[int]]:
    """Puts a function of the MACs in the place of the clock; gives the list of the MACs that were measured."""

    def put(seconds_of: Callable[[float], float]) -> list[int]:
        measured: list[int] = []

        def measure(model: VisionTransformer, batch_size: int, amp: torch.dtype | None, runtime: str) -> float:
            measured.append(count_macs(model))
            return seconds_of(measured[-1]) * batch_size

        monkeypatch.setattr(latency, "measure_latency", measure)
        return measured

    return put


# ---------------------------------------------------------------------------------------------------------------------
# Amounts


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("40MB", "bytes", 40e6), ("40 MiB", "bytes", 40 * 2**20), ("1.5gb", "bytes", 1.5e9), ("512B", "bytes", 512),
     ("5ms", "seconds", 5e-3), ("0.2s", "seconds", 0.2), ("80us", "seconds", 80e-6), ("2.4G", "amount", 2.4e9)],
)  # fmt: skip
def test_amounts_are_read_with_their_units(text: str, kind: str, value: float):
    assert parse_amount(text, kind) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "kind"), [("5", "seconds"), ("5min", "seconds"), ("-5ms", "seconds"), ("ms", "seconds"), ("0s", "seconds"),
                       ("40", "bytes"), ("40M", "bytes"), ("nanMB", "bytes"), ("40MB", "amount"), ("5ms", "amount")]
)  # fmt: skip
def test_an_amount_without_its_unit_is_refused(text: str, kind: str):
    with pytest.raises(ValueError):
        parse_amount(text, kind)


def test_amounts_are_shown_as_they_are_read():
    assert [format_amount(40e6, "B"), format_amount(512, "B"), format_amount(2.4e9)] == ["40 MB", "512 B", "2.4G"]
    assert [format_seconds(5e-3), format_seconds(1.25), format_seconds(80e-6)] == ["5 ms", "1.25 s", "0.08 ms"]


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def test_several_budgets_are_met_together(network: tuple[VisionTransformer, MaskTable]):
    model, table = network
    sizes = [count_sizes(model, row) for row in table.rows]
    chosen = set()
    for macs, params, memory in ((0.5, 0.9, 1.0), (0.9, 0.5, 1.0), (1.0, 0.9, 0.5), (0.6, 0.6, 0.6), (1.0, 1.0, 1.0)):
        limits = {"macs": macs * sizes[0]["macs"], "params": params * sizes[0]["params"],
                  "memory": memory * sizes[0]["memory"]}  # fmt: skip
        fits = [code for code, size in enumerate(sizes) if all(size[key] <= limits[key] for key in limits)]
        chosen.add(select(model, table, **{f"max_{key}": limit for key, limit in limits.items()}))
        assert fits[0] in chosen
    assert len(chosen) > 2


def test_memory_is_that_of_the_extracted_weights(network: tuple[VisionTransformer, MaskTable]):
    model, table = network
    for code in (0, len(table) // 2, len(table) - 1):
        for kind in (model, random_backbone(dtype=torch.float64)):
            small = extract(kind, table.widths(code))
            assert count_sizes(kind, table.widths(code))["memory"] == sum(p.nbytes for p in small.parameters())


def test_the_smallest_is_named_where_even_it_is_too_large(network: tuple[VisionTransformer, MaskTable]):
    model, table = network
    smallest = count_sizes(model, table.widths(-1))
    with pytest.raises(
        UserError, match=rf"at most 1 KB of weights: .* op code {len(table) - 1}, has .*of weights"
    ) as no:
        select(model, table, max_memory=1e3)
    assert format_amount(smallest["memory"], "B") in str(no.value)


@pytest.mark.parametrize("share", [0.2, 0.45, 0.7, 1.0])
def test_where_time_follows_macs_bisection_finds_the_largest(share: float, network, clock):
    model, table = network
    measured = clock(lambda macs: macs * 1e-9)
    limit = share * count_macs(model) * 1e-9
    found = select(model, table, max_latency=limit)
    assert found == select(model, table, max_macs=share * count_macs(model))
    assert len(measured) <= math.ceil(math.log2(len(table))) + 1
    assert select(model, table, min_throughput=1 / limit) == found
    assert select(model, table, min_throughput=0) == 0


def test_what_is_found_was_measured_and_meets_the_limit_even_where_time_jumps(network, clock):
    model, table = network
    measured = clock(lambda macs: macs * 1e-9 * (1 + macs % 3))
    limit = 0.8e-9 * count_macs(model)
    latencies = Latencies(model, table)
    found = select(model, table, max_latency=limit, latencies=latencies)
    assert count_macs(model, table.widths(found)) in measured and latencies.of(found) <= limit
    assert all(latencies.of(code) > limit for code in latencies.seconds if code < found)


def test_a_figure_that_others_contradict_is_measured_again(network, clock, tmp_path: Path, capsys):
    """As one kept from a run beside other work: a hundred times too slow, larger and smaller than what was not."""
    model, table = network
    path, disturbed = tmp_path / LATENCY, {5: 100.0, 7: 100.0}
    macs = {code: count_macs(model, table.widths(code)) for code in range(len(table))}
    slow = {macs[code]: factor for code, factor in disturbed.items()}
    clock(lambda count: count * 1e-9 * slow.get(count, 1.0))
    first = Latencies(model, table, path=path)
    for code in (5, 7, 6):
        first.of(code)
    measured = clock(lambda count: count * 1e-9)  # the other work is done
    found = select(model, table, max_latency=1e-9 * macs[5], latencies=Latencies(model, table, path=path))
    assert found == 5 and macs[5] in measured
    assert Latencies(model, table, path=path).seconds[5] == pytest.approx(1e-9 * macs[5])
    assert f"latencies are known from {path}: delete it to measure them anew" in capsys.readouterr().out


def test_latency_and_memory_together(network, clock):
    model, table = network
    clock(lambda macs: macs * 1e-9)
    memory = 0.5 * count_sizes(model)["memory"]
    by_memory = select(model, table, max_memory=memory)
    fast = 1e-9 * count_macs(model, table.widths(by_memory + 5))
    assert select(model, table, max_memory=memory, max_latency=1.0) == by_memory
    assert select(model, table, max_memory=memory, max_latency=fast) == by_memory + 5


def test_the_fastest_is_named_where_none_is_fast_enough(network, clock):
    model, table = network
    clock(lambda macs: macs * 1e-9)
    fastest = format_seconds(1e-9 * count_macs(model, table.widths(-1)))
    asked = r"at most 1e-06 ms \(1G images/s\) for 1 image on .*"
    with pytest.raises(UserError, match=rf"{asked}: the fastest, op code {len(table) - 1}, takes {fastest}"):
        select(model, table, max_latency=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring and keeping


def test_a_measurement_leaves_the_model_as_it_was(network):
    model, _ = network
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    seconds = [measure_latency(model, 2), measure_latency(model, 2, torch.bfloat16)]
    assert all(0 < value < 10 for value in seconds) and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_latencies_are_kept_for_the_same_case_only(network, clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, table = network
    path = tmp_path / LATENCY
    measured = clock(lambda macs: macs * 1e-9)
    first = Latencies(model, table, path=path).of(3)
    assert Latencies(model, table, path=path).of(3) == first and len(measured) == 1
    other = random_backbone("five_heads", dtype=torch.float32)
    others = [
        Latencies(model, table, path=path, batch_size=2),
        Latencies(model, table, path=path, amp=torch.bfloat16),
        Latencies(other, MaskTable([full_widths(other)]), path=path),
        Latencies(model, MaskTable(table.rows[:-1]), path=path),
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        others.append(Latencies(model, table, path=path))
    with monkeypatch.context() as patch:
        patch.setattr(latency, "device_name", lambda device: "another device")
        others.append(Latencies(model, table, path=path))
    for count, latencies in enumerate(others, 2):
        latencies.of(0)
        assert len(measured) == count
    assert len(json.loads(path.read_text())) == 7
    assert Latencies(model, table, path=path).seconds == {3: first}  # those of other cases did not push it out


def test_figures_without_a_runtime_are_of_eager_pytorch(network, clock, tmp_path: Path):
    """A latency.json of before there were others."""
    measured = clock(lambda macs: macs * 1e-9)
    first = Latencies(*network, path=tmp_path / LATENCY).of(3)
    (entry,) = json.loads((tmp_path / LATENCY).read_text())
    assert entry.pop("runtime") == "eager"
    (tmp_path / LATENCY).write_text(json.dumps([entry]))
    assert Latencies(*network, path=tmp_path / LATENCY).seconds == {3: first}
    compiled = Latencies(*network, path=tmp_path / LATENCY, runtime="compile")
    assert compiled.seconds == {} and "compile" in compiled.where and compiled.of(3) and len(measured) == 2
    assert len(json.loads((tmp_path / LATENCY).read_text())) == 2


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"seconds": {"0": "fast"}}]', '[{"seconds": {"0": -1}}]', "["])
def test_a_file_that_holds_no_latencies_is_named(content: str, network, tmp_path: Path):
    (tmp_path / LATENCY).write_text(content)
    with pytest.raises(UserError, match=LATENCY):
        Latencies(*network, path=tmp_path / LATENCY)


def test_where_nothing_can_be_kept_it_is_measured_all_the_same(network, clock, tmp_path: Path, capsys):
    clock(lambda macs: macs * 1e-9)
    (tmp_path / "file").write_text("")
    latencies = Latencies(*network, path=tmp_path / "file" / LATENCY)
    assert latencies.of(0) > 0 and latencies.of(1) > 0
    assert capsys.readouterr().out.count("latencies are not kept") == 1


# ---------------------------------------------------------------------------------------------------------------------
# From the command line


def evaluate(road: Road, folder: Path, *flags: object) -> list[dict]:
    run("main.py", "--eval", *COMMON, "--checkpoint", road.super_network, *flags, "--output-dir", folder)
    return json.loads((folder / "frontier.json").read_text())["sizes"]


def test_the_answer_says_what_was_asked_and_found_and_what_lies_beside_it(road: Road, tmp_path: Path, capsys):
    rows = evaluate(road, tmp_path, "--macs", "100K", "--params", "20K", "--memory", "1MB")
    assert len(rows) == 1 and rows[0]["macs_linear"] <= 100e3 and rows[0]["params"] <= 20e3
    code, lines = rows[0]["op_code"], capsys.readouterr().out.splitlines()
    assert lines[0] == "requested: at most 100K MACs (linear) and at most 20K parameters and at most 1 MB of weights"
    model, table = tiny_digits_model(), MaskTable.load(road.mask_table)
    for line, (name, near) in zip(
        lines[1:], (("found", code), ("next larger", code - 1), ("next smaller", code + 1)), strict=False
    ):
        macs, params = (format_amount(count(model, table.widths(near))) for count in (count_macs, count_params))
        assert line.startswith(f"  {name}: op code {near}, {macs} MACs, {params} parameters, ")
    above = table.widths(code - 1)
    assert count_macs(model, above) > 100e3 or count_params(model, above) > 20e3


def test_sizes_by_latency(road: Road, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    table = tmp_path / "mask_table.json"  # the latencies go beside it
    table.write_bytes(road.mask_table.read_bytes())
    asked = ("--mask-table", table, "--latency", "1000s", "--throughput", "0.01")
    monkeypatch.setattr(latency, "DOUBTFUL", math.inf)
    (row,) = evaluate(road, tmp_path / "first", *asked)
    out = capsys.readouterr().out
    assert row["op_code"] == 0
    assert "requested: at most 1e+03 s and at least 0.01 images/s, for 256 images on " in out
    assert "next larger: none (op code 0 is the whole network)" in out and " ms\n" in out
    (entry,) = json.loads((tmp_path / LATENCY).read_text())
    assert (entry["batch_size"], entry["dtype"]) == (256, "float32") and entry["seconds"].keys() >= {"0", "1"}
    monkeypatch.setattr(latency, "measure_latency", lambda *_: pytest.fail("measured twice"))
    evaluate(road, tmp_path / "second", *asked)


def test_a_size_to_fine_tune_by_several_budgets(road: Road, tmp_path: Path, capsys):
    flags = ("--stage", "finetune", *COMMON, "--checkpoint", road.super_network, "--macs", "1K", "--memory", "2KB")
    assert exit_code("main.py", *flags, "--output-dir", tmp_path / "output") == 2
    assert "no sub-network has at most 1K MACs and 2 KB of weights" in capsys.readouterr().err
