"""A sub-network as a folder: model.safetensors and config.json, enough to rebuild it with no super-network at hand."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from files import atomic_file, load_checkpoint, read_json, shown, write_text
from models.backbone import ALIASES, Backbone, create_backbone, family_named, full_widths
from models.extraction import extract
from models.loading import load_weights
from models.macs import count_macs, count_params
from utils import UserError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MAX_DEPTH, MAX_SIZE = 100, 1_000_000  # beyond any vision transformer: of sizes in a config, checked before building


def save_subnetwork(
    folder: Path,
    model: Backbone,
    *,
    name: str,
    model_kwargs: dict[str, Any],
    preprocessing: dict[str, Any],
    **facts: Any,
) -> dict[str, Any]:
    """Writes an extracted model. name, model_kwargs: the backbone it was cut from; facts: anything plain to add.

    Returns the config: model, model_kwargs, widths, preprocessing, macs in both conventions, params, and the facts.
    Raises ValueError for facts that have one of these names, TypeError for what is not plain.
    """
    config: dict[str, Any] = {
        "model": name,
        "model_kwargs": {**model_kwargs, "num_classes": model.num_classes},
        "widths": full_widths(model),
        "preprocessing": preprocessing,
        "macs": {"linear": count_macs(model), "full": count_macs(model, convention="full")},
        "params": count_params(model),
    }
    if config.keys() & facts.keys():
        raise ValueError(f"{min(config.keys() & facts.keys())} is not a fact to add: it is the model's own")
    text = json.dumps(config | facts, indent=1) + "\n"  # before anything is written
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_file(folder / WEIGHTS) as temporary:
        save_file(weights, temporary)
    write_text(folder / CONFIG, text)
    return config | facts


def load_subnetwork(folder: Path) -> tuple[Backbone, dict[str, Any]]:
    """The model of a folder, in eval mode, and its config. Raises UserError for a folder that does not hold one."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a sub-network: it has no {CONFIG}")
    config = read_json(folder / CONFIG)
    wanted = {"model": str, "model_kwargs": dict, "widths": dict, "preprocessing": dict}
    for key, kind in wanted.items():
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise UserError(f"{folder / CONFIG}: {key} is missing or not of type {kind.__name__}")
    for key, width in config["widths"].items():
        if type(width) is not int:
            raise UserError(f"{folder / CONFIG}: widths: {shown(key)} is {shown(repr(width))}, not a whole number")
    check_model_kwargs(config["model"], config["model_kwargs"], folder / CONFIG)
    model = extract(_structure(config["model"], config["model_kwargs"]), config["widths"])
    check_preprocessing(config["preprocessing"], model, folder / CONFIG)
    load_weights(model, load_checkpoint(folder / WEIGHTS), str(folder / WEIGHTS), assign=True)
    return model.eval(), config


def _structure(name: str, model_kwargs: dict[str, Any]) -> Backbone:
    """The model that weights are read into: without weights of its own, where all it holds is read."""
    with torch.device("meta"):
        skip = {"weight_init": "skip"} if family_named(name).model is VisionTransformer else {}
        model = create_backbone(name, **model_kwargs | skip)
    made = {key for key, _ in model.named_buffers()} - model.state_dict().keys()
    return create_backbone(name, **model_kwargs) if made else model  # such as window masks, which are computed


def check_model_kwargs(name: str, model_kwargs: dict[str, Any], path: Path) -> None:
    """Raises UserError for arguments in the file at `path` that do more than shape the network.

    A file is data from elsewhere, and timm's other arguments name files and hubs.
    """
    if not timm.is_model(ALIASES.get(name, name)):
        create_backbone(name)  # which names near ones
    allowed = inspect.signature(family_named(name).model.__init__).parameters.keys() - {"self", "device", "dtype"}
    for key, value in model_kwargs.items():
        if key not in allowed:
            raise UserError(f"{path}: model_kwargs: {key} does not shape a transformer")
        numbers = value if isinstance(value, list) else [value]
        largest = MAX_DEPTH if key in ("depth", "depths") else MAX_SIZE
        if not all(isinstance(n, int | float | str | None) for n in numbers):
            raise UserError(f"{path}: model_kwargs: {key} is {shown(repr(value))}, not a plain value")
        if any(isinstance(n, int | float) and not -largest <= n <= largest for n in numbers):
            raise UserError(f"{path}: model_kwargs: {key} is {shown(value)}, beyond {largest}")


def check_preprocessing(preprocessing: dict[str, Any], model: Backbone, path: Path) -> None:
    """Raises UserError, naming the file at `path`, for a data configuration that is not one of the model."""

    def numbers(value: Any, count: int, low: float, high: float) -> bool:
        numeric = isinstance(value, list) and len(value) == count and all(type(n) in (int, float) for n in value)
        return numeric and all(low <= n <= high for n in value)

    size = [model.in_chans, *model.patch_embed.img_size]
    right = {
        "input_size": preprocessing.get("input_size") == size,
        "mean": numbers(preprocessing.get("mean"), model.in_chans, -10, 10),
        "std": numbers(preprocessing.get("std"), model.in_chans, 1e-3, 10),
        "crop_pct": numbers([preprocessing.get("crop_pct")], 1, 0.1, 1.5),
        "crop_mode": preprocessing.get("crop_mode") in ("center", "squash", "border"),
        "interpolation": preprocessing.get("interpolation") in ("bilinear", "bicubic", "nearest", "lanczos"),
    }
    for key, is_right in right.items():
        if not is_right:
            raise UserError(
                f"{path}: preprocessing: {key} is {shown(repr(preprocessing.get(key)))}, which does not fit the model"
            )
