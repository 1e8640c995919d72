"""Opening a super-network or a sub-network from its files alone, and what can be done with it from Python.

The lines of the README, on the digits that `sh run_demo.sh` trains:

>>> from PIL import Image
>>> from models import count_macs, extract
>>> from supernet import load
>>> network = load("output/demo/peelable/digits", use_ema=True)  # or a checkpoint, or the folder of a sub-network
>>> model, table = network.model, network.table
>>> sizes = {code: count_macs(model, table.widths(code)) for code in range(len(table))}  # op code: MACs for an image
>>> code = table.select(model, max_macs=200e3, max_memory=60e3)  # the largest size that meets both; memory in bytes
>>> small = extract(model, table.widths(code))  # plain timm modules
>>> logits = small(network.read(Image.open("digit.png"))[None])  # the image as timm's configuration of the model says
>>> print(sizes[code] <= 200e3, logits.shape)
True torch.Size([1, 10])
>>> config = network.save("output/cut", small, op_code=code)  # load("output/cut") opens it
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor

from datasets import preprocessing
from files import CheckpointFolder, load_checkpoint, read_json, shown
from models.backbone import ALIASES, Backbone, full_widths
from piad.mask_table import MASK_TABLE, MaskTable
from supernet.opening import CONTRACTED, load_super_network
from utils import UserError
from wpac.compensation import compensate_from

from .folder import (
    CONFIG,
    WEIGHTS,
    check_model_kwargs,
    check_preprocessing,
    load_subnetwork,
    save_subnetwork,
)


@dataclass
class Network:
    """A super-network, or a sub-network, which has one size.

    model: on the CPU, in eval mode; images (B, C, height, width) to logits (B, classes).  table: op code -> widths; of
    a sub-network, op code 0 alone.  name, model_kwargs: timm's, of the backbone.  preprocessing: timm's data
    configuration (input_size, mean, std, interpolation, crop_pct, crop_mode).  grade: how sizes are cut, "cut" or
    "compensated"; of a sub-network, how it was made.  source: the file of the weights.  facts: a sub-network's config.
    """

    model: Backbone
    table: MaskTable
    name: str
    model_kwargs: dict[str, Any]
    preprocessing: dict[str, Any]
    grade: str
    source: Path
    facts: dict[str, Any]

    def read(self, image: Image.Image) -> Tensor:
        """An image under the evaluation transform of timm: (C, height, width), normalised."""
        mode = "L" if self.model.in_chans == 1 else "RGB"
        return create_transform(**self.preprocessing)(image.convert(mode))

    def save(self, folder: Path, small: Backbone, **facts: Any) -> dict[str, Any]:
        """Writes a sub-network extracted from `model` as a folder that load() opens, over one there; gives its config.

        facts: anything plain to add to config.json. Raises UserError where the folder cannot be written.
        """
        return save_subnetwork(
            Path(folder),
            small,
            name=self.name,
            model_kwargs=self.model_kwargs,
            preprocessing=self.preprocessing,
            **{"grade": self.grade, **facts},
        )


def load(
    path: Path | str,
    *,
    name: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    use_ema: bool = False,
    compensate: bool | None = None,
) -> Network:
    """Opens a super-network (a folder of main.py or reparam.py, or its weights) or a sub-network (its folder).

    A folder's weights are those of its newest checkpoint_<epoch>.pth, else contracted.safetensors; mask_table.json
    lies beside them, and compensation.safetensors is used where it is (compensate: True insists, False leaves it out).
    name, model_kwargs: for weights that do not say of which model they are, such as the authors'.  use_ema: the
    averaged weights.
    Raises UserError for a path that holds neither, and for files that are damaged or do not go together.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give the folder of a super-network or of a sub-network")
    folder = path if path.is_dir() else path.parent
    is_super = (folder / MASK_TABLE).is_file() or (path.is_file() and path.name not in (WEIGHTS, CONFIG))
    if (folder / CONFIG).is_file() and not is_super:
        if name or model_kwargs or use_ema or compensate:
            raise UserError(f"{path} is a sub-network, which is cut already: leave model, averaging, compensation out")
        return _sub_network(folder)
    weights = _weights_in(path) if path.is_dir() else path
    facts = _facts_of(weights, name, model_kwargs or {})
    model, table = load_super_network(facts["model"], facts["model_kwargs"], checkpoint=weights, use_ema=use_ema)
    grade = compensate_from(weights, model, compensate)
    kept = ("mean", "std", "interpolation", "crop_pct")
    config = facts.get("preprocessing") or preprocessing(model, {key: facts.get(key) for key in kept})
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    check_preprocessing(config, model, weights)
    return Network(model.eval(), table, facts["model"], facts["model_kwargs"], config, grade, weights, {})


def _sub_network(folder: Path) -> Network:
    model, config = load_subnetwork(folder)
    table = MaskTable([full_widths(model)])
    grade = config.get("grade", "cut")
    made_of = (config["model"], config["model_kwargs"], config["preprocessing"])
    return Network(model, table, *made_of, grade, folder / WEIGHTS, config)


def _weights_in(folder: Path) -> Path:
    epochs = CheckpointFolder(folder, {}).epochs()
    weights = folder / (f"checkpoint_{epochs[-1]}.pth" if epochs else CONTRACTED)
    if not (folder / MASK_TABLE).is_file() or not weights.is_file():
        raise UserError(
            f"{folder} is not a super-network, which has {MASK_TABLE} beside its checkpoint_<epoch>.pth or "
            f"{CONTRACTED}, nor a sub-network, which has {CONFIG}"
        )
    return weights


def _facts_of(weights: Path, name: str | None, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What is written down with the weights (model, model_kwargs, how images are prepared), else what is given.

    Raises UserError where neither says of which model they are, or where the two differ.
    """
    beside = weights.with_suffix(".json")
    facts = read_json(beside) if beside.is_file() else load_checkpoint(weights).get("settings")
    source = beside if beside.is_file() else weights
    if not isinstance(facts, dict) or not isinstance(facts.get("model"), str):
        if name:
            return {"model": name, "model_kwargs": model_kwargs}
        raise UserError(f"{source} does not say of which model it is: give its name (--model, --model-kwargs)")
    if not isinstance(facts.get("model_kwargs"), dict):
        raise UserError(f"{source}: model_kwargs is missing or not of type dict")
    other = name and ALIASES.get(name, name) != ALIASES.get(facts["model"], facts["model"])
    if other or (model_kwargs and model_kwargs != facts["model_kwargs"]):
        known = " ".join([facts["model"], *(f"{key}={value}" for key, value in facts["model_kwargs"].items())])
        raise UserError(f"{source} says that its model is {shown(known)}: leave --model and --model-kwargs out")
    check_model_kwargs(facts["model"], facts["model_kwargs"], source)
    return facts
