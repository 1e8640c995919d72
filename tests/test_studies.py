"""The parts of the studies: results files, cutting by zeros, token weights, variants of PIAD, alternatives, tables."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import PLAIN, SHAPE, batches, encoder_files, random_backbone, random_data, relative

import main as program
import reparam
import supernet
from models.backbone import full_widths, modules_of
from models.elastic import make_elastic
from models.extraction import extract
from models.macs import count_macs
from piad import importance
from piad.dropout_list import unit_sizes
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout
from studies import alternatives, choices, encoders, linear_probe, quantized, recipes, regimes, training, truncation
from studies.common import Results, run_entry_point, zero_dims
from studies.criteria import ClassTokenOnly, EqualTokens
from studies.regimes import CHOICES
from studies.two_widths import extract_parted, parted
from supernet import Network
from supernet.graphs import ONNX_PACKAGES
from utils import UserError
from wpac.statistics import TokenCollector, TokenMoments, collect_statistics


def test_results_are_saved_after_each_row_and_read_again(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "study.json"
    results = Results(path, machine="here")
    results.add("rows", {"method": "a", "draw": 0, "top1": 1.0})
    results.log()
    again = Results(path, machine="there")
    assert again.rows("rows", method="a", draw=0) == [{"method": "a", "draw": 0, "top1": 1.0}]
    assert again.rows("rows", method="a", draw=1) == again.rows("others") == []
    line = json.loads(path.with_suffix(".log").read_text())
    assert (line["rows"], line["machine"]) == (1, "here")
    assert "a  0  1.0" in capsys.readouterr().out


def test_a_log_contains_no_folder_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/study.py", "--data-path", "/data/mine/cifar10"])
    Results(tmp_path / "study.json").log()
    assert json.loads((tmp_path / "study.log").read_text())["run"] == "study.py --data-path cifar10"


def test_run_entry_point_sets_the_arguments():
    seen = []
    run_entry_point(lambda: seen.extend(sys.argv[1:]), "--epochs", 3)
    assert seen == ["--epochs", "3"]


@pytest.mark.parametrize("variant", ["plain", "no_qkv_bias"])
def test_zero_dims_gives_the_outputs_of_a_cut_network(variant: str):
    model, (images, _) = random_backbone(variant), random_data(2)
    widths = {key: width // 2 if key.endswith("attn") else width for key, width in full_widths(model).items()}
    assert relative(zero_dims(random_backbone(variant), qk=0.5, v=0.5)(images), extract(model, widths)(images)) < 1e-10
    assert relative(zero_dims(random_backbone(variant))(images), model(images)) == 0


def test_token_weights_of_the_truncation_study():
    model, (images, targets) = random_backbone(), random_data(4)

    def statistics_of(collector: type) -> TokenMoments:
        return collect_statistics(model, batches(images, targets, 3), token_collector=collector).tokens["0.attn"]

    weighted, equal, first = map(statistics_of, (TokenCollector, EqualTokens, ClassTokenOnly))
    assert equal.weight.unique().tolist() == [4 * 17]
    assert relative(equal.first, 4 * 17 * equal.mean) < 1e-12
    assert (first.weight > 0).all() and (first.weight < weighted.weight).all()
    alone = [
        collect_statistics(model, [(x[None], y[None])], token_collector=ClassTokenOnly)
        for x, y in zip(images, targets, strict=True)
    ]
    for statistics in alone:
        covariance = statistics.tokens["0.attn"].second
        assert torch.linalg.matrix_rank(covariance).unique().tolist() == [1]  # one token per image


def grown(model: torch.nn.Module) -> ProgressiveDropout:
    """PIAD after the only epoch in which its dropout list grows."""
    piad = ProgressiveDropout(make_elastic(model), [random_data(16)], ratio=0.5, epochs=1, seed=0, table=None)
    piad.begin_epoch(0)
    return piad


@pytest.mark.parametrize("choice", CHOICES)
def test_choices_change_piad_only_inside_their_context(choice: str):
    before, data = grown(random_backbone(patch_size=16)).table, random_data(16)
    with CHOICES[choice]() as flags:
        table = grown(random_backbone(patch_size=16)).table
        if choice == "all at once":
            assert flags == ["--progressive-epochs", "1"]
        elif choice == "without gamma":
            dims = importance.importance_of_dims(random_backbone(patch_size=16), [data])
            assert all(alpha.sum() == pytest.approx(1) for alpha in dims.values())
        elif choice == "sensitivity by accuracy":
            model = random_backbone(patch_size=16)
            found = importance.module_sensitivity(model, [data])
            wrong = [(m(data[0]).argmax(1) != data[1]).double().mean().item()
                     for m in (model, extract(model, full_widths(model) | {"0.mlp": 0}))]  # fmt: skip
            assert found.cost == pytest.approx(wrong[0])
            assert found.gamma["0.mlp"] == pytest.approx(max(0, wrong[1] - wrong[0]) / wrong[0])
        elif choice:
            attn, mlp = (int(word) for word in choice.split() if word.isdigit())
            sizes = unit_sizes(modules_of(random_backbone(patch_size=16)))
            assert (sizes["0.attn"], sizes["0.mlp"]) == (16 // attn, 192 // mlp)
    assert (table.rows == before.rows) == (choice in ("", "all at once"))
    assert grown(random_backbone(patch_size=16)).table.rows == before.rows


def test_narrower_gives_the_widest_model_within_the_macs():
    base = random_backbone()
    network = Network(base, MaskTable([full_widths(base)]), PLAIN, SHAPE, {}, "logits")
    model = alternatives.narrower(network, 0.5)
    assert count_macs(model) <= 0.5 * count_macs(base)
    wider = alternatives.create_backbone(PLAIN, **SHAPE | {"embed_dim": model.embed_dim + 3})
    assert count_macs(wider) > 0.5 * count_macs(base)
    assert (len(model.blocks), model.blocks[0].attn.num_heads) == (2, 3)


def test_prune_gives_a_plain_model_within_the_macs():
    pytest.importorskip("torch_pruning")
    base, data = random_backbone(dtype=torch.float32), random_data(8, dtype=torch.float32)
    model = alternatives.prune(base, [data], 0.5 * count_macs(base))
    assert 0.4 * count_macs(base) < count_macs(model) <= 0.5 * count_macs(base)
    assert model(data[0]).shape == (8, 7)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in base.parameters())


def test_tables_have_a_cell_for_each_size():
    rows = [{"regime": "piad", "weights": "contracted", "choice": "", "seed": seed, "epochs": 2,
             "top1": dict.fromkeys(regimes.SHARES, 50.0 + seed)} for seed in (0, 1)]  # fmt: skip
    text = regimes.markdown({"rows": rows})
    assert "| piad | contracted | 2 | 2 | 50.5 (50.0 to 51.0) |" in text
    sizes = [{"way": "alone", "size": size, "seed": 0, "epochs": 9, "top1": 40.0, "once": 0, "each": 90}
             for size in alternatives.SHARES]  # fmt: skip
    assert "| alone | 1 | 9 | 40.0 | 40.0 | 40.0 | 1,080 |" in alternatives.markdown({"rows": sizes})
    assert np.isclose(sum(alternatives.SHARES.values()), 1.5)


def test_two_widths_of_an_attention_leave_out_the_other_dims():
    model = random_backbone()
    full = full_widths(model)
    half = {key: width // 2 for key, width in full.items()}
    qk, v = parted(half, 0.5, full)
    assert qk["0.attn"] < half["0.attn"] < v["0.attn"] and qk["0.attn"] + v["0.attn"] == 2 * half["0.attn"]
    images = random_data(4)[0]
    expected = copy.deepcopy(model)
    for index, block in enumerate(expected.blocks):
        attn, heads = block.attn, block.attn.num_heads
        for parameter in (attn.qkv.weight, attn.qkv.bias):
            parts = parameter.data.unflatten(0, (3, heads, -1))
            parts[:2, :, qk[f"{index}.attn"] :], parts[2, :, v[f"{index}.attn"] :] = 0, 0
        block.mlp.fc2.weight.data[:, v[f"{index}.mlp"] :] = 0
    assert relative(extract_parted(model, qk, v)(images), expected(images)) < 1e-12
    assert relative(extract_parted(model, half, half)(images), extract(model, half)(images)) < 1e-12


POOLED = SHAPE | {"num_classes": 0, "class_token": False, "global_pool": "map"}


def test_the_study_of_encoders_measures_every_grade(tmp_path: Path, capsys: pytest.CaptureFixture):
    steps = ["--fit", 14, "--report", 6, "--steps", 2, 0, "--qk", 1, 0.5, "--parts", "attn", "mlp", "0-0"]
    files = encoder_files(tmp_path, 20)
    run_entry_point(encoders.main, "--name", "tiny", *files, *steps)
    results = json.loads((tmp_path / "encoders_tiny.json").read_text())
    rows, apart = results["rows"], results["two_widths"]
    assert [(row["size"], row["steps"]) for row in rows] == [
        (size, steps) for steps in (None, 2, 0) for size in ("0.5", "0.25", "mild")
    ]
    assert all(-1 <= row["features"] <= 1 and 0 <= row["iou"] <= 1 for row in rows)
    assert rows[2]["patch"] > rows[0]["patch"] > rows[1]["patch"]  # less is cut: nearer
    parts = {row["part"]: row for row in results["parts"] if row["size"] == "0.5"}
    assert parts.keys() == {"attn", "mlp", "0-0"} and all(row["patch"] > rows[0]["patch"] for row in parts.values())
    missing = [1 - parts[kind]["macs_share"] for kind in ("attn", "mlp")]
    assert sum(missing) == pytest.approx(1 - rows[0]["macs_share"])
    assert apart[0]["share"] == 1 and apart[0]["patch"] == pytest.approx(rows[0]["patch"], abs=1e-6)
    assert "| compensated |" in capsys.readouterr().out and (tmp_path / "encoders_tiny.png").exists()
    # A super-network that is trained from it at a rate of nearly zero: the whole network gives what the encoder gives.
    words = ["--data-set", "images", "--data-path", tmp_path / "photos", "--batch-size", 8, "--workers", 0]
    words += ["--device", "cpu"]
    kwargs = files[files.index("--model") :]
    run_entry_point(reparam.main, *words, *kwargs, "--checkpoint", tmp_path / "encoder.safetensors", "--method", "best",
                    "--mask-table", "--no-eval", "--output-dir", tmp_path / "best")  # fmt: skip
    teach = ["--teacher-model", "self", "--distillation-type", "soft", "--distillation-alpha", 1, "--ema-decay", 0.5]
    teach += ["--progressive-epochs", 0, "--lr", 1e-9, "--min-lr", 1e-9]
    run_entry_point(program.main, *words, "--stage", "piad", "--checkpoint", tmp_path / "best", *teach, "--epochs", 1,
                    "--output-dir", tmp_path / "trained")  # fmt: skip
    run_entry_point(encoders.main, "--name", "tiny", *files, *steps, "--trained", tmp_path / "trained")
    trained = json.loads((tmp_path / "encoders_tiny.json").read_text())["trained"]
    assert [row["size"] for row in trained] == ["1", "0.5", "0.25"] and trained[0]["patch"] > 0.9999 > trained[1][
        "patch"
    ]
    # Random weights, no head, and a model that pools its tokens by attention.
    pooled = ["--model", PLAIN, "--model-kwargs", *(f"{key}={value}" for key, value in POOLED.items())]
    files = ["--photos", tmp_path / "photos", "--output-dir", tmp_path, *pooled, "--target", "features"]
    run_entry_point(encoders.main, "--name", "random", *files, "--fit", 14, "--report", 6, "--steps", 0)
    results = json.loads((tmp_path / "encoders_random.json").read_text())
    assert results["target"] == "features" and results["largest_change"] < 1e-4
    assert all("iou" not in row and -1 <= row["patch"] <= 1 for row in results["rows"])
    assert "| MACs | sub-network | features | patch | seconds |" in capsys.readouterr().out


@pytest.fixture(scope="module")
def contracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny super-network for digits, as reparam.py --method best --mask-table writes it."""
    folder = tmp_path_factory.mktemp("contracted")
    model = alternatives.create_backbone(PLAIN, **TINY, num_classes=10)
    save_file(model.state_dict(), folder / "plain.safetensors")
    run_entry_point(
        reparam.main, "--method", "best", "--mask-table", "--no-eval", "--dropout-ratio", 0.8, *DIGITS, *MODEL,
        "--crop-pct", 1, "--checkpoint", folder / "plain.safetensors", "--output-dir", folder / "best",
    )  # fmt: skip
    return folder / "best"


TINY = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
MODEL = ["--model", PLAIN, "--model-kwargs", *(f"{key}={value}" for key, value in TINY.items())]
DIGITS = ["--data-set", "digits", "--batch-size", 256, "--workers", 0, "--device", "cpu", "--proxy-samples", 64]


def test_ways_to_spend_a_budget_are_measured_once(contracted: Path, tmp_path: Path):
    ways = ["untrained", "refitted", "paper", "best", "one size, no labels"]
    words = ["--name", "tiny", *DIGITS, "--crop-pct", 1, "--checkpoint", contracted.parent / "plain.safetensors"]
    words += [*MODEL, "--epochs", 1, "--points", 1, "--draws", 0, "--shares", 0.5, 1.0, "--lr", 0.01, "--ways", *ways]
    words += ["--dropout-ratio", 0.8, "--output-dir", tmp_path]
    words += ["--", "--aa", "none", "--reprob", 0, "--mixup", 0, "--cutmix", 0, "--repeated-aug", 0, "--ema-decay", 0.5]
    for _ in range(2):  # the second time everything is there
        run_entry_point(training.main, *words)
        content = json.loads((tmp_path / "training_tiny.json").read_text())
        assert [(row["way"], row["epoch"]) for row in content["rows"]] == [
            (way, int(way not in ways[:2])) for way in ways
        ]
    assert (tmp_path / "training_tiny.png").exists()
    by_way = {row["way"]: row["top1"] for row in content["rows"]}
    assert by_way["untrained"]["1"] == by_way["refitted"]["1"]
    lines = training.markdown(content).splitlines()
    images = [content["images"], 12 * content["images"]]
    for way, trained in zip(ways[3:], images, strict=True):
        assert next(line for line in lines if line.startswith(f"| {way} |")).endswith(f" {trained:,} |")


@pytest.mark.parametrize("labels", [True, False])
def test_recipes_are_trained_once(labels: bool, contracted: Path, tmp_path: Path):
    names = [
        "base",
        "cut",
        "whole, smallest and one between",
        "PIAD's table, growing",
        "two passes",
        "with the features",
        "Mixup 0.2",
        "tokens of four blocks, 4",
        "three sizes on each image",
        "embedding frozen",
    ]
    epochs = 4 if labels else 2  # with 4, a table grows after the first step
    words = ["--name", "tiny", *DIGITS, "--checkpoint", contracted, "--draws", 0, "--shares", 0.5, 1.0]
    words += ["--epochs", epochs, "--dropout-ratio", 0.8, "--output-dir", tmp_path, "--recipes", *names]
    words += [] if labels else ["--no-labels"]
    words += ["--", "--aa", "none", "--reprob", 0, "--mixup", 0, "--cutmix", 0, "--repeated-aug", 0, "--ema-decay", 0.5]
    for _ in range(2):  # the second time everything is there
        run_entry_point(recipes.main, *words)
        content = json.loads((tmp_path / "recipes_tiny.json").read_text())
        assert [row["recipe"] for row in content["rows"]] == names
    found = {row["recipe"]: row["averaged"]["kl"]["0.5"] for row in content["rows"]}
    assert len(set(found.values())) == len(names)
    assert all(row["labels"] == labels for row in content["rows"])
    assert f"| two passes | 1 | {content['rows'][4]['averaged']['top1']['0.5']:.1f} |" in recipes.markdown(content)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ONNX_PACKAGES), reason="needs requirements-export.txt"
)
def test_float32_and_int8_are_compared_and_timed_once(contracted: Path, tmp_path: Path):
    words = [
        "--name",
        "tiny",
        "--checkpoint",
        contracted,
        "--data-set",
        "digits",
        "--val-images",
        64,
        "--calibration",
        32,
    ]
    words += ["--sizes", 3, "--batch-sizes", 1, 4, "--repeats", 2, "--threads", 1, "--output-dir", tmp_path]
    for _ in range(2):  # the second time everything is there
        run_entry_point(quantized.main, *words)
        content = json.loads((tmp_path / "quantized_tiny.json").read_text())
        codes = list(dict.fromkeys(row["op_code"] for row in content["sizes"]))
        assert len(codes) == 3 and codes[0] == 0
        files = [(code, dtype) for code in codes for dtype in ("float32", "int8")]
        assert [(row["op_code"], row["dtype"]) for row in content["sizes"]] == files
        assert [(row["op_code"], row["dtype"]) for row in content["times"]] == 2 * files
    whole, whole_int8, *_ = content["sizes"]
    assert whole["kl"] < 1e-9 and whole["agreement"] == 100  # the file against the model
    assert 1e-8 < whole_int8["kl"] < 0.1 and whole_int8["bytes"] < whole["bytes"]
    assert (tmp_path / "quantized_tiny.png").stat().st_size > 10_000
    lines = quantized.markdown(content).splitlines()
    assert len(lines) == 2 + 6 + 1 + 2 + 2 * 3


def test_the_best_file_within_a_time_is_the_nearest_one():
    rows = [{"milliseconds": time, "kl": kl} for time, kl in ((3.0, 0.1), (2.0, 0.3), (1.5, 0.2), (1.0, 0.9))]
    assert quantized.best_within(rows, 2.5) == {"milliseconds": 1.5, "kl": 0.2}
    assert quantized.best_within(rows, 0.9) is None
    assert (
        quantized.best_within([{"milliseconds": 1.0, "token_cosine": c} for c in (0.7, 0.9)], 1)["token_cosine"] == 0.9
    )


def test_log_law_draws_small_networks_as_often_as_large_ones(contracted: Path):
    network = supernet.load(contracted)
    drawn = {}
    for law in ("log-macs", "uniform"):
        codes = choices.Codes(network, choices.Recipe(law=law), None, 1, 0.8, seed=0)
        codes.begin_epoch(0)
        macs = [count_macs(network.model, codes.draw(step)[0]) / network.macs() for step in range(400)]
        drawn[law] = np.log(macs)
    middle = np.log(codes.shares[-1]) / 2
    assert (drawn["log-macs"] < middle).mean() == pytest.approx(0.5, abs=0.08)
    assert codes.shares[-1] == pytest.approx(np.exp(drawn["log-macs"].min()), rel=0.1)


def test_a_sandwich_costs_as_much_as_single_networks(contracted: Path):
    network = supernet.load(contracted)
    spent = {}
    for sandwich in (False, True):
        codes = choices.Codes(network, choices.Recipe(sandwich=sandwich), None, 1, 0.8, seed=0)
        codes.begin_epoch(0)
        steps = [codes.draw(step) for step in range(300)]
        spent[sandwich] = sum(count_macs(network.model, widths) for widths in itertools.chain(*steps))
    assert {len(widths) for widths in steps} == {0, 3}
    assert spent[True] == pytest.approx(spent[False], rel=0.03)


def test_a_linear_probe_is_a_classifier_of_the_same_encoder(contracted: Path, tmp_path: Path, capsys):
    weights = load_file(contracted.parent / "plain.safetensors")
    encoder = {name: value for name, value in weights.items() if not name.startswith("head.")}
    save_file(encoder, tmp_path / "encoder.safetensors")
    words = [*DIGITS, *MODEL, "num_classes=0", "--crop-pct", 1, "--checkpoint", tmp_path / "encoder.safetensors"]
    run_entry_point(
        linear_probe.main, *words, "--output", tmp_path / "probe.safetensors", "--val-images", 200, "--strength", 1
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    probe = load_file(tmp_path / "probe.safetensors")
    assert all(torch.equal(probe[name], value) for name, value in encoder.items())
    assert found["val_images"] == 200 and found["top1"] > 30  # by chance: 10
    words = [*DIGITS, "--checkpoint", tmp_path / "probe.safetensors", "--val-images", 200, "--name", "probe"]
    run_entry_point(truncation.main, *words, "--draws", 0, "--parts", "cost", "--output-dir", tmp_path)
    content = json.loads((tmp_path / "truncation_probe.json").read_text())
    assert content["whole"][0]["top1"] > 30 and len(content["rows"]) == 9
    (tmp_path / "photos").mkdir()
    for index in range(4):
        Image.new("L", (8, 8), index).save(tmp_path / "photos" / f"{index}.png")
    photos = ["--data-set", "images", "--data-path", tmp_path / "photos"]
    for more, says in (
        (["--output", tmp_path / "other.safetensors"], r"has a head of 10 classes: give an encoder"),
        (["--output", tmp_path / "other.pth"], r"other\.pth is not a \.safetensors file"),
        ([*photos, "--output", tmp_path / "other.safetensors"], r"has no labels, which a linear probe needs"),
    ):
        with pytest.raises(UserError, match=says):
            run_entry_point(linear_probe.main, *words[:-2], *more)
