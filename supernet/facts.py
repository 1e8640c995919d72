"""What weights say of themselves: read with them, checked, and held against what flags say.

Weights that this project writes come with a description: model, model_kwargs, preprocessing, target, method, stamp. It
stands in a checkpoint's settings, in contracted.json, or in the config.json of a sub-network.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from files import read_json, shown
from models.backbone import ALIASES, Backbone, create_backbone, family_named
from utils import UserError, first_line

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # of a sub-network's folder
MAX_DEPTH, MAX_SIZE = 100, 1_000_000  # beyond any vision transformer: checked before a model of a file is built
# Arguments of timm's models that matter in training only, so that a flag may give them beside any weights.
REGULARIZATION = {"drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"}


def named(name: str) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """timm's plain name of a model, and what comes with a name on a hub ("hf-hub:timm/..."), which is read there.

    That is the model's arguments, {} for a plain name, and timm's configuration of its weights, None for a plain name.
    Raises UserError where the hub does not give them, or names a model that is not supported.
    """
    if ":" not in name:
        return name, {}, None
    try:
        found = timm.models.resolve_model_input_args(name)
    except Exception as error:  # the hub's errors are of many types
        raise UserError(f"{name} could not be read as a model of timm: {first_line(error)}") from error
    model_kwargs = found.get("pretrained_model_args", {})
    check_model_kwargs(found["model_name"], model_kwargs, name)
    return found["model_name"], model_kwargs, found["pretrained_cfg"]


def read_facts(weights: Path, state: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """The description that comes with weights, {} where they say nothing, and the file that holds it.

    state: the content of the file. Raises UserError for a description that is not one of a supported model.
    """
    facts, source = state.get("settings"), weights
    if weights.suffix == ".safetensors":
        source = weights.with_name(CONFIG) if weights.name == WEIGHTS else weights.with_suffix(".json")
        facts = read_json(source) if source.is_file() else None
    # A config.json with widths is a sub-network's; other projects write files of that name, too.
    if not isinstance(facts, dict) or not (isinstance(facts.get("model"), str) or "widths" in facts):
        return {}, source if source.is_file() else weights
    needed = ("model", "model_kwargs", "preprocessing") if "widths" in facts else ("model_kwargs",)
    for key, kind in {"model": str, "model_kwargs": dict, "widths": dict, "preprocessing": dict}.items():
        if (key in needed or key in facts) and not isinstance(facts.get(key), kind):
            raise UserError(f"{source}: {key} is missing or not of type {kind.__name__}")
    for key, width in facts.get("widths", {}).items():
        if type(width) is not int:
            raise UserError(f"{source}: widths: {shown(key)} is {shown(repr(width))}, not a whole number")
    check_model_kwargs(facts["model"], facts["model_kwargs"], source)
    return facts, source


def agreed_model(
    facts: dict[str, Any], source: Path, name: str | None, model_kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """timm's name and arguments of the model: those of the weights, else those given.

    Raises UserError where the weights say nothing and no name is given, or where the two contradict each other.
    """
    if not facts:
        if name is None:
            raise UserError(f"{source} does not say of which model it is: give its name (--model, --model-kwargs)")
        return ALIASES.get(name, name), model_kwargs
    known, known_kwargs = ALIASES.get(facts["model"], facts["model"]), facts["model_kwargs"]
    words = " ".join([known, *(f"{key}={value}" for key, value in known_kwargs.items())])
    if name is not None and ALIASES.get(name, name) != known:
        raise UserError(f"{source} says that its model is {shown(words)}, --model says {name}: leave --model out")
    for key, value in model_kwargs.items():
        if key not in REGULARIZATION and plain(known_kwargs.get(key)) != plain(value):
            says = f"{key}={known_kwargs[key]}" if key in known_kwargs else f"that its model is {shown(words)}"
            raise UserError(f"{source} says {says}, --model-kwargs says {key}={value}: leave it out")
    return known, {**known_kwargs, **model_kwargs}


def agreed_preprocessing(known: dict[str, Any], source: Path, given: dict[str, Any], model: Backbone) -> dict[str, Any]:
    """How images are prepared, as the weights say. Raises UserError for a flag that says otherwise."""
    check_preprocessing(known, model, source)
    for key, value in given.items():
        if value is None:
            continue
        said = plain(value)
        if key in ("mean", "std"):
            said = [float(x) for x in said] * (len(known[key]) if len(said) == 1 else 1)
        if said != known[key]:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"{source} says {key} {known[key]}, {flag} says {said}: leave {flag} out")
    return known


def plain(value: Any) -> Any:
    """A value as JSON keeps it: tuples become lists."""
    return json.loads(json.dumps(value))


def as_tuples(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments as timm takes them: JSON's lists become tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in model_kwargs.items()}


def stamp_of(parameters: Iterable[Tensor]) -> str:
    """A hash of the weights, hexadecimal: mask table and compensation carry the stamp of the weights they belong to.

    Half precision is hashed as the float32 that it becomes when it is opened.
    """
    found = hashlib.blake2b(digest_size=7)  # fits into the int64 that a compensation stores
    for parameter in parameters:
        value = parameter.detach().float() if parameter.itemsize < 4 else parameter.detach()
        found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def stamp_of_run(start: Iterable[Tensor], settings: dict[str, Any]) -> str:
    """The stamp of what a training run makes: of the weights that it starts from, and its settings."""
    text = json.dumps([stamp_of(start), settings], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=7).hexdigest()


def check_stamp(found: Any, stamp: str, path: Path, weights: Path | None) -> None:
    """Raises UserError where the file at `path` carries the stamp of other weights."""
    if found is not None and found != stamp:
        raise UserError(
            f"{path} was made for other weights than {weights}: give the file that was written with them, or make both "
            "again with reparam.py"
        )


def check_model_kwargs(name: str, model_kwargs: dict[str, Any], path: Path | str) -> None:
    """Raises UserError for arguments in the file at `path` that do more than shape the network.

    The file may come from anywhere, and timm has arguments that name files and hubs.
    """
    if not timm.is_model(ALIASES.get(name, name)):
        create_backbone(name)  # raises the error, with near names
    allowed = inspect.signature(family_named(name).model.__init__).parameters.keys() - {"self", "device", "dtype"}
    for key, value in model_kwargs.items():
        if key not in allowed:
            raise UserError(f"{path}: model_kwargs: {key} does not shape a transformer")
        numbers = value if isinstance(value, list | tuple) else [value]
        largest = MAX_DEPTH if key in ("depth", "depths") else MAX_SIZE
        if not all(isinstance(n, int | float | str | None) for n in numbers):
            raise UserError(f"{path}: model_kwargs: {key} is {shown(repr(value))}, not a plain value")
        if any(isinstance(n, int | float) and not -largest <= n <= largest for n in numbers):
            raise UserError(f"{path}: model_kwargs: {key} is {shown(value)}, beyond {largest}")


def check_preprocessing(preprocessing: dict[str, Any], model: Backbone, path: Path) -> None:
    """Raises UserError, naming the file at `path`, for a data configuration that does not fit the model."""

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
