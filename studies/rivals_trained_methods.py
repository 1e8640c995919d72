"""The methods that studies.rivals_trained compares.

Each takes a budget and returns a network for each share of the MACs. "Taught" means that the whole network before
training is the teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.elastic import make_elastic
from models.extraction import extract
from models.macs import count_macs
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout
from studies.budget import Budget
from studies.common import Batches
from studies.criteria import importance_by
from studies.dependency_pruning import Recipe, gradients_of, prune_within
from studies.rivals_depth import Albert, DepthRule, Shared, SharedDepth, Tleg, Wave
from studies.rivals_methods import copied, widths_within
from studies.rivals_one_size import Gated, Thresholds, folded, idle_share, pruned, shares_of, with_idle
from studies.rivals_task import Size, Task
from studies.rivals_vbp import vbp
from studies.rivals_widths import Ladder, ScalaRule, matformer_sizes, mixed_sizes, uniform_sizes
from supernet import Network
from supernet.contraction import contract_network
from wpac.refit import refit

Found = dict[float, nn.Module | None]  # share of the MACs -> a plain network, None if the method cannot make that size


@dataclass(frozen=True)
class Method:
    """run: trains networks for shares of the MACs.  one_size: whether it trains each size by itself.

    trains: whether it trains at all.
    """

    run: Callable[[Budget, list[float]], Found]
    one_size: bool = False
    trains: bool = True


# ---------------------------------------------------------------------------------------------------------------------
# Networks of many sizes


def untrained(budget: Budget, shares: list[float]) -> Found:
    """The method "best", compensated and not trained."""
    network = contracted(budget, "best")
    return {share: cut_of(network, share) for share in shares}


def paper(budget: Budget, shares: list[float]) -> Found:
    """The paper's contraction and PIAD, whose table grows for half of the epochs, with labels."""
    network, settings = contracted(budget, "paper"), budget.settings
    growing = {"ratio": settings.dropout_ratio, "epochs": max(1, budget.epochs // 2)}
    rule = rule_of(budget, network, proxy=budget.proxy(), **growing)
    return sizes_of(budget, network, rule, shares, taught=False)


def best(sizes: int, budget: Budget, shares: list[float]) -> Found:
    """The method "best" with its mask table, taught; each step draws `sizes` sizes uniformly in 1 / MACs."""
    network = contracted(budget, "best")
    rule = rule_of(budget, network, table=network.table, sampling="inverse-macs", sizes_per_step=sizes)
    return sizes_of(budget, network, rule, shares)


def scala(contraction: str, budget: Budget, shares: list[float]) -> Found:
    """Scala's rule on a contracted network ("paper" or "best"); the whole network is taught."""
    network = contracted(budget, contraction)
    rule = rule_of(budget, network, ScalaRule, table=uniform_sizes(network.model, min(shares)), sizes_per_step=4)
    return sizes_of(budget, network, rule, shares, training=Ladder)


def matformer(contraction: str, budget: Budget, shares: list[float]) -> Found:
    """MatFormer's rule on a contracted network, taught; sizes between the trained ones are mixed."""
    network = contracted(budget, contraction)
    rule = rule_of(budget, network, table=matformer_sizes(network.model))
    return sizes_of(budget, network, rule, shares, table=mixed_sizes(network.model))


def shared_depth(kind: type[Shared], budget: Budget, shares: list[float]) -> Found:
    """Blocks from shared weights; each step trains one depth, taught."""
    model = SharedDepth(budget.model, kind)
    trained = budget.train(model, DepthRule(model, budget.settings.seed))
    budget.spend(for_all_sizes=budget.epochs)
    return {share: trained.plain(blocks_within(budget, share)) for share in shares}


def wave(budget: Budget, shares: list[float]) -> Found:
    """Trains templates in the whole network, then for a tenth of the epochs the rest of each depth; taught."""
    model, each = SharedDepth(budget.model, Wave), max(1, budget.epochs // 10)
    whole = budget.train(model, epochs=budget.epochs - each)
    budget.spend(for_all_sizes=budget.epochs - each, for_each_size=each)
    found: Found = {}
    for share in shares:
        own = copy.deepcopy(whole).requires_grad_(True)
        own.depth = blocks_within(budget, share)
        for name, parameter in own.named_parameters():
            parameter.requires_grad_(not name.endswith("-templates"))
        found[share] = budget.train(own, epochs=each).plain(own.depth)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# One size at a time


def one_size(budget: Budget, shares: list[float]) -> Found:
    """Cut from the method "best", refitted by least squares, then trained alone, taught."""
    network, images = contracted(budget, "best"), [x for x, _ in budget.proxy()]
    found: Found = {}
    for share in shares:
        small = cut_of(network, share)
        if small is not None:
            refit(network.model, small, images, "logits")
            found[share] = budget.train(small)
    budget.spend(for_each_size=budget.epochs)
    return found


def torch_pruning(recipe: Recipe, budget: Budget, shares: list[float]) -> Found:
    """Torch-Pruning, then trained alone, taught."""
    batches = budget.proxy()
    gradients = gradients_of(budget.model, batches, "ce", "logits")
    found: Found = {}
    for share in smaller(shares):
        small = prune_within(budget.model, gradients, batches[0][0][:1], share * count_macs(budget.model), recipe)
        found[share] = None if small is None else budget.train(small)
    budget.spend(for_each_size=budget.epochs)
    return found


def variance_based(budget: Budget, shares: list[float]) -> Found:
    """VBP, then trained alone, taught."""
    cut = vbp(Task(budget.network, budget.proxy()))
    found: Found = {}
    for share in smaller(shares):
        small = cut(Size(macs=share))
        found[share] = None if small is None else budget.train(small)
    budget.spend(for_each_size=budget.epochs)
    return found


def wdpruning(budget: Budget, shares: list[float]) -> Found:
    """Trains thresholds for half of the epochs, then the network that they leave; taught."""
    importance = taylor_of_parts(budget)
    found: Found = {}
    first = budget.epochs // 2
    for share in smaller(shares):
        model = Gated(copy.deepcopy(budget.model), importance)
        fields = {"share": share, "shares": shares_of(budget.model)}
        learned = budget.train(model, training=Thresholds, fields=fields, epochs=first)
        small = pruned(learned, share)
        found[share] = None if small is None else budget.train(small, epochs=budget.epochs - first)
    budget.spend(for_each_size=budget.epochs)
    return found


def repavit(budget: Budget, shares: list[float]) -> Found:
    """Trains with the least important units idle, in the order of the paper's contraction, then folds them; taught."""
    model = contracted(budget, "paper").model
    found: Found = {}
    for share in smaller(shares):
        idle = idle_share(model, share)
        if idle is not None:
            found[share] = folded(budget.train(with_idle(copy.deepcopy(model), idle)))
    budget.spend(for_each_size=budget.epochs)
    return found


METHODS = {
    "best, untrained": Method(untrained, trains=False),
    "PIAD (the paper)": Method(paper),
    "RECIPE=best": Method(partial(best, 1)),
    "RECIPE=best, four sizes per step": Method(partial(best, 4)),
    "Scala": Method(partial(scala, "paper")),
    "Scala, from best": Method(partial(scala, "best")),
    "MatFormer": Method(partial(matformer, "paper")),
    "MatFormer, from best": Method(partial(matformer, "best")),
    "ALBERT": Method(partial(shared_depth, Albert)),
    "TLEG": Method(partial(shared_depth, Tleg)),
    "WAVE": Method(wave),
    "best, one size": Method(one_size, one_size=True),
    "Torch-Pruning": Method(partial(torch_pruning, Recipe()), one_size=True),
    "Isomorphic": Method(partial(torch_pruning, Recipe(isomorphic=True)), one_size=True),
    "VBP": Method(variance_based, one_size=True),
    "WDPruning": Method(wdpruning, one_size=True),
    "RePaViT": Method(repavit, one_size=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


def smaller(shares: list[float]) -> list[float]:
    """The shares below 1. At 1 there is nothing to prune, and all of these methods would train the same network."""
    return [share for share in shares if share < 1]


def contracted(budget: Budget, method: str) -> Network:
    """A copy of the network, contracted; with the method "best" it has a mask table."""
    network, settings = copied(budget.network), budget.settings
    ratio = settings.dropout_ratio if method == "best" else None
    contract_network(network, budget.proxy(), method=method, dropout_ratio=ratio)
    return network


def rule_of(
    budget: Budget,
    network: Network,
    rule: type[ProgressiveDropout] = ProgressiveDropout,
    *,
    proxy: Batches = (),
    ratio: float = 1.0,
    epochs: int = 0,
    table: MaskTable | None = None,
    **more: Any,
) -> ProgressiveDropout:
    """Makes the model of the network elastic and returns the rule of its training. By default the table stays fixed."""
    model, seed = make_elastic(network.model), budget.settings.seed
    return rule(model, proxy, ratio=ratio, epochs=epochs, seed=seed, table=table, **more)


def sizes_of(
    budget: Budget,
    network: Network,
    rule: ProgressiveDropout,
    shares: list[float],
    table: MaskTable | None = None,
    **how: Any,
) -> Found:
    """Trains the network under a rule for all epochs and cuts the sizes of `table`, or of the rule's."""
    network.model = budget.train(network.model, rule, **how)
    network.table = table or rule.table
    budget.spend(for_all_sizes=budget.epochs)
    return {share: cut_of(network, share) for share in shares}


def cut_of(network: Network, share: float) -> VisionTransformer | None:
    """The largest sub-network within a share of the MACs; None if every size of the mask table has more."""
    widths = widths_within(network, share)
    return None if widths is None else extract(network.model, widths).eval()


def blocks_within(budget: Budget, share: float) -> int:
    """The share of the network's blocks, rounded; at least 1."""
    return max(1, round(share * len(budget.model.blocks)))


def taylor_of_parts(budget: Budget) -> dict[str, Tensor]:
    """Kind -> (L, parts): the Taylor importance of the cross-entropy, summed over q, k, v and dims for a head."""
    importance = importance_by("taylor", copy.deepcopy(budget.model), budget.proxy(), "ce")
    blocks = range(len(budget.model.blocks))
    heads = torch.stack([importance[f"{index}.attn"].sum((0, 2)) for index in blocks])
    return {"heads": heads, "units": torch.stack([importance[f"{index}.mlp"] for index in blocks])}
