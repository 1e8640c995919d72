"""The methods that studies.contraction measures: how a network is prepared, and at which widths it is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer

from models.backbone import full_widths, modules_of
from models.elastic import make_elastic
from models.macs import count_macs
from piad.dropout_list import grow, units_of
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout
from studies.centring import centre_values
from studies.common import Batches, zero_dims
from studies.criteria import importance_by, sort_dims
from wpac.allocation import dim_errors
from wpac.compensation import Compensation, compensate, ordered_layer
from wpac.statistics import collect_statistics
from wpac.transform import contract

DROPOUT_RATIO = 0.95  # share of the MACs that the mask tables can drop


@dataclass
class Contracted:
    """A model ready to be cut, and the mask table of its allocation, if the method has one."""

    model: VisionTransformer
    table: MaskTable | None = None


def sort_by(criterion: str, model: VisionTransformer, batches: Batches, _damping: float) -> Contracted:
    """Sorts the dims of every module by a criterion, without rotation."""
    sort_dims(model, importance_by(criterion, model, batches))
    return Contracted(model)


def contract_by(
    basis: str,
    order: str,
    centre: bool,
    compensation: bool,
    model: VisionTransformer,
    batches: Batches,
    damping: float,
    cost: str = "logit",
) -> Contracted:
    """Contracts the model as reparam.py does; basis and order as for wpac.contract()."""
    statistics = collect_statistics(model, batches, cost, outputs=centre or compensation)
    contract(model, statistics, basis, order, damping)
    if centre:
        centre_values(model, statistics)
    if not compensation:
        return Contracted(model)
    for key in compensate(model, statistics.outputs, damping):
        print(f"{key} is not compensated")
    errors, whole = dim_errors(model, statistics, damping), MaskTable([full_widths(model)])
    return Contracted(model, grow(whole, errors, units_of(model), DROPOUT_RATIO * count_macs(model)))


def best_in_half_precision(model: VisionTransformer, batches: Batches, damping: float) -> Contracted:
    """The method "best", with the mean and factor of every compensation rounded to float16."""
    contracted = PREPARE["best"](model, batches, damping)
    for module in model.modules():
        if isinstance(module, Compensation):
            module.mean, module.lower = module.mean.half().double(), module.lower.half().double()
    return contracted


def piad_table(model: VisionTransformer, batches: Batches) -> MaskTable:
    """The mask table that PIAD builds in four epochs if the model is not trained in between."""
    piad = ProgressiveDropout(
        make_elastic(copy.deepcopy(model)), batches, ratio=DROPOUT_RATIO, epochs=4, seed=0, table=None
    )
    for epoch in range(piad.epochs):
        piad.begin_epoch(epoch)
    return piad.table


@torch.no_grad()
def cut_apart(model: VisionTransformer, qk: float, v: float) -> VisionTransformer:
    """A copy whose outputs are those of a network that keeps these shares of the dims of q and k, and of v.

    The other dims are set to zero. The model is compensated.
    """
    model = zero_dims(copy.deepcopy(model), qk=qk)
    for block, module in zip(model.blocks, (m for m in modules_of(model).values() if m.kind == "attn"), strict=True):
        weight, bias = ordered_layer(model, module)
        cut, cut_bias = block.attn.compensation(weight, bias, module.heads * int(module.width * v))
        weight.zero_()[:, : cut.shape[1]] = cut
        block.attn.proj.weight.copy_(weight.unflatten(1, (module.width, module.heads)).transpose(1, 2).flatten(1))
        block.attn.proj.bias.copy_(cut_bias)
    return model


# name -> function (model, proxy batches, damping) that prepares a model for cutting, in place.
PREPARE: dict[str, Callable[[VisionTransformer, Batches, float], Contracted]] = {
    "taylor": partial(sort_by, "taylor"),
    "hessian": partial(sort_by, "hessian"),
    "wpac": partial(contract_by, "wpac", "taylor", False, False),
    "centred": partial(contract_by, "wpac", "taylor", True, False),
    "compensated": partial(contract_by, "wpac", "taylor", False, True),
    "best": partial(contract_by, "fisher", "fisher", False, True),
    "rounded": best_in_half_precision,
}
BEST_COSTS = ("logit", "ce", "pred", "fisher")
PREPARE |= {f"best_{cost}": partial(PREPARE["best"], cost=cost) for cost in BEST_COSTS}


@dataclass(frozen=True)
class Method:
    """prepare: a key of PREPARE.  refitted: whether each sub-network is refitted.

    widths: the same share of every module, or those of the mask table of dim_errors() or of PIAD.
    """

    prepare: str
    refitted: bool = False
    widths: Literal["uniform", "allocation", "piad"] = "uniform"


METHODS = {
    "Taylor sort": Method("taylor"),
    "Hessian sort": Method("hessian"),
    "WPAC (the paper)": Method("wpac"),
    "WPAC + centring": Method("centred"),
    "WPAC + compensation": Method("compensated"),
    "+ bases and order (best)": Method("best"),
    "best, stored in half precision": Method("rounded"),
    "best, refitted": Method("best", refitted=True),
    "best, PIAD's order, untrained": Method("best", widths="piad"),
    "best, allocation": Method("best", widths="allocation"),
    "best, allocation, refitted": Method("best", refitted=True, widths="allocation"),
}
COST_METHODS = {f"best, cost {cost}": Method(f"best_{cost}") for cost in BEST_COSTS}
COST_METHODS |= {f"{name}, allocation": replace(m, widths="allocation") for name, m in COST_METHODS.items()}
METHODS |= COST_METHODS
