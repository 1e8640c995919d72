"""The ways that studies.rivals_trained compares: each takes a budget and gives a network for each share of the MACs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.elastic import make_elastic
from models.extraction import extract
from models.macs import count_macs
from piad.progressive import ProgressiveDropout
from studies.budget import Budget
from studies.dependency_pruning import Recipe, gradients_of, prune_within
from studies.rivals_depth import Albert, DepthRule, Shared, SharedDepth, Tleg, Wave
from studies.rivals_one_size import Gated, Thresholds, folded, idle_share, pruned, shares_of, with_idle
from studies.rivals_widths import Ladder, NestedRule, ScalaRule, Widths, matformer_sizes, uniform_sizes
from supernet import Network
from supernet.contraction import contract_network
from wpac.refit import refit

Found = dict[float, nn.Module | None]  # share of the MACs -> a plain network, None where the way has none
Way = Callable[[Budget, list[float]], Found]


# ---------------------------------------------------------------------------------------------------------------------
# Networks of many sizes


def untrained(budget: Budget, shares: list[float]) -> Found:
    """The method "best", as it is cut."""
    network = contracted(budget, "best")
    return {share: cut_of(network, share) for share in shares}


def paper(budget: Budget, shares: list[float]) -> Found:
    """The paper's contraction and PIAD, whose table grows for half of the epochs, with labels."""
    network = contracted(budget, "paper")
    model, settings = make_elastic(network.model), budget.settings
    half = max(1, budget.epochs // 2)
    rule = ProgressiveDropout(
        model, budget.proxy(), ratio=settings.dropout_ratio, epochs=half, seed=settings.seed, table=None
    )
    network.model = budget.train(model, rule, taught=False)
    network.table = rule.table
    budget.spend(once=budget.epochs)
    return {share: cut_of(network, share) for share in shares}


def best(budget: Budget, shares: list[float]) -> Found:
    """RECIPE=best: the method "best" with its mask table, taught, sizes drawn uniformly in log MACs."""
    network = contracted(budget, "best")
    model, seed = make_elastic(network.model), budget.settings.seed
    rule = ProgressiveDropout(
        model, [], ratio=1.0, epochs=0, seed=seed, table=network.table, sampling="log-macs"
    )  # fmt: skip
    network.model = budget.train(model, rule)
    budget.spend(once=budget.epochs)
    return {share: cut_of(network, share) for share in shares}


def scala(budget: Budget, shares: list[float]) -> Found:
    """Scala's rule on the paper's contraction."""
    model = make_elastic(contracted(budget, "paper").model)
    sizes = uniform_sizes(model, min(shares))
    trained = budget.train(model, ScalaRule(model, sizes, budget.settings.seed), kind=Ladder)
    budget.spend(once=budget.epochs)
    return nested(trained, sizes, shares)


def matformer(budget: Budget, shares: list[float]) -> Found:
    """MatFormer's rule on the paper's contraction, taught."""
    model = make_elastic(contracted(budget, "paper").model)
    sizes = matformer_sizes(model)
    trained = budget.train(model, NestedRule(model, sizes, budget.settings.seed))
    budget.spend(once=budget.epochs)
    return nested(trained, sizes, shares)


def shared_depth(kind: type[Shared], budget: Budget, shares: list[float]) -> Found:
    """Blocks from shared weights; each step trains one depth, taught."""
    model = SharedDepth(budget.model, kind)
    depths = {share: max(1, round(share * model.depth)) for share in shares}
    trained = budget.train(model, DepthRule(model, budget.settings.seed))
    budget.spend(once=budget.epochs)
    return {share: trained.plain(depth) for share, depth in depths.items()}


def wave(budget: Budget, shares: list[float]) -> Found:
    """Templates are trained in the whole network; then, for a tenth of the epochs, what each depth has of its own."""
    model, each = SharedDepth(budget.model, Wave), max(1, budget.epochs // 10)
    whole = budget.train(model, epochs=budget.epochs - each)
    budget.spend(once=budget.epochs - each, each=each)
    found: Found = {}
    for share in shares:
        own = copy.deepcopy(whole).requires_grad_(True)
        own.depth = max(1, round(share * len(budget.model.blocks)))
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
    budget.spend(each=budget.epochs)
    return found


def torch_pruning(recipe: Recipe, budget: Budget, shares: list[float]) -> Found:
    """Torch-Pruning, then trained alone, taught."""
    batches = budget.proxy()
    gradients = gradients_of(budget.model, batches, "ce", "logits")
    found: Found = {}
    for share in shares:
        limit, example = share * count_macs(budget.model), batches[0][0][:1]
        small = prune_within(budget.model, gradients, example, limit, recipe) if share < 1 else budget.copied().model
        found[share] = None if small is None else budget.train(small)
    budget.spend(each=budget.epochs)
    return found


def wdpruning(budget: Budget, shares: list[float]) -> Found:
    """Thresholds are trained for half of the epochs, then the plain network that they leave; taught."""
    importance = taylor_of_parts(budget)
    found: Found = {}
    first = max(1, budget.epochs // 2)
    for share in shares:
        model = Gated(budget.copied().model, importance)
        more = {"share": share, "shares": shares_of(budget.model)}
        learned = budget.train(model, kind=Thresholds, more=more, epochs=first)
        small = pruned(learned, share)
        found[share] = None if small is None else budget.train(small, epochs=max(1, budget.epochs - first))
    budget.spend(each=budget.epochs)
    return found


def repavit(budget: Budget, shares: list[float]) -> Found:
    """The units that matter least, by the paper's contraction, are idle in training; then they are folded; taught."""
    model = contracted(budget, "paper").model
    found: Found = {}
    for share in shares:
        idle = idle_share(model, share)
        if idle is not None:
            found[share] = folded(budget.train(with_idle(copy.deepcopy(model), idle)))
    budget.spend(each=budget.epochs)
    return found


WAYS: dict[str, Way] = {
    "best, untrained": untrained,
    "PIAD (the paper)": paper,
    "RECIPE=best": best,
    "Scala": scala,
    "MatFormer": matformer,
    "ALBERT": partial(shared_depth, Albert),
    "TLEG": partial(shared_depth, Tleg),
    "WAVE": wave,
    "best, one size": one_size,
    "Torch-Pruning": partial(torch_pruning, Recipe()),
    "Isomorphic": partial(torch_pruning, Recipe(isomorphic=True)),
    "WDPruning": wdpruning,
    "RePaViT": repavit,
}


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


def contracted(budget: Budget, method: str) -> Network:
    """A copy of the network, contracted; with the method "best" it has a mask table."""
    network, settings = budget.copied(), budget.settings
    ratio = settings.dropout_ratio if method == "best" else None
    contract_network(network, budget.proxy(), method=method, dropout_ratio=ratio)
    return network


def cut_of(network: Network, share: float) -> VisionTransformer | None:
    """The largest size of the mask table within a share of the MACs; None where there is none."""
    limit = share * network.macs()
    if network.macs(len(network.table) - 1) > limit:
        return None
    return extract(network.model, network.table.widths(network.select(max_macs=limit))).eval()


def nested(model: VisionTransformer, sizes: list[Widths], shares: list[float]) -> Found:
    """The largest of the sizes within each share of the MACs."""
    macs, whole = [count_macs(model, widths) for widths in sizes], count_macs(model)
    found: Found = {}
    for share in shares:
        fitting = [place for place, amount in enumerate(macs) if amount <= share * whole]
        found[share] = extract(model, sizes[fitting[0]]).eval() if fitting else None
    return found


def taylor_of_parts(budget: Budget) -> dict[str, Tensor]:
    """kind -> (L, parts): what the loss would change, to first order, without a head or a hidden unit; squared."""
    model = budget.model
    gradients = gradients_of(model, budget.proxy(), "ce", "logits")
    named = {name: (p.detach() * g) for (name, p), g in zip(model.named_parameters(), gradients, strict=True)}
    heads = [named[f"blocks.{i}.attn.proj.weight"].sum(0) for i in range(len(model.blocks))]
    units = [named[f"blocks.{i}.mlp.fc2.weight"].sum(0) for i in range(len(model.blocks))]
    number = model.blocks[0].attn.num_heads
    return {
        "heads": torch.stack(heads).unflatten(1, (number, -1)).sum(2).square(),
        "units": torch.stack(units).square(),
    }
