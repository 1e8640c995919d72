"""Networks as files: a sub-network's folder, and what contraction writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import models.subnetwork
from files import atomic_file, write_text
from models.backbone import Backbone, full_widths
from models.macs import count_macs, count_params
from utils import is_main_process
from wpac.compensation import COMPENSATION, save_compensation

from .facts import CONFIG, WEIGHTS

CODE = "model.py"  # beside the weights and config.json of a sub-network
CONTRACTED = "contracted.safetensors"  # what contraction writes, with contracted.json beside it


def save_subnetwork(
    folder: Path, small: Backbone, description: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]:
    """Writes the folder of a sub-network: weights, config.json and model.py. Returns the config.

    description: of the network that it was cut from (Network.describe()).  facts: plain values to add.
    Raises ValueError for facts that the folder says of the sub-network itself, TypeError for what is not plain.
    """
    config: dict[str, Any] = {
        **description,
        "model_kwargs": {**description["model_kwargs"], "num_classes": small.num_classes},
        "widths": full_widths(small),
        "macs_linear": count_macs(small),
        "macs_full": count_macs(small, convention="full"),
        "params": count_params(small),
    }
    if config.keys() & facts.keys():
        raise ValueError(f"{min(config.keys() & facts.keys())} is not a fact to add: it is the sub-network's own")
    text = json.dumps(config | facts, indent=1) + "\n"  # before anything is written
    save_weights(folder / WEIGHTS, small)
    write_text(folder / CONFIG, text)
    with atomic_file(folder / CODE) as temporary:
        shutil.copyfile(models.subnetwork.__file__, temporary)
    return json.loads(text)


def save_weights(path: Path, model: Backbone) -> None:
    """Writes the state dict as .safetensors; the file is complete or not there at all."""
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_file(path) as temporary:
        save_file(weights, temporary)


def save_compensation_of_run(model: Backbone, folder: Path, stamp: str) -> None:
    """Writes the compensation that a super-network is trained with, or removes that of an earlier run.

    Training does not change it, so it is written once, before the first step, on the main process.
    stamp: of the run.
    """
    if not is_main_process():
        return
    if any(name.endswith(".compensation") for name, _ in model.named_modules()):
        save_compensation(folder / COMPENSATION, model, stamp)
    else:
        (folder / COMPENSATION).unlink(missing_ok=True)
