"""Opening a network: one way for every program and for Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import preprocessing as default_preprocessing
from files import CheckpointFolder, load_checkpoint, weights_of
from models.backbone import ALIASES, Backbone, create_backbone, create_subnetwork, full_widths
from models.layouts import say_differences
from models.loading import head_size, load_weights, prepared
from models.targets import check_target, default_target
from piad.mask_table import MASK_TABLE, MaskTable
from utils import UserError
from wpac.compensation import COMPENSATION, load_compensation

from .facts import (
    CONFIG,
    WEIGHTS,
    agreed_model,
    agreed_preprocessing,
    as_tuples,
    check_stamp,
    named,
    plain,
    read_facts,
    stamp_of,
)
from .network import Network
from .saving import CONTRACTED

# What a Network holds under names of its own; everything else in a description goes into its facts.
OWN = ("model", "model_kwargs", "preprocessing", "target", "method", "averaged_weights", "stamp", "grade")
COUNTED = ("widths", "macs_linear", "macs_full", "macs", "params")  # what saving counts anew; macs: of older folders


def load(
    path: Path | str,
    *,
    name: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
    use_ema: bool = False,
    compensate: bool | None = None,
    mask_table: Path | None = None,
    plain_weights: bool = False,
    drop_path: float = 0.0,
) -> Network:
    """Opens a network: a folder that a program wrote, a checkpoint, contracted weights, or a sub-network's folder.

    Of a folder, the newest checkpoint_<epoch>.pth is opened, else contracted.safetensors. The mask table is the one in
    the checkpoint, or mask_table.json beside the weights; compensation.safetensors beside them is used where it exists.

    name, model_kwargs, preprocessing: timm's name (or that of a timm model on a hub, "hf-hub:OWNER/NAME") and arguments
    of the model and parts of its data configuration
    (None: as the weights say). Weights of this project say all that, and what is given must agree with them; for other
    weights the name is needed.  use_ema: the averaged weights.  compensate: True insists on a compensation, False
    leaves it out.  mask_table: another file.  plain_weights: the whole network alone, with neither table nor
    compensation.  drop_path: stochastic depth rate, for training.
    Raises UserError for a path that holds no network, and for files that are damaged or do not belong together.
    """
    weights = _weights_at(Path(path), plain_weights)
    state = load_checkpoint(weights)
    facts, source = read_facts(weights, state)
    name, hub_kwargs, hub_config = named(name) if name else (None, {}, None)
    name, model_kwargs = agreed_model(facts, source, name, {**hub_kwargs, **(model_kwargs or {})})
    is_subnetwork = "widths" in facts
    if is_subnetwork and (compensate or mask_table):
        raise UserError(f"{path} is a sub-network, which is cut already: leave --compensate and --mask-table out")
    given = weights_of(state, weights, use_ema)
    tensors = prepared(given)
    classes = head_size(tensors)
    said = model_kwargs.get("num_classes")
    if classes and said is not None and said != classes:
        raise UserError(f"{source if facts else path}: num_classes is {said}, but the weights have {classes} classes")
    # Weights of this project say how many classes they have; others without a head have none.
    kwargs = {**model_kwargs, "num_classes": classes} if classes or not facts else model_kwargs
    timm_kwargs = as_tuples(kwargs) | ({"drop_path_rate": drop_path} if drop_path else {})
    if is_subnetwork:
        model = create_subnetwork(name, timm_kwargs, facts["widths"])
    else:
        model = create_backbone(name, pretrained_cfg=hub_config, **timm_kwargs)
    load_weights(model, tensors, f"checkpoint {weights}", assign=is_subnetwork, convert=not facts)
    if not facts:
        say_differences(model, given, weights)
    network = Network(
        model=model.eval(),
        table=MaskTable([full_widths(model)]),
        name=name,
        model_kwargs=kwargs,
        preprocessing=_preprocessing(facts, source, preprocessing or {}, model),
        target=_target(facts, source, model),
        method=facts.get("method"),
        grade=facts.get("grade", "cut"),
        averaged=use_ema or bool(facts.get("averaged_weights")),
        stamp=facts.get("stamp"),
        source=weights,
        is_subnetwork=is_subnetwork,
        facts={} if source == weights else {key: facts[key] for key in facts if key not in (*OWN, *COUNTED)},
    )
    if network.stamp and source != weights and not is_subnetwork:
        check_stamp(network.stamp, stamp_of(model.parameters()), source, weights)
    if not is_subnetwork and not plain_weights:
        _add_sizes(network, state, mask_table, compensate)
    return network


def create(
    name: str,
    model_kwargs: dict[str, Any] | None = None,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    preprocessing: dict[str, Any] | None = None,
    drop_path: float = 0.0,
) -> Network:
    """A network without files: timm's model of this name with timm's pretrained weights, or with new ones.

    name: timm's, or that of a timm model on a hub, "hf-hub:OWNER/NAME"; the network has timm's plain name.
    num_classes: of new weights (default: timm's). Raises UserError for a model that is not supported.
    """
    name, hub_kwargs, hub_config = named(name)
    kwargs = {**hub_kwargs, **(model_kwargs or {})}
    if not pretrained and num_classes is not None:
        kwargs = {"num_classes": num_classes, **kwargs}
    more = {"drop_path_rate": drop_path} if drop_path else {}
    model = create_backbone(name, pretrained=pretrained, pretrained_cfg=hub_config, **kwargs, **more)
    config = plain(default_preprocessing(model, preprocessing or {}))
    table = MaskTable([full_widths(model)])
    return Network(model.eval(), table, ALIASES.get(name, name), kwargs, config, default_target(model))


def _weights_at(path: Path, plain_weights: bool) -> Path:
    """The file of the weights that a path stands for."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give weights, or the folder of a super-network or of a sub-network")
    if path.name == CONFIG:
        return path.with_name(WEIGHTS)
    if path.is_file():
        return path
    has_table = (path / MASK_TABLE).is_file()
    if (path / CONFIG).is_file() and not has_table:
        return path / WEIGHTS
    epochs = CheckpointFolder(path, {}).epochs()
    weights = path / (f"checkpoint_{epochs[-1]}.pth" if epochs else CONTRACTED)
    if not weights.is_file() or not (has_table or plain_weights):
        raise UserError(
            f"{path} is not a super-network, which has {MASK_TABLE} beside its checkpoint_<epoch>.pth or "
            f"{CONTRACTED}, nor a sub-network, which has {CONFIG}"
        )
    return weights


def _preprocessing(facts: dict[str, Any], source: Path, given: dict[str, Any], model: Backbone) -> dict[str, Any]:
    known = facts.get("preprocessing")
    if known is None:  # weights from elsewhere, and checkpoints of earlier versions, whose settings are the flags
        flags = {key: facts.get(key) for key in ("mean", "std", "interpolation", "crop_pct")}
        flags |= {key: value for key, value in given.items() if value is not None}
        return plain(default_preprocessing(model, flags))
    return agreed_preprocessing(plain(known), source, given, model)


def _target(facts: dict[str, Any], source: Path, model: Backbone) -> str:
    target = facts.get("target") or default_target(model)
    try:
        check_target(model, target)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return target


def _add_sizes(network: Network, state: dict[str, Any], mask_table: Path | None, compensate: bool | None) -> None:
    """Gives a network its mask table and its compensation, each checked against the weights."""
    weights = network.source
    stamp = network.stamp or stamp_of(network.model.parameters())
    if "mask_table" in state and mask_table is None:
        network.table = MaskTable.from_json(state["mask_table"])
    else:
        path = mask_table or weights.with_name(MASK_TABLE)
        network.table = MaskTable.load(path)
        check_stamp(network.table.meta.get("stamp"), stamp, path, weights)
    network.table.check(full_widths(network.model), network.name)
    path = weights.with_name(COMPENSATION)
    if compensate and not path.exists():
        raise UserError(f"--compensate: {path} does not exist; reparam.py --method best writes it")
    if path.exists() and compensate is not False:
        load_compensation(path, network.model, stamp)
        network.grade = "compensated"
