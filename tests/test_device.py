"""The time of a device: measured with a clock of the tests, interpolated, read strictly, and tables made for it."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import DIGITS, NAME, exit_code, run, snapshot, tiny_digits_model
from tiny import random_backbone

import supernet
from models.backbone import Backbone, create_backbone, full_widths, modules_of
from models.macs import count_macs, module_macs
from piad.mask_table import MaskTable
from studies import devices
from supernet import timing
from supernet.contraction import contract_network, save_contracted
from supernet.device import DeviceProfile, shape_of
from supernet.profiling import measure_profile, measured_widths, networks_to_measure
from supernet.tables import table_of_losses
from utils import UserError, run_program


def module_seconds(_module: Any, width: int) -> float:
    """A time for modules of any model."""
    return 1e-5 * width


FACTS = {"format": 1, "model": "a", "device": "b", "runtime": "eager", "dtype": "float32", "batch_size": 1}


def content_of(
    model: Backbone, seconds: Callable[[Any, int], float], widths: dict[str, list[int]] | None = None
) -> dict:
    """What device.json holds where a module takes seconds(module, width)."""
    modules: dict[str, Any] = {}
    for module in modules_of(model).values():
        entry = modules.setdefault(shape_of(module), {"count": 0, "seconds": {}})
        entry["count"] += 1
        for width in widths[shape_of(module)] if widths else (0, module.width):
            entry["seconds"][str(width)] = seconds(module, width)
    return {**FACTS, "rest": 1.0, "modules": modules}


@pytest.fixture(scope="module")
def deit() -> Backbone:
    with torch.device("meta"):
        return create_backbone("deit_small_patch16_224")


def random_losses(model: Backbone, seed: int = 0) -> dict[str, np.ndarray]:
    """Falling with the dims, as contraction makes them, and of another size in every module."""
    generator = np.random.default_rng(seed)
    return {
        key: generator.random() * generator.random(width) * np.linspace(1, 0.1, width) ** 2
        for key, width in full_widths(model).items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Machine:
    """A device whose networks take what the tests say: `seconds` of each module, and `rest`; its clock."""

    def __init__(self, seconds: Callable[[str, int], float], rest: float):
        self.seconds, self.rest, self.time = seconds, rest, 0.0
        self.runs = 0

    def runner(self, model: Backbone, *_how: Any) -> Callable[[torch.Tensor], None]:
        widths = full_widths(model)

        def run(images: torch.Tensor) -> None:
            assert images.shape == (5, model.in_chans, *model.patch_embed.img_size)
            self.runs += 1
            drift = 1 + self.runs / 1e6  # the machine gets slower
            self.time += drift * (self.rest + sum(self.seconds(key, width) for key, width in widths.items()))

        return run

    def measure(self, model: Backbone, monkeypatch: pytest.MonkeyPatch) -> DeviceProfile:
        monkeypatch.setattr(timing, "runner", self.runner)
        return measure_profile(model, "tiny", batch_size=5, runtime="fake", repeats=2, now=lambda: self.time)


def step_and_slope(key: str, width: int) -> float:
    """An attention takes 3 ms at any width and 10 us per dim; an MLP 0.1 ms and 5 us per hidden unit."""
    fixed, per_dim = (3e-3, 1e-5) if key.endswith("attn") else (1e-4, 5e-6)
    return fixed + per_dim * width if width else 0.0


def test_measuring_finds_the_times_of_a_device_that_adds_up(backbone: Backbone, monkeypatch: pytest.MonkeyPatch):
    profile = Machine(step_and_slope, rest=7e-3).measure(backbone, monkeypatch)
    assert profile.conditions() | {"device": 0} == {"device": 0, "runtime": "fake", "dtype": "float64", "batch_size": 5}
    assert profile.content["rest"] == pytest.approx(7e-3, rel=1e-2)
    full = full_widths(backbone)
    for share in (1, 0.5, 0.25):
        widths = {key: round(width * share) for key, width in full.items()} | {"0.mlp": 0}
        expected = 7e-3 + sum(step_and_slope(key, width) for key, width in widths.items())
        assert profile.of(widths) == pytest.approx(expected, rel=1e-3)
    assert profile.content["errors"]["networks"] == len(networks_to_measure(backbone))
    assert profile.content["errors"]["largest"] < 1e-3
    assert DeviceProfile(profile.content, backbone, "tiny").content == profile.content  # it can be read again


def test_what_is_measured(backbone: Backbone):
    """Bypass, one unit, and quarters; a Swin has modules of several shapes."""
    widths = measured_widths(backbone)
    assert widths == {
        "attn: 3 heads of 16 dims, D 48, 17 tokens": [0, 2, 4, 8, 12, 16],
        "mlp: 192 hidden units, D 48, 17 tokens": [0, 8, 48, 96, 144, 192],
    }
    with torch.device("meta"):
        swin = create_backbone("swin_tiny_patch4_window7_224")
    shapes = [shape for shape in measured_widths(swin) if shape.startswith("attn")]
    assert shapes[0] == "attn: 3 heads of 32 dims, D 96, 3136 tokens in windows of 49" and len(shapes) == 4


def test_noise_makes_no_smaller_width_slower(backbone: Backbone, monkeypatch: pytest.MonkeyPatch):
    def noisy(key: str, width: int) -> float:
        return {0: 0.0, 4: 5e-3, 12: 4e-3}.get(width, 4.5e-3) if key.endswith("attn") else 1e-6 * width

    profile = Machine(noisy, rest=1e-3).measure(backbone, monkeypatch)
    times = [profile.of_module("0.attn", width) for width in (2, 4, 8, 12, 16)]
    assert times == sorted(times) and times[1] == pytest.approx(4.5e-3, rel=1e-3)


def test_times_that_are_lost_in_noise_are_refused(backbone: Backbone, monkeypatch: pytest.MonkeyPatch):
    machine = Machine(lambda key, width: -1e-9 * width if key.endswith("attn") else 1e-3 * width, rest=1.0)
    with pytest.raises(UserError, match=r"attn: 3 heads .*lost in the noise: give more --repeats"):
        machine.measure(backbone, monkeypatch)


# ---------------------------------------------------------------------------------------------------------------------
# The time of a network at any widths

RISING = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=5, max_size=5).map(np.cumsum)


def curves(attn: np.ndarray, mlp: np.ndarray) -> Callable[[Any, int], float]:
    """The times of modules at the measured widths of a tiny backbone; the first of them is that of a whole unit."""
    return lambda module, width: {
        "attn": dict(zip((0, 2, 4, 8, 12, 16), (0.0, *(attn + 1e-3).tolist()), strict=True)),
        "mlp": dict(zip((0, 8, 48, 96, 144, 192), (0.0, *(mlp + 1e-3).tolist()), strict=True)),
    }[module.kind][width]


TINY = random_backbone()
WIDTHS = st.fixed_dictionaries({key: st.integers(0, width) for key, width in full_widths(TINY).items()})


@given(RISING, RISING, WIDTHS, WIDTHS)
def test_the_time_adds_up_and_does_not_fall_with_the_widths(attn, mlp, some, others):
    seconds = curves(attn, mlp)
    profile = DeviceProfile(content_of(TINY, seconds, measured_widths(TINY)), TINY, "tiny")
    parts = [profile.of_module(key, width) for key, width in some.items()]
    assert profile.of(some) == pytest.approx(1.0 + sum(parts))
    wider = {key: max(width, others[key]) for key, width in some.items()}
    assert profile.of(wider) >= profile.of(some) - 1e-12
    for key, module in modules_of(TINY).items():
        for width in measured_widths(TINY)[shape_of(module)]:
            assert profile.of_module(key, width) == seconds(module, width)
    assert profile.of(dict.fromkeys(some, 0)) == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Tables for a device


def test_the_table_for_times_in_proportion_to_macs_is_that_for_macs(deit: Backbone):
    content = content_of(deit, lambda module, width: module_macs(module, width) * 2.0**-40)
    empty = count_macs(deit, dict.fromkeys(full_widths(deit), 0))
    profile = DeviceProfile(content | {"rest": empty * 2.0**-40}, deit, "deit")
    losses = random_losses(deit)
    plain, timed = (table_of_losses(deit, losses, "ab", 0.9, given) for given in (None, profile))
    assert timed.rows == plain.rows and len(plain) > 100
    assert plain.meta == {"made_by": "contraction, without training", "stamp": "ab"}
    assert timed.meta["made_for"] == {"device": "b", "runtime": "eager", "dtype": "float32", "batch_size": 1}


def test_an_attention_whose_time_does_not_depend_on_its_width_leaves_as_a_whole(deit: Backbone):
    widths = measured_widths(deit)

    def seconds(module: Any, width: int) -> float:
        return float(width) if module.kind == "mlp" else 500.0 * bool(width)

    table = table_of_losses(
        deit, random_losses(deit), "ab", 0.9, DeviceProfile(content_of(deit, seconds, widths), deit, "")
    )
    attentions = {row[key] for row in table.rows for key in row if key.endswith("attn")}
    assert attentions == {0, 64}
    assert len({row["0.mlp"] for row in table.rows}) > 5


@settings(max_examples=30)
@given(RISING, RISING, st.integers(0, 99), st.floats(0.1, 1))
def test_widths_and_times_fall_with_every_row(attn, mlp, seed, ratio):
    profile = DeviceProfile(content_of(TINY, curves(attn, mlp), measured_widths(TINY)), TINY, "tiny")
    table = table_of_losses(TINY, random_losses(TINY, seed), "ab", ratio, profile)
    times = [profile.of(row) for row in table.rows]
    for before, after in itertools.pairwise(table.rows):
        assert sum(after.values()) < sum(before.values()) and all(after[key] <= before[key] for key in after)
    assert all(after <= before for before, after in itertools.pairwise(times))
    assert times[-1] <= (1 - ratio) * times[0] + 1e-9 or not any(table.widths(-1).values())


# ---------------------------------------------------------------------------------------------------------------------
# Programs


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of reparam.py --method best: random weights, contracted on random images."""
    folder = tmp_path_factory.mktemp("best")
    torch.manual_seed(0)
    images = torch.randn(32, 1, 16, 16)
    arguments = {key: value for key, value in tiny_digits_model().pretrained_cfg.items() if key == "architecture"}
    assert arguments == {"architecture": NAME}
    network = supernet.contract(tiny_digits_model(), images, dropout_ratio=0.9)
    save_contracted(network, folder, {}, with_table=True)
    return folder


@pytest.fixture(scope="module")
def profile_file(best: Path) -> Path:
    """Measured by the program."""
    path = best.parent / "device.json"
    run("supernet.profile", best, "--batch-size", 2, "--repeats", 3, "--device", "cpu", "--output", path)
    return path


def test_from_a_folder_to_a_table_for_this_device(best: Path, profile_file: Path, tmp_path: Path):
    content = json.loads(profile_file.read_text())
    assert content["model"] == NAME and content["batch_size"] == 2 and content["runtime"] == "eager"
    assert [entry["count"] for entry in content["modules"].values()] == [2, 2]
    for_macs, for_time = tmp_path / "macs.json", tmp_path / "time.json"
    run("supernet.retable", best, "--dropout-ratio", 0.9, "--output", for_macs)
    assert for_macs.read_bytes() == (best / "mask_table.json").read_bytes()
    run("supernet.retable", best, "--cost-of", profile_file, "--dropout-ratio", 0.5, "--output", for_time)
    table = MaskTable.load(for_time)
    assert table.meta["made_for"] == {key: content[key] for key in ("device", "runtime", "dtype", "batch_size")}
    net = supernet.load(best, mask_table=for_time)
    assert net.table == table and net.grade == "compensated"
    net.retable(net.profile(profile_file), 0.5)
    assert net.table == table
    net.cut(-1)


def test_reparam_makes_the_table_for_the_device_at_once(best: Path, profile_file: Path, tmp_path: Path):
    flags = ["--method", "best", "--mask-table", "--cost-of", profile_file, "--no-eval", "--proxy-samples", 32]
    run("reparam.py", *DIGITS, *flags, "--checkpoint", best, "--output-dir", tmp_path)
    table = MaskTable.load(tmp_path / "mask_table.json")
    assert table.meta["made_for"]["batch_size"] == 2
    again = tmp_path / "again.json"
    run("supernet.retable", tmp_path, "--cost-of", profile_file, "--output", again)
    assert MaskTable.load(again) == table


ATTN = "attn: 3 heads of 16 dims, D 48, 5 tokens"


def edited(change: Callable[[dict], object]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return edit


def times(**seconds: Any) -> Callable[[str], str]:
    """The file with other times of the attention: w4=2.0 is that of width 4; None takes it out."""

    def change(content: dict) -> None:
        found = content["modules"][ATTN]["seconds"]
        found |= {key.removeprefix("w"): value for key, value in seconds.items()}
        content["modules"][ATTN]["seconds"] = {key: value for key, value in found.items() if value is not None}

    return edited(change)


BAD: dict[str, tuple[Callable[[str], str], str]] = {
    "cut short": (lambda text: text[:-9], "is not valid JSON"),
    "something else": (lambda _: "[1]", "not a profile of format 1"),
    "another format": (edited(lambda c: c.update(format=2)), "not a profile of format 1"),
    "no rest": (edited(lambda c: c.pop("rest")), "rest is None, not a number of seconds"),
    "a batch in words": (edited(lambda c: c.update(batch_size="one")), "batch_size is 'one', not of type int"),
    "a batch of nothing": (edited(lambda c: c.update(batch_size=0)), "batch_size is 0, not 1 or more"),
    "no modules": (edited(lambda c: c["modules"].clear()), "0 modules of shape"),
    "another model": (edited(lambda c: c["modules"][ATTN].update(count=12)), "it has 12 modules of shape 'attn: 3"),
    "a list of times": (edited(lambda c: c["modules"][ATTN].update(seconds=[1])), "count or seconds are missing"),
    "no full width": (times(w16=None), f"{ATTN}: the time at the full width, 16, is missing"),
    "a width beyond": (times(w17=1.0), "'17' is not a width from 0 to 16"),
    "a width of 5,000 digits": (times(**{"w" + "9" * 5000: 1.0}), "is not a width from 0 to 16"),
    "a width in words": (times(wide=1.0), "'ide' is not a width from 0 to 16"),
    "times that fall": (times(w4=2.0), "less than width 4 (2 s); a smaller width must not take longer"),
    "a negative time": (times(w4=-0.1), "width 4 takes -0.1, which is not a number of seconds"),
    "not a number": (times(w4=float("nan")), "width 4 takes nan, which is not a number of seconds"),
    "a time in words": (times(w4="1 ms"), "width 4 takes '1 ms', which is not a number of seconds"),
    "a bypass that takes time": (times(w0=1e-3), "width 0 takes 0.001 s; it has to take nothing"),
    "no time at all": (times(w2=0, w4=0, w8=0, w12=0, w16=0), "width 16 takes 0 s; it has to take more than nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_profile(name: str, best: Path, profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    edit, said = BAD[name]
    path = tmp_path / "device.json"
    path.write_text(edit(profile_file.read_text()))
    before = snapshot(best)
    assert exit_code("supernet.retable", best, "--cost-of", path) == 2
    error = capsys.readouterr().err
    assert said in error and str(path) in error and len(error.splitlines()) == 1
    assert snapshot(best) == before


@pytest.mark.parametrize("program", ["supernet.retable", "reparam.py"])
def test_a_profile_of_another_model(program: str, best: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """As it was written for another model, whatever its times are."""
    path, before = tmp_path / "device.json", snapshot(best)
    DeviceProfile(content_of(TINY, module_seconds), TINY, "tiny").save(path)
    flags = [best] if program == "supernet.retable" else [*DIGITS, "--method", "best", "--mask-table"]
    flags += [] if program == "supernet.retable" else ["--checkpoint", best, "--output-dir", tmp_path / "out"]
    assert exit_code(program, *flags, "--cost-of", path) == 2
    error = capsys.readouterr().err
    assert f"{path}: measured on a, not on this {NAME}: it has" in error and len(error.splitlines()) == 1
    assert snapshot(best) == before and not (tmp_path / "out").exists()


def test_in_python_a_profile_of_another_model_is_refused_before_any_work(best: Path):
    network, other = supernet.load(best), DeviceProfile(content_of(TINY, module_seconds), TINY, "tiny")
    with pytest.raises(UserError, match="the profile is of another network, a:"):
        network.retable(other)
    images = iter([(torch.randn(2, 1, 16, 16), torch.zeros(2))])
    with pytest.raises(UserError, match="the profile is of another network, a:"):
        contract_network(network, images, method="best", dropout_ratio=0.5, profile=other)
    assert next(images)  # not even read


def test_latency_under_other_conditions_than_those_of_the_table(
    best: Path, profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """The table can still be used, so this is said and not refused."""
    for_time = tmp_path / "time.json"
    run("supernet.retable", best, "--cost-of", profile_file, "--dropout-ratio", 0.5, "--output", for_time)
    for number, batch_size in enumerate((2, 3)):
        flags = ["--mask-table", for_time, "--latency", "9s", "--batch-size", batch_size, "--device", "cpu"]
        run("export.py", best, *flags, "--output", tmp_path / str(number))
    content = json.loads(for_time.read_text())
    content["meta"]["made_for"] |= {"runtime": "other", "batch_size": 4}
    for_time.write_text(json.dumps(content))
    run("export.py", best, *flags, "--output", tmp_path / "other")
    first, second = [line for line in capsys.readouterr().out.splitlines() if "the mask table was made for" in line]
    assert "made for batch size 2, not for 3: python -m supernet.profile and" in first
    assert "made for batch size 4, not for 3, and for runtime other, not for eager: python" in second


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch-size", "64"], "the profile was made for batch size 2, not for 64"),
        (["--batch-size", "2", "--amp"], "for dtype float32, not for float32, autocast to bfloat16"),
    ],
)
def test_a_profile_of_another_batch_or_dtype(
    flags: list[str],
    said: str,
    best: Path,
    profile_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    arguments = ["--name", "a", "--checkpoint", best, "--data-set", "digits", "--cost-of", profile_file, *flags]
    monkeypatch.setattr(sys, "argv", ["devices.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match="2"):
        run_program(devices.main)
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def folder_without(best: Path, folder: Path, name: str) -> Path:
    for path in best.iterdir():
        if path.name != name:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_folder_without_the_losses_of_dims(best: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = folder_without(best, tmp_path, "dim_losses.safetensors")
    assert exit_code("supernet.retable", folder) == 2
    error = capsys.readouterr().err
    assert "dim_losses.safetensors does not exist" in error and "reparam.py --method best" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("stamp", "was made for other weights"),
        ("module", "0.attn is missing or of another kind"),
        ("cut", "cannot be read, it is damaged or cut short"),
    ],
)
def test_losses_of_something_else(change: str, said: str, best: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = folder_without(best, tmp_path, "")
    path = folder / "dim_losses.safetensors"
    tensors = supernet.opening.load_checkpoint(path)
    if change == "stamp":
        tensors["stamp"] += 1
    elif change == "module":
        del tensors["0.attn"]
    supernet.saving.save_file(tensors, path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    assert exit_code("supernet.retable", folder) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_flags_and_paths_that_do_not_fit(best: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    small = supernet.load(best)
    small.save(tmp_path / "small", small.cut(-1))
    cases = {
        ("reparam.py", "--method", "best", "--cost-of", "device.json"): "--cost-of says what --mask-table is made for",
        ("supernet.profile", "deit_smal_patch16_224"): "unknown model 'deit_smal_patch16_224'",
        ("supernet.profile", tmp_path / "none"): "none does not exist",
        ("supernet.profile", "deit_tiny_patch16_224", "--eval-ema"): "--eval-ema is for a checkpoint",
        ("supernet.profile", best, "--output", tmp_path): "is a folder: give a file, such as",
        ("supernet.profile", tmp_path / "small"): "small is a sub-network: give the whole network",
        ("supernet.retable", best, "--cost-of", tmp_path / "none.json"): "cannot read",
    }
    for command, said in cases.items():
        assert exit_code(*command) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The study


def test_the_study_compares_the_two_tables(
    best: Path, profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["--name", "tiny", "--checkpoint", best, "--data-set", "digits", "--val-images", 32, "--batch-size", 2]
    arguments += ["--repeats", 2, "--cost-of", profile_file, "--device", "cpu", "--shares", 0.6]
    monkeypatch.setattr(sys, "argv", ["devices.py", *map(str, arguments), "--output-dir", str(tmp_path)])
    devices.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["file"] == "devices_tiny.json" and len(last["loss_ratios"]) == 1 and len(last["error_of_share"]) == 2
    content = json.loads((tmp_path / "devices_tiny.json").read_text())
    own, rival = content["rows"]
    assert (own["made_for"], rival["made_for"]) == ("time", "MACs")
    (expected,) = content["expected"]
    assert 0 < expected["loss_ratio"] < 1.2 and expected["share"] == 0.6
    assert len(devices.markdown(content).splitlines()) == 3 + 4
    devices.main()  # what is there is not measured again
    assert json.loads((tmp_path / "devices_tiny.json").read_text())["rows"] == content["rows"]
