"""The methods that studies.rivals compares: each takes a task and gives a function from a size to a cut network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from timm.models.vision_transformer import VisionTransformer

from models.backbone import Backbone, full_widths
from models.extraction import extract
from models.macs import count_macs
from models.targets import default_cost
from studies.criteria import importance_by, sort_dims
from studies.dependency_pruning import Recipe, gradients_of, prune_within
from studies.rivals_corp import corp
from studies.rivals_snapvit import snapvit
from studies.rivals_task import Cutter, Size, Task, smallest_cut
from studies.rivals_vbp import vbp
from supernet import Network
from supernet.contraction import contract_network
from wpac.refit import refit

DROPOUT_RATIO = 0.95  # share of the MACs that the mask table of the method "best" can drop


def by_criterion(criterion: str, task: Task) -> Cutter:
    """Dims of each module ranked by studies.criteria, and the same share of every module cut."""
    model, target = copy.deepcopy(task.model), task.network.target
    cost = "logit" if target == "logits" else default_cost(target)
    sort_dims(model, importance_by(criterion, model, task.batches, cost, task.seed, target))
    return partial(uniform, model)


def wpac(task: Task) -> Cutter:
    """The paper's contraction, and the same share of every module cut."""
    network = copied(task.network)
    contract_network(network, task.batches, method="paper", cost="logit" if network.target == "logits" else None)
    return partial(uniform, network.model)


def best(task: Task, steps: int | None = None) -> Cutter:
    """The method "best": compensated, of widths by its own mask table.

    steps: None, or the sub-networks are refitted on the same images, by least squares (0) or by steps per block.
    """

    def contracted() -> Network:
        network = copied(task.network)
        contract_network(network, task.batches, method="best", dropout_ratio=DROPOUT_RATIO)
        return network

    network = task.shared("best", contracted)

    def cut(size: Size) -> VisionTransformer | None:
        widths = widths_without(network.model, size)
        if size.macs is not None:
            widths = widths_within(network, size.macs)
        small = None if widths is None else extract(network.model, widths)
        if small is not None and steps is not None:
            refit(network.model, small, task.images, network.target, steps, task.seed)
        return small

    return cut


def package(recipe: Recipe, task: Task) -> Cutter:
    """Torch-Pruning. Where the outputs are features or tokens, whose length it would change, it keeps the embedding."""
    model, target = task.model, task.network.target
    cost = "ce" if target == "logits" else default_cost(target)
    gradients = task.shared("gradients", lambda: gradients_of(model, task.batches, cost, target))

    def cut(size: Size) -> VisionTransformer | None:
        if size.macs is None or (target != "logits" and not recipe.bottleneck):
            return None
        return prune_within(model, gradients, task.images[0][:1], size.macs * count_macs(model), recipe)

    return cut


METHODS: dict[str, Callable[[Task], Cutter]] = {
    "random": partial(by_criterion, "random"),
    "magnitude": partial(by_criterion, "magnitude"),
    "Taylor": partial(by_criterion, "taylor"),
    "Hessian": partial(by_criterion, "hessian"),
    "Torch-Pruning": partial(package, Recipe()),
    "Torch-Pruning, bottleneck": partial(package, Recipe(bottleneck=True)),
    "Isomorphic": partial(package, Recipe(isomorphic=True)),
    "Isomorphic, bottleneck": partial(package, Recipe(bottleneck=True, isomorphic=True)),
    "VBP": vbp,
    "SnapViT, not corrected": partial(snapvit, corrected=False),
    "SnapViT": partial(snapvit, corrected=True),
    "CORP, statistics of the whole network": partial(corp, sequential=False),
    "CORP": partial(corp, sequential=True),
    "WPAC (the paper)": wpac,
    "best": best,
    "best, refitted": partial(best, steps=0),
    "best, refitted by 400 steps per block": partial(best, steps=400),
}


def copied(network: Network) -> Network:
    """The network with a model of its own, to be contracted."""
    return replace(network, model=copy.deepcopy(network.model))


def widths_within(network: Network, share: float) -> dict[str, int] | None:
    """The widths of the largest size within a share of the MACs; None if every size of the mask table has more."""
    limit = share * network.macs()
    return network.table.widths(network.select(max_macs=limit)) if network.macs(-1) <= limit else None


def uniform(model: Backbone, size: Size) -> VisionTransformer | None:
    """The sub-network whose modules all keep the same share within the MACs, or those of widths_without()."""
    if size.macs is None:
        widths = widths_without(model, size)
        return None if widths is None else extract(model, widths)
    limit = size.macs * count_macs(model)
    share = smallest_cut(lambda share: count_macs(model, kept_widths(model, share)), limit)
    return None if share is None else extract(model, kept_widths(model, share))


def kept_widths(model: Backbone, removed: float) -> dict[str, int]:
    """Widths without this share of every module; one dim at least stays."""
    return {key: max(1, width - int(removed * width)) for key, width in full_widths(model).items()}


def widths_without(model: Backbone, size: Size) -> dict[str, int] | None:
    """The widths of a size that removes hidden units and heads, or dims of all heads; None for other sizes."""
    if size.macs is not None or size.qk:
        return None
    removed = {"mlp": size.mlp, "attn": size.heads}
    return {key: width - int(removed[key.split(".")[1]] * width) for key, width in full_widths(model).items()}
