"""Running the entry points in the tests' own process, on the digits, and the files of a whole road, made once."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timm.models.vision_transformer import VisionTransformer

import export
import main
import reparam
import supernet
from files import load_checkpoint
from models.backbone import create_backbone
from report import page
from supernet import profile, retable, saving
from utils import run_program

ROOT = Path(main.__file__).parent
PROGRAMS = {
    "main.py": main.main,
    "reparam.py": reparam.main,
    "page.py": page.main,
    "export.py": export.main,
    "supernet.profile": profile.main,
    "supernet.retable": retable.main,
}

# The smallest plain ViT that has whole units: head dim 16, 192 hidden units, 5 tokens.
NAME = "vit_tiny_patch16_224"
MODEL_KWARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "in_chans": 1}
CLASSES = 10
MODEL = ["--model", NAME, "--model-kwargs", *(f"{key}={value}" for key, value in MODEL_KWARGS.items())]
DIGITS = ["--data-set", "digits", "--workers", "0", "--batch-size", "256", "--device", "cpu"]
PROXY = ["--proxy-samples", "64"]
COMMON = [*MODEL, *DIGITS]
# Augmentation that suits digits, and a large learning rate: a few steps have to teach something.
TRAIN = ["--aa", "none", "--color-jitter", "0", "--hflip", "0", "--scale", "0.8", "1", "--lr", "2e-2"]
PIAD = ["--stage", "piad", *COMMON, *TRAIN, *PROXY, "--progressive-epochs", "2"]


def run(program: str, *arguments: object) -> None:
    """Runs a program's main() as its command line would; a UserError comes out as it is."""
    with mock.patch.object(sys, "argv", [program, *map(str, arguments)]):
        PROGRAMS[program]()


def exit_code(program: str, *arguments: object) -> int:
    """Runs a program as its file does when it is called: what goes wrong is a line on stderr and an exit code."""
    with mock.patch.object(sys, "argv", [program, *map(str, arguments)]):
        try:
            run_program(PROGRAMS[program])
        except SystemExit as stop:
            return stop.code or 0
    return 0


def call(program: str, *arguments: object, processes: int = 1) -> subprocess.CompletedProcess:
    """Runs a program in a process of its own, or under torchrun in several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    command = [str(part) for part in (sys.executable, *launcher, ROOT / program, *arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes then; a kill would leave them
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def tiny_digits_model(**more: object) -> VisionTransformer:
    return create_backbone(NAME, **{**MODEL_KWARGS, "num_classes": CLASSES, **more})


def save_subnetwork(
    folder: Path, small: torch.nn.Module, *, name: str, model_kwargs: dict, preprocessing: dict, **facts: Any
) -> dict[str, Any]:
    """Writes a sub-network that was cut from a backbone of this name and these arguments; returns its config.json."""
    description = {"model": name, "model_kwargs": model_kwargs, "preprocessing": preprocessing}
    return saving.save_subnetwork(folder, small, description, facts)


def load_subnetwork(folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model of a sub-network's folder and its config.json."""
    model = supernet.load(folder).model
    return model, json.loads((folder / "config.json").read_text())


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: path -> content, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def assert_same(found: object, expected: object, where: str = "") -> None:
    """Equal bit for bit: tensors, and whatever dictionaries and lists hold them."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    else:
        assert found == expected, where


@dataclass(frozen=True)
class Road:
    """The output folders of the stages, in their order."""

    pretrained: Path
    reparamed: Path
    peelable: Path
    peeled: Path

    @property
    def contracted(self) -> Path:
        return self.reparamed / "contracted.safetensors"

    @property
    def super_network(self) -> Path:
        return self.peelable / "checkpoint_1.pth"

    @property
    def mask_table(self) -> Path:
        return self.peelable / "mask_table.json"

    def weights(self, path: Path | None = None) -> dict[str, torch.Tensor]:
        state = load_checkpoint(path or self.super_network)
        return state.get("model", state)


@functools.cache
def walk_the_road(folder: Path) -> Road:
    """The whole road through the real programs, into a folder; made once.

    A few epochs of each training stage; the sub-network is the one of half the MACs.
    """
    road = Road(*(folder / name for name in ("pretrained", "reparamed", "peelable", "peeled")))
    run("main.py", "--stage", "pretrain", *COMMON, *TRAIN, "--mixup", 0, "--cutmix", 0, "--ema-decay", 0.5,
        "--epochs", 4, "--warmup-epochs", 0, "--output-dir", road.pretrained)  # fmt: skip
    run("reparam.py", *COMMON, *PROXY, "--checkpoint", road.pretrained / "checkpoint_3.pth",
        "--output-dir", road.reparamed)  # fmt: skip
    run("main.py", *PIAD, "--checkpoint", road.contracted, "--epochs", 2, "--ema-decay", 0.5,
        "--output-dir", road.peelable)  # fmt: skip
    run("main.py", "--stage", "finetune", *COMMON, *TRAIN, "--checkpoint", road.super_network, "--macs-ratio", 0.5,
        "--epochs", 2, "--output-dir", road.peeled)  # fmt: skip
    return road
