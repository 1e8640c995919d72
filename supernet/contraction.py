"""Contraction of a network: from any timm transformer and unlabelled images to a super-network."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from datasets import preprocessing as default_preprocessing
from files import write_text
from image_folders import image_files
from models.backbone import Backbone, check_supported, create_backbone, full_widths, modules_of
from models.targets import check_cost, check_target, default_cost, default_target, output_of
from piad.mask_table import MASK_TABLE, MaskTable
from utils import UserError, is_main_process, progress_bar, say
from wpac.allocation import DIM_LOSSES, dim_errors, save_dim_losses
from wpac.compensation import COMPENSATION, DAMPING, compensate, save_compensation
from wpac.statistics import collect_statistics
from wpac.transform import contract as contract_weights

from .amounts import format_amount
from .device import DeviceProfile
from .facts import plain, stamp_of
from .latency import LATENCY
from .network import Network
from .saving import CONTRACTED, save_weights
from .tables import DROPOUT_RATIO, table_of_losses

# method: basis of attention dims and order of hidden units.
METHODS = {"paper": ("wpac", "taylor"), "best": ("fisher", "fisher")}
LIMIT = 1e-3  # largest change of the output, relative to its largest value; contraction in float32 stays far below


@dataclass
class Contraction:
    """What contraction found besides the network, which is changed in place.

    spectra: module key -> share of variance or importance of each dim (wpac.transform.contract()).  difference: of the
    target before and after, relative to the largest value.  not_compensated: modules that are cut without compensation.
    seconds: of the pass over the images.
    """

    spectra: dict[str, Tensor]
    difference: float
    not_compensated: list[str]
    seconds: float


def contract(
    model: Backbone,
    images: Path | str | Iterable[Any],
    *,
    method: str = "best",
    target: str | None = None,
    dropout_ratio: float = DROPOUT_RATIO,
    samples: int = 1024,
    batch_size: int = 64,
    model_kwargs: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> Network:
    """Turns a timm model into a super-network, in place, and returns it with its mask table; no labels, no training.

    model: a supported timm transformer, on the device that is to do the work.
    images: a folder with image files anywhere below it, or an iterable of PIL images, of tensors (C, height, width), or
    of batches (B, C, height, width); tensors are taken as they are. At most `samples` of them are used.
    method: "best" (see docs/SIZES.md), or "paper", whose mask table holds only the whole network until PIAD trains it.
    target: what sub-networks keep of the whole network: "logits", "features" (pooled) or "tokens" (all tokens after the
    last norm); by default the logits, or the tokens of a model without a head.
    dropout_ratio: share of the MACs that the mask table can drop.
    model_kwargs: the arguments that timm.create_model() was given besides the name, where they cannot be read off the
    model.
    preprocessing: parts of timm's data configuration, such as {"crop_pct": 1.0} (default: the model's).
    Raises UserError for a model that is not supported, and where there is no image.
    """
    network = network_of(model, model_kwargs, preprocessing)
    network.target = target or network.target
    batches = _batches(images, network, batch_size, samples)
    contract_network(network, batches, method=method, dropout_ratio=dropout_ratio)
    return network


def contract_network(
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    method: str,
    cost: str | None = None,
    basis: str | None = None,
    order: str | None = None,
    damping: float = DAMPING,
    dropout_ratio: float | None = None,
    profile: DeviceProfile | None = None,
) -> Contraction:
    """Contracts a network for its target, in place, and checks that the target stays what it was.

    batches: images (B, C, height, width) and labels (B,), which only the costs of models.targets.LABELLED use.
    cost: a key of models.targets.COSTS (default: one that needs no labels).  basis, order: instead of the method's
    (wpac.transform.contract()).  dropout_ratio: with method "best", also make a mask table that can drop this share of
    the MACs, or of the time that the profile says.
    Raises UserError for a target, a cost or a profile that do not fit, and where the output changes by more than LIMIT
    or is not finite.
    """
    model, target = network.model, network.target
    check_target(model, target)
    cost = cost or default_cost(target)
    check_cost(cost, target)
    if profile is not None:
        profile.check_model(model)
    basis, order = (given or default for given, default in zip((basis, order), METHODS[method], strict=True))
    total, batches = len(batches) if hasattr(batches, "__len__") else None, iter(batches)
    first = next(batches, None)
    if first is None:
        raise UserError("there is no image to take statistics on")
    probe = first[0].to(next(model.parameters()).device)
    before, start = _output(model, probe, target), time.perf_counter()
    if not before.isfinite().all():
        raise UserError(
            "the output of the model is not finite: its weights hold NaN, or are out of the range of their dtype"
        )
    outputs = method == "best" or "fisher" in (basis, order)
    bar = progress_bar(itertools.chain([first], batches), "statistics", total=total)
    statistics = collect_statistics(model, bar, cost, squared=order == "hessian", outputs=outputs, target=target)
    seconds = time.perf_counter() - start
    spectra = contract_weights(model, statistics, basis, order, damping)
    losses, without = None, []
    if method == "best":
        losses = dim_errors(model, statistics, damping)
        for key in [*statistics.outputs]:  # the moments of a module leave as its factor comes
            without += compensate(model, {key: statistics.outputs.pop(key)}, damping)
    difference = ((_output(model, probe, target) - before).abs().max() / before.abs().max()).item()
    if not difference <= LIMIT:  # a NaN is not below the limit
        raise UserError(
            f"contraction changed the output by {difference:.1e} of its largest value, more than {LIMIT:g}: nothing "
            "is written; the weights may be out of the range of their dtype"
        )
    network.method, network.averaged = method, network.averaged
    network.stamp = stamp_of(model.parameters())
    network.grade = "compensated" if method == "best" else "cut"
    network.dim_losses = losses
    if losses and dropout_ratio is not None:
        network.table = table_of_losses(model, losses, network.stamp, dropout_ratio, profile)
    return Contraction(spectra, difference, without, seconds)


@torch.inference_mode()
def _output(model: Backbone, images: Tensor, target: str) -> Tensor:
    return output_of(model.eval(), images, target).double()


def save_contracted(network: Network, folder: Path, facts: dict[str, Any], with_table: bool) -> None:
    """Writes contracted.safetensors and .json, and what the method "best" adds.

    That is compensation.safetensors, dim_losses.safetensors and, with_table, mask_table.json.

    facts: plain values to add to contracted.json. What an earlier contraction left in the folder is removed first, so
    that nothing there belongs to other weights. On the main process.
    """
    if not is_main_process():
        return
    for stale in (COMPENSATION, DIM_LOSSES, MASK_TABLE, LATENCY):
        (folder / stale).unlink(missing_ok=True)
    save_weights(folder / CONTRACTED, network.model)
    write_text((folder / CONTRACTED).with_suffix(".json"), json.dumps(network.describe() | facts, indent=1) + "\n")
    say(f"written: {folder / CONTRACTED} and contracted.json")
    if network.method == "best":
        size = save_compensation(folder / COMPENSATION, network.model, network.stamp)
        say(f"written: {folder / COMPENSATION}, {format_amount(size, 'B')}")
        save_dim_losses(folder / DIM_LOSSES, network.dim_losses, network.stamp)
    if with_table:
        network.table.save(folder / MASK_TABLE)
        say(f"written: {folder / MASK_TABLE}, {len(network.table)} sizes, without training")


# ---------------------------------------------------------------------------------------------------------------------
# From a model object


def network_of(
    model: Backbone, model_kwargs: dict[str, Any] | None = None, preprocessing: dict[str, Any] | None = None
) -> Network:
    """A timm model object as a network: its name from timm's configuration, its arguments read off or given.

    Raises UserError for a model that is not supported, or that its name and arguments do not make again.
    """
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if name is None:
        raise UserError(f"this {type(model).__name__} was not made by timm.create_model(): its name is not known")
    check_supported(model, name)
    kwargs = model_kwargs if model_kwargs is not None else _inferred_kwargs(model, name)
    with torch.device("meta"):
        again = create_backbone(name, **{**kwargs, "num_classes": model.num_classes})
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, again)]
    if shapes[0] != shapes[1] or modules_of(model) != modules_of(again):
        raise UserError(
            f"timm.create_model({name!r}) with {kwargs} does not make this model again: give model_kwargs, the "
            "arguments that it was made with"
        )
    config = plain(default_preprocessing(model, preprocessing or {}))
    table = MaskTable([full_widths(model)])
    return Network(model.eval(), table, name, kwargs, config, default_target(model))


def _inferred_kwargs(model: Backbone, name: str) -> dict[str, Any]:
    """The common arguments of timm's models that differ from those of the model that the name alone makes."""
    with torch.device("meta"):
        stock = create_backbone(name)
    own, default = _common_kwargs(model), _common_kwargs(stock)
    return {key: value for key, value in own.items() if value != default[key]}


def _common_kwargs(model: Backbone) -> dict[str, Any]:
    found = {"img_size": model.patch_embed.img_size, "patch_size": model.patch_embed.patch_size}
    found |= {key: getattr(model, key) for key in ("in_chans", "num_classes", "global_pool", "embed_dim")}
    if hasattr(model, "blocks"):  # a Swin has stages instead, of several depths
        found |= {"depth": len(model.blocks), "num_heads": model.blocks[0].attn.num_heads}
    return {
        key: value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value for key, value in found.items()
    }


def _batches(
    images: Path | str | Iterable[Any], network: Network, batch_size: int, samples: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (B, C, height, width) of the first `samples` images (a folder's: evenly chosen), and zeros (B,)."""
    if isinstance(images, str | Path):
        paths = image_files(Path(images))
        images = (Image.open(path) for path in paths[:: max(1, len(paths) // samples)])
    waiting: list[Tensor] = []
    for image in itertools.islice(_single_images(images, network), samples):
        waiting.append(image)
        if len(waiting) == batch_size:
            yield torch.stack(waiting), torch.zeros(batch_size, dtype=torch.long)
            waiting = []
    if waiting:
        yield torch.stack(waiting), torch.zeros(len(waiting), dtype=torch.long)


def _single_images(images: Iterable[Any], network: Network) -> Iterator[Tensor]:
    for item in images:
        item = item[0] if isinstance(item, list | tuple) else item  # (images, labels), as a data loader gives them
        item = network.read(item) if isinstance(item, Image.Image) else item
        yield from item if item.ndim == 4 else [item]
