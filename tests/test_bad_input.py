"""Bad input: what is typed, and what the one line must say. Exit code 2, and the output folder left as it was."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from programs import (
    CLASSES,
    COMMON,
    DIGITS,
    MODEL,
    NAME,
    PIAD,
    PROXY,
    TRAIN,
    Road,
    call,
    exit_code,
    snapshot,
    tiny_digits_model,
    walk_the_road,
)
from safetensors.torch import save_file

from files import load_checkpoint
from models.macs import count_macs, count_params
from piad.mask_table import MaskTable
from supernet.amounts import format_amount

# The programs as they work; a case appends what is wrong (of two equal flags the last one counts).
EVAL = ("main.py", "--eval", *COMMON, "--checkpoint", "{super_network}")
FOLDER = ("main.py", "--eval", *DIGITS, "--sub-network")
REPARAM = ("reparam.py", *COMMON, *PROXY, "--checkpoint", "{pretrained}")
TRAIN_PIAD = ("main.py", *PIAD, "--epochs", "1", "--checkpoint", "{contracted}")
FINETUNE = ("main.py", "--stage", "finetune", *COMMON, *TRAIN, "--epochs", "1", "--checkpoint", "{super_network}")
PRETRAIN = ("main.py", "--stage", "pretrain", *COMMON, *TRAIN, "--epochs", "1")
FLOWERS = ("--data-set", "folder", "--batch-size", "2", "--data-path")


@dataclass(frozen=True)
class Case:
    """command: program and arguments, with {names} of the files below; says: parts of the one line."""

    name: str
    command: tuple[str, ...]
    says: tuple[str, ...]


def case(name: str, command: tuple[str, ...], *says: str) -> Case:
    return Case(name, command, says)


MODELS = [
    case("a misspelt model", (*PRETRAIN, "--model", "deit_smal_patch16_224"),
         "unknown model 'deit_smal_patch16_224'", "deit_small_patch16_224"),
    case("one of the authors' names, misspelt", (*PRETRAIN, "--model", "vit_bas"),
         "unknown model 'vit_bas'", "vit_base"),
    case("a convolutional network", (*PRETRAIN, "--model", "resnet18", "--model-kwargs"),
         "resnet18 is not supported (it is a ResNet); these are: vit_*"),
    case("a model of no family", (*PRETRAIN, "--model", "volo_d1_224", "--model-kwargs"),
         "volo_d1_224 is not supported (it is a VOLO); these are: vit_*"),
    case("a norm behind the attention", (*PRETRAIN, *MODEL, "scale_attn_norm=True"),
         f"{NAME} is not supported (block 0 has a norm on the outputs of its attention)"),
    case("an argument that timm does not know", (*PRETRAIN, *MODEL, "dephts=3"), "timm could not make", "dephts"),
    case("heads that do not divide D", (*PRETRAIN, *MODEL, "num_heads=5"), "timm could not make", "num_heads"),
]  # fmt: skip

CHECKPOINTS = [
    *(
        case(f"{what}: no checkpoint there", (*command, "--checkpoint", "{folder}/none.pth"), "none.pth does not exist")
        for what, command in {"evaluation": EVAL, "WPAC": REPARAM, "PIAD": TRAIN_PIAD, "fine-tuning": FINETUNE}.items()
    ),
    case("evaluation without a checkpoint", EVAL[:-2], "--checkpoint is missing"),
    case("refitting nothing", (*REPARAM, "--no-eval", "--refit"), "--refit", "leave --no-eval out"),
    case("WPAC without weights", REPARAM[:-2], "no weights to contract", "--checkpoint FILE", "--pretrained"),
    case("PIAD without a checkpoint", TRAIN_PIAD[:-2], "--checkpoint is missing", "contracted weights"),
    case("fine-tuning without a checkpoint", (*FINETUNE[:-2], "--op-code", "0"), "--checkpoint is missing"),
    case("a .pth cut short", (*EVAL, "--checkpoint", "{cut_short}", "--mask-table", "{mask_table}"),
         "cut_short.pth", "damaged"),
    case("an empty .pth", (*EVAL, "--checkpoint", "{empty}", "--mask-table", "{mask_table}"), "empty.pth", "damaged"),
    case("a .safetensors cut short", (*TRAIN_PIAD, "--checkpoint", "{cut_short_safetensors}"),
         "cut_short.safetensors", "damaged"),
    case("a .safetensors whose header lies", (*TRAIN_PIAD, "--checkpoint", "{lying}"), "lying.safetensors", "damaged"),
    case("a text file", (*TRAIN_PIAD, "--checkpoint", "{text}"), "text.pth", "damaged"),
    case("a list", (*TRAIN_PIAD, "--checkpoint", "{a_list}"), "a_list.pth holds a list"),
    case("no weights", (*TRAIN_PIAD, "--checkpoint", "{no_weights}"), "no_weights.pth holds no weights"),
    case("pickled objects", (*TRAIN_PIAD, "--checkpoint", "{pickled}"), "pickled.pth", "refused"),
    case("pickled objects in PIAD's checkpoint", (*EVAL, "--checkpoint", "{pickled}", "--mask-table", "{mask_table}"),
         "pickled.pth", "refused"),
    case("a pickled function in weights to contract", (*REPARAM, "--checkpoint", "{pickled_old}"),
         "pickled_old.pth", "refused"),
    case("weights of another D", (*TRAIN_PIAD, "--checkpoint", "{wide}"),
         "wide.safetensors is of another architecture", "cls_token is (1, 1, 96) there, (1, 1, 48) in the model"),
    case("weights of more blocks", (*TRAIN_PIAD, "--checkpoint", "{deep}"),
         "another architecture", "blocks.2.", "there, absent in the model"),
    case("weights of fewer blocks", (*TRAIN_PIAD, *MODEL, "depth=3", "--checkpoint", "{seven}"),
         "another architecture", "blocks.2.norm1.weight is absent there, (48,) in the model"),
    case("weights of colour images", (*REPARAM, "--checkpoint", "{colour}"),
         "patch_embed.proj.weight is (48, 3, 8, 8) there, (48, 1, 8, 8) in the model"),
    case("evaluation with another head", (*EVAL, "--checkpoint", "{seven}", "--mask-table", "{unstamped}"),
         "the model has 7 classes, the data has 10"),
    case("WPAC with another head", (*REPARAM, "--checkpoint", "{seven}"), "the model has 7 classes, the data has 10"),
    case("PIAD with another head", (*TRAIN_PIAD, "--checkpoint", "{seven}"), "7 classes, the data has 10"),
    case("averaged weights that are not there", (*EVAL, "--eval-ema", "--checkpoint", "{seven}",
         "--mask-table", "{unstamped}"), "seven.safetensors holds no averaged weights", "--eval-ema"),
    case("nothing to compare with", (*EVAL, "--compare", "{folder}/none"), "none/frontier.json"),
    case("a baseline that is not there", (*EVAL, "--baseline", "{folder}/none.pth"), "none.pth does not exist"),
    case("a run to resume that is not there", (*TRAIN_PIAD, "--resume", "{folder}/none.pth"),
         "none.pth does not exist"),
    case("weights that are no run to resume", (*TRAIN_PIAD, "--resume", "{contracted}"),
         "contracted.safetensors holds no training run to resume"),
    case("a run with other settings", (*TRAIN_PIAD, "--resume", "{super_network}", "--lr", "3e-3"),
         "checkpoint_1.pth is of a run with"),
]  # fmt: skip

DATA = [
    case("a folder data set without a path", (*EVAL, *FLOWERS[:-1]), "--data-path is missing"),
    case("a path that is not there", (*EVAL, *FLOWERS, "{folder}/nowhere"), "nowhere does not exist"),
    case("a path without train/", (*TRAIN_PIAD, *FLOWERS, "{folder}/bare"), "bare has no folder train"),
    case("a path without val/", (*EVAL, *FLOWERS, "{folder}/bare"), "bare has no folder val"),
    case("an empty train/", (*REPARAM, *FLOWERS, "{folder}/hollow"), "hollow/train is empty"),
    case("a class folder without images", (*EVAL, *FLOWERS, "{folder}/sparse"),
         "class folder", "sparse/val/tulip holds no image"),
    case("train/ and val/ of other classes", (*TRAIN_PIAD, *FLOWERS, "{folder}/torn"),
         "train/ and val/ differ in their classes: daisy"),
    case("an unreadable image in evaluation", (*EVAL, *FLOWERS, "{folder}/broken", "--checkpoint", "{two}",
         "--mask-table", "{unstamped}"), "cannot read image", "broken/val/tulip/1.png"),
    case("an unreadable image, met by a loading process", (*EVAL, *FLOWERS, "{folder}/broken", "--workers", "2",
         "--checkpoint", "{two}", "--mask-table", "{unstamped}"), "cannot read image", "broken/val/tulip/1.png"),
    case("an unreadable image in WPAC", (*REPARAM, *FLOWERS, "{folder}/broken", "--checkpoint", "{two}",
         "--proxy-samples", "4"), "cannot read image", "broken/val/tulip/1.png"),
    case("a data set of timm's that is not there", (*EVAL, "--data-set", "torch/cifar10", "--data-path",
         "{folder}/nowhere"), "--data-set torch/cifar10: timm cannot open it at", "nowhere"),
    case("a misspelt data set", (*EVAL, "--data-set", "imagnet"), "--data-set imagnet", "did you mean imagenet"),
    case("an image beside the class folders", (*REPARAM, *FLOWERS, "{folder}/stray"),
         "stray/train/overview.png lies beside the class folders"),
    case("ImageNet's val/ as it is downloaded", (*EVAL, *FLOWERS, "{folder}/flat"),
         "flat/val holds images such as 0.png, but no class folder", "valprep.sh"),
    case("an index that is a file", (*EVAL, *FLOWERS, "{folder}/broken", "--index", "{folder}/flat/val/0.png"),
         "--index", "flat/val/0.png is a file"),
    case("a batch larger than the data", (*TRAIN_PIAD, "--batch-size", "1438"), "--batch-size 1438 is more than"),
    case("Mixup on an odd batch", (*TRAIN_PIAD, "--batch-size", "33"), "--batch-size 33 is odd", "--mixup 0"),
]  # fmt: skip

TABLES = [
    case("no table beside the checkpoint", (*EVAL, "--checkpoint", "{alone}"), "mask_table.json does not exist"),
    case("no table there", (*EVAL, "--mask-table", "{folder}/none.json"), "none.json does not exist"),
    *(
        case(f"a table that is {name}", (*EVAL, "--mask-table", f"{{folder}}/{name}.json"), *says)
        for name, says in {
            "no_json": ("no_json.json is not valid JSON",),
            "a_list": ("a_list.json: mask table: ", "found a list"),
            "hollow": ("hollow.json: mask table is empty",),
            "of_other_words": ("of_other_words.json: mask table: '0.attention' is not a module",),
            "without_columns": ("without_columns.json: mask table: 0.attn is not an object",),
            "gappy": ("gappy.json: mask table: op code 1 is missing",),
            "uneven": ("uneven.json: mask table: 1.mlp does not have the same op codes",),
            "of_fractions": ("of_fractions.json: mask table: 0.attn has width 1.5 at op code 1", "whole number"),
            "of_texts": ("of_texts.json: mask table: 0.attn has width '8' at op code 1", "whole number"),
            "negative": ("negative.json: mask table: 1.attn has width -1 at op code 1",),
            "growing": ("growing.json: mask table: 1.attn grows from 16 to 17 at op code 1",),
            "deeper": ("covers 3 blocks", "has 2", "2.attn is not in the model"),
            "shallower": ("covers 1 blocks", "has 2", "1.attn is missing from the table"),
            "too_wide": ("0.mlp has width 193 at op code 0", "has 192"),
            "too_narrow": ("0.mlp has width 191 at op code 0", "has 192"),
        }.items()
    ),
    case("a growing table in fine-tuning", (*FINETUNE, "--op-code", "1", "--mask-table", "{folder}/growing.json"),
         "1.attn grows from 16 to 17 at op code 1"),
    case("an op code that is not in the table", (*EVAL, "--op-code", "0", "99999"),
         "op code 99999 is not in the mask table, which has 0.."),
    case("a negative op code", (*EVAL, "--op-code", "-2"), "op code -2 is not in the mask table"),
    case("an op code to fine-tune that is not in the table", (*FINETUNE, "--op-code", "99999"), "op code 99999"),
]  # fmt: skip

SMALLEST = ("the smallest, op code {last}, has {smallest_macs} MACs (linear) and {smallest_params} parameters",)
SIZES = [
    case("too few MACs", (*EVAL, "--macs", "1K"), "no sub-network has at most 1K MACs", *SMALLEST),
    case("too few parameters", (*EVAL, "--params", "12"), "no sub-network has at most 12 parameters", *SMALLEST),
    case("too small a share", (*EVAL, "--macs-ratio", "0.001"), "no sub-network has at most", *SMALLEST),
    case("too few MACs to fine-tune", (*FINETUNE, "--macs", "1K"), "no sub-network has at most 1K MACs", *SMALLEST),
    case("too few MACs as they are counted in full", (*EVAL, "--macs", "1K", "--macs-convention", "full"),
         "no sub-network has at most 1K MACs", "MACs (full)"),
    case("too little memory", (*EVAL, "--memory", "1KB"), "no sub-network has at most 1 KB of weights", "the smallest"),
    case("a latency that no size meets", (*EVAL, "--latency", "0.001us"),
         "no sub-network takes at most 1e-06 ms (256G images/s) for 256 images on", "the fastest, op code"),
    case("a throughput that no size meets", (*EVAL, "--throughput", "1000G"), "no sub-network takes at most"),
    case("several sizes and several budgets", (*EVAL, "--macs", "100K", "50K", "--params", "20K"),
         "--macs has 2 values beside --params", "give --macs one value"),
    *(case(f"a share of {share}", (*EVAL, f"--macs-ratio={share}"), f"--macs-ratio {share}")
      for share in ("0.0", "1.5", "-0.5", "nan")),
    case("fine-tuning at no size", FINETUNE, "--op-code", "--macs-ratio", "--params"),
    case("fine-tuning at two sizes", (*FINETUNE, "--op-code", "0", "1"), "one size"),
]  # fmt: skip

IGNORED = [
    case("crops of no area", (*PRETRAIN, *MODEL, "--scale", "0", "0"), "--scale 0 0: give two numbers above 0"),
    case("aspect ratios of zero", (*PRETRAIN, *MODEL, "--ratio", "0", "1"), "--ratio 0 1: give two numbers above 0"),
    case("the larger share first", (*PRETRAIN, *MODEL, "--scale", "0.9", "0.5"), "--scale 0.9 0.5", "larger one last"),
    case("a compiler that is not known", (*PRETRAIN, *MODEL, "--torchcompile", "fast"), "--torchcompile fast is not",
         "inductor"),
    case("several sizes of a size", (*FINETUNE, "--op-code", "0", "--sizes-per-step", "2"),
         "--sizes-per-step 2 is for --stage piad, not finetune"),
    case("op codes before there are any", (*PRETRAIN, *MODEL, "--op-code-per-rank"),
         "--op-code-per-rank is for --stage piad, not pretrain"),
    case("a teacher's share without a teacher", (*TRAIN_PIAD, "--distillation-alpha", "1"),
         "--distillation-alpha 1.0 is for a teacher: give --distillation-type"),
    case("a temperature of a class", (*TRAIN_PIAD, "--teacher-model", "self", "--distillation-type", "hard",
         "--distillation-tau", "2"), "--distillation-tau 2 is for --distillation-type soft"),
]  # fmt: skip

PLACES = [
    *(case(f"CUDA that is not there: {command[0]}", (*command, "--device", "cuda"), "--device cuda", "--device cpu")
      for command in (EVAL, REPARAM)),
    case("an unknown device", (*EVAL, "--device", "toaster"), "--device toaster"),
    case("a time without its unit", (*EVAL, "--latency", "5"), "--latency: '5' is not a time such as 5ms or 0.2s"),
    case("an unknown flag", (*EVAL, "--latencies", "5ms"), "unrecognized arguments: --latencies"),
    case("a file for an output folder", (*EVAL, "--output-dir", "{text}"), "--output-dir", "text.pth"),
]  # fmt: skip

FOLDERS = [
    case(
        "a folder without a network",
        (*EVAL, "--checkpoint", "{folder}"),
        "is not a super-network, which has mask_table",
    ),
    case(
        "a budget for one size",
        (*FOLDER, "{peeled}", "--latency", "5ms"),
        "has one size: leave --op-code, budgets and tables out",
    ),
    case("a latency table for one size", (*FOLDER, "{peeled}", "--latency-table", "measure.csv"), "and tables out"),
    case("no sub-network there", (*FOLDER, "{folder}/none"), "none does not exist: give weights, or the folder"),
    *(
        case(f"a sub-network that is {name}", (*FOLDER, f"{{folder}}/{name}"), *says)
        for name, says in {
            "no_json": ("no_json/config.json is not valid JSON",),
            "a_list": ("a_list/config.json does not say of which model it is",),
            "nameless": ("nameless/config.json: model is missing",),
            "without_weights": ("without_weights/model.safetensors does not exist",),
            "cut_short": ("cut_short/model.safetensors", "damaged"),
            "of_fractions": ("of_fractions/config.json: widths: 0.attn is 1.5",),
            "otherwise_wide": ("otherwise_wide/model.safetensors is of another architecture", "there", "in the model"),
            "astronomic": ("0.mlp is 1000000000000, outside 0..192",),
            "lacking_a_module": ("module 1.attn is missing",),
            "of_no_size": ("of_no_size/config.json: ", "input_size"),
            "of_odd_colours": ("of_odd_colours/config.json: ", "mean"),
            "of_no_spread": ("of_no_spread/config.json: ", "std"),
            "cropped_away": ("cropped_away/config.json: ", "crop_pct"),
            "oddly_resized": ("oddly_resized/config.json: ", "interpolation"),
            "reaching_out": ("reaching_out/config.json: model_kwargs: checkpoint_path does not shape",),
            "bottomless": ("bottomless/config.json: model_kwargs: depth is 1000000",),
        }.items()
    ),
]

CASES = [*MODELS, *CHECKPOINTS, *DATA, *TABLES, *SIZES, *IGNORED, *PLACES, *FOLDERS]


class Touch:
    """Unpickled, it makes a file: what a checkpoint must not be able to do."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def random_weights(**more: Any) -> dict[str, torch.Tensor]:
    return tiny_digits_model(**more).state_dict()


def make_checkpoints(folder: Path, road: Road) -> dict[str, Path]:
    found = {}
    for name, more in {
        "wide": {"embed_dim": 96},
        "deep": {"depth": 3},
        "colour": {"in_chans": 3},
        "seven": {"num_classes": 7},
        "two": {"num_classes": 2},
    }.items():
        found[name] = folder / f"{name}.safetensors"
        save_file(random_weights(**more), found[name])
    whole, contracted = road.super_network.read_bytes(), road.contracted.read_bytes()
    for name, content in {
        "cut_short.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "cut_short.safetensors": contracted[: len(contracted) // 2],
        "lying.safetensors": (2**40).to_bytes(8, "little") + contracted[8:],
        "text.pth": b"not weights\n",
    }.items():
        (folder / name).write_bytes(content)
    found |= {name: folder / f"{name}.pth" for name in ("cut_short", "empty", "text")}
    found |= {"cut_short_safetensors": folder / "cut_short.safetensors", "lying": folder / "lying.safetensors"}
    for name, state, new in (
        ("a_list", [torch.zeros(3)], True),
        ("no_weights", {"epoch": 3}, True),
        ("pickled", {**load_checkpoint(road.super_network), "note": Touch(folder / "executed")}, True),
        ("pickled_old", {"model": random_weights(), "note": Touch(folder / "executed")}, False),
    ):
        found[name] = folder / f"{name}.pth"
        torch.save(state, found[name], _use_new_zipfile_serialization=new)
    return found


def make_tables(folder: Path, road: Road) -> None:
    full = {"0.attn": 16, "0.mlp": 192, "1.attn": 16, "1.mlp": 192}

    def table(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        return {key: {"0": first[key], "1": second[key], "-1": second[key]} for key in first}

    for name, content in {
        "a_list": [1, 2],
        "hollow": {},
        "of_other_words": {"0.attention": {"0": 16}},
        "without_columns": {"0.attn": 16},
        "gappy": {key: {"0": width, "2": width, "-1": width} for key, width in full.items()},
        "uneven": table(full, full) | {"1.mlp": {"0": 192, "-1": 192}},
        "of_fractions": table(full, full | {"0.attn": 1.5}),
        "of_texts": table(full, full | {"0.attn": "8"}),
        "deeper": table(full | {"2.attn": 16, "2.mlp": 192}, full | {"2.attn": 16, "2.mlp": 192}),
        "shallower": table(*2 * [{key: full[key] for key in ("0.attn", "0.mlp")}]),
        "too_wide": table(full | {"0.mlp": 193}, full),
        "too_narrow": table(full | {"0.mlp": 191}, full | {"0.mlp": 191}),
        "negative": table(full, full | {"1.attn": -1}),
        "growing": table(full, full | {"1.attn": 17}),
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "no_json.json").write_text(road.mask_table.read_text()[:-20])


def make_image_folders(folder: Path) -> None:
    for name in ("bare", "hollow", "sparse", "torn", "broken", "stray", "flat"):
        for split in ("train", "val"):
            for label in ("rose", "tulip"):
                place = folder / name / split / label
                place.mkdir(parents=True)
                for number in range(2):
                    Image.new("L", (16, 16), 60 * number).save(place / f"{number}.png")
    shutil.rmtree(folder / "bare")
    (folder / "bare").mkdir()
    shutil.rmtree(folder / "hollow" / "train")
    (folder / "hollow" / "train").mkdir()
    for image in (folder / "sparse" / "val" / "tulip").iterdir():
        image.unlink()
    (folder / "torn" / "val" / "tulip").rename(folder / "torn" / "val" / "daisy")
    (folder / "broken" / "val" / "tulip" / "1.png").write_bytes(b"no picture")
    shutil.copy(folder / "stray/train/rose/0.png", folder / "stray/train/overview.png")
    shutil.move(folder / "flat/val/rose/0.png", folder / "flat/val/0.png")
    for label in ("rose", "tulip"):
        shutil.rmtree(folder / "flat/val" / label)


def make_sub_networks(folder: Path, road: Road) -> None:
    good = json.loads((road.peeled / "config.json").read_text())
    widths = good["widths"]
    for name, content in {
        "a_list": [good],
        "nameless": {key: value for key, value in good.items() if key != "model"},
        "without_weights": good,
        "cut_short": good,
        "of_fractions": good | {"widths": widths | {"0.attn": 1.5}},
        "astronomic": good | {"widths": widths | {"0.mlp": 10**12}},
        "otherwise_wide": good | {"widths": {key: width // 2 + 1 for key, width in widths.items()}},
        "lacking_a_module": good | {"widths": {key: width for key, width in widths.items() if key != "1.attn"}},
        "of_no_size": good | {"preprocessing": {}},
        "of_odd_colours": good | {"preprocessing": good["preprocessing"] | {"mean": "grey"}},
        "of_no_spread": good | {"preprocessing": good["preprocessing"] | {"std": [0.0]}},
        "cropped_away": good | {"preprocessing": good["preprocessing"] | {"crop_pct": -0.5}},
        "oddly_resized": good | {"preprocessing": good["preprocessing"] | {"interpolation": "sideways"}},
        "reaching_out": good | {"model_kwargs": good["model_kwargs"] | {"checkpoint_path": str(road.contracted)}},
        "bottomless": good | {"model_kwargs": good["model_kwargs"] | {"depth": 10**6}},
        "no_json": good,
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(content))
        shutil.copy(road.peeled / "model.safetensors", folder / name)
    (folder / "no_json" / "config.json").write_text("{")
    (folder / "without_weights" / "model.safetensors").unlink()
    weights = folder / "cut_short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a good run and the bad ones, by the names that the cases use; and what the smallest network is."""
    road = walk_the_road(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("bad")
    found = make_checkpoints(folder, road)
    make_tables(folder, road)
    make_image_folders(folder)
    make_sub_networks(folder, road)
    (folder / "alone").mkdir()
    found["alone"] = Path(shutil.copy(road.contracted, folder / "alone"))
    found["unstamped"] = folder / "unstamped.json"
    table = json.loads(road.mask_table.read_text())
    found["unstamped"].write_text(json.dumps({key: value for key, value in table.items() if key != "meta"}))
    model, table = tiny_digits_model(), MaskTable.load(road.mask_table)
    smallest = table.widths(-1)
    return {
        **{name: str(path) for name, path in found.items()},
        "folder": str(folder),
        "pretrained": str(road.pretrained / "checkpoint_3.pth"),
        "contracted": str(road.contracted),
        "super_network": str(road.super_network),
        "mask_table": str(road.mask_table),
        "peeled": str(road.peeled),
        "last": str(len(table) - 1),
        "smallest_macs": format_amount(count_macs(model, smallest)),
        "smallest_params": format_amount(count_params(model, smallest)),
    }


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output folder that holds something already."""
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / "frontier.json").write_text("an older result")
    return folder


def one_line(text: str, program: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith(f"{program}: error: ")
    return lines[0]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input(
    case: Case,
    files: dict[str, str],
    output: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program, *arguments = (part.format(**files) for part in case.command)
    before = snapshot(output)
    for folder in (output, output / "new"):
        place = [] if "--output-dir" in arguments else ["--output-dir", str(folder)]
        assert exit_code(program, *arguments, *place) == 2
        line = one_line(capsys.readouterr().err, program)
        for part in case.says:
            assert part.format(**files) in line
        assert snapshot(output) == before
    assert not (Path(files["folder"]) / "executed").exists()


def test_pickled_objects_would_have_run(files: dict[str, str]):
    """The cases above refuse what a careless read would run."""
    torch.load(files["pickled"], weights_only=False)
    marker = Path(files["folder"]) / "executed"
    assert marker.exists()
    marker.unlink()


@pytest.mark.parametrize(
    "name", ["a misspelt model", "a .pth cut short", "an unreadable image, met by a loading process"]
)
def test_bad_input_in_a_process_of_its_own(name: str, files: dict[str, str], output: Path):
    case = next(case for case in CASES if case.name == name)
    program, *arguments = (part.format(**files) for part in case.command)
    before = snapshot(output)
    done = call(program, *arguments, "--output-dir", output)
    assert done.returncode == 2
    line = one_line(done.stderr, program)
    assert all(part.format(**files) in line for part in case.says)
    assert snapshot(output) == before


def test_unreadable_training_image_leaves_no_checkpoint(files: dict[str, str], tmp_path: Path, capsys):
    shutil.copytree(Path(files["folder"]) / "broken", tmp_path / "data")
    (tmp_path / "data" / "train").rename(tmp_path / "data" / "aside")
    (tmp_path / "data" / "val").rename(tmp_path / "data" / "train")
    (tmp_path / "data" / "aside").rename(tmp_path / "data" / "val")
    # Without repeats, so that the one epoch leaves no image out.
    arguments = (*TRAIN_PIAD[1:-1], files["two"], *FLOWERS, tmp_path / "data", "--proxy-samples", 1)
    arguments += ("--repeated-aug", 0)
    assert exit_code("main.py", *arguments, "--output-dir", tmp_path / "output") == 2
    assert "train/tulip/1.png" in one_line(capsys.readouterr().err, "main.py")
    left = [name for name in snapshot(tmp_path / "output") if name.endswith((".pth", ".json", ".tmp"))]
    assert left == []


def test_nan_loss_names_the_step_and_keeps_the_last_checkpoint(files: dict[str, str], tmp_path: Path, capsys):
    """A learning rate that throws the weights out of range at the first step: the loss of the second is not finite."""
    arguments = [*TRAIN_PIAD[1:-1], files["contracted"], "--lr", "1e25", "--checkpoint-steps", "1", "--ema-decay", "0"]
    assert exit_code("main.py", *arguments, "--output-dir", tmp_path) == 2
    line = one_line(capsys.readouterr().err, "main.py")
    assert all(part in line for part in ("loss is nan", "epoch 0, step 1, op code ", "learning rate 5e+24", "--lr"))
    assert sorted(path.name for path in tmp_path.glob("checkpoint_*")) == ["checkpoint_0.pth"]
    state = load_checkpoint(tmp_path / "checkpoint_0.pth")
    assert (state["epoch"], state["step"]) == (0, 1)
    assert not list(tmp_path.glob(".*"))
    assert len(state["model"]["head.bias"]) == CLASSES
