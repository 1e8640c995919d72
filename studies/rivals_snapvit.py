"""SnapViT: hidden units and heads by gradient importance, written from its paper's description.

Simoncini, Dorkenwald, Blankevoort, Snoek, Asano: Elastic ViTs from Pretrained Models without Retraining, NeurIPS 2025.

1. Importance: the squared gradient of a self-supervised loss between crops of the same image, its mean over the weights
   of a unit (its row of fc1) or of a head (its rows of v). It needs neither labels nor a head.
2. Multipliers: an importance is multiplied by a number for the MLP of each block, and for each head. An evolution
   strategy (xNES) looks for those with which the pooled outputs of four cut networks are nearest to the whole one's.
   The search runs them in bfloat16.
3. Units are then ranked over all blocks, and so are heads; each block keeps a few.
4. Correction: in running order, the last layers of the branches predict what they lost by least squares, as SparseGPT
   does, on inputs that are not centred.

The authors' code draws one crop for all views of an image and corrects from left to right, so that a removed input is
predicted only by those after it. Here each view has a crop of its own, and all remaining inputs predict.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from models.targets import output_of
from studies.rivals_cut import Collector, InputMoments, check_plain, cut_in_order, keep_heads, keep_units
from studies.rivals_task import Cutter, Size, Task, macs_without, smallest_cut
from utils import mixed_seed, progress_bar
from wpac.compensation import Compensation

GLOBAL, LOCAL = (2, (0.25, 1.0)), (10, (0.05, 0.25))  # number of crops, and the shares of the image that they show
IMAGES = 1000  # at most, for the importance and for the search
CHUNK = 4  # images whose crops run together
MIN_UNITS, MIN_HEADS = 0.05, 0.2  # shares that each block keeps
SEARCHED = ((0.15, 0.0), (0.35, 0.2), (0.55, 0.4), (0.65, 0.5))  # shares of units and of heads removed, in the search
FEWER_HEADS = 0.15  # the share of heads that is removed is that of units less this
EVALUATIONS = 50
COMPONENTS = 192  # principal components of the outputs, in which they are compared
FIRST, LAST = 1.2, 0.8  # multipliers of the first and the last block before the search
DAMPING = 1e-2  # share of the mean square of the inputs that is added to the diagonal


@dataclass
class Importance:
    """Of hidden units (L, M), and of heads (L, H); L blocks."""

    units: Tensor
    heads: Tensor

    def times(self, multipliers: Tensor) -> Importance:
        """Multiplied by (L + L H,) numbers: of the MLP of each block, then of each head."""
        blocks = len(self.units)
        units, heads = multipliers.abs().to(self.units).split([blocks, self.heads.numel()])
        return Importance(self.units * units[:, None], self.heads * heads.view_as(self.heads))


def snapvit(task: Task, corrected: bool) -> Cutter:
    """Searches the multipliers; see the top of this file. corrected: whether the last layers are."""
    check_plain(task.model)
    importance, model = task.shared("snapvit", lambda: found_importance(task)), task.model

    def macs(share: float) -> int:
        kept = [kept_of(*part) for part in parts_of(importance, share, max(0.0, share - FEWER_HEADS))]
        units, heads = (int((~part).sum()) for part in kept)
        return macs_without(model, units=units, heads=heads)

    def cut(size: Size) -> VisionTransformer | None:
        if size.macs is not None:
            share = smallest_cut(macs, size.macs * macs_without(model))
            return None if share is None else cut(Size(mlp=share, heads=max(0.0, share - FEWER_HEADS)))
        if size.qk:
            return None
        small = copy.deepcopy(model)
        if corrected:
            return corrected_cut(small, importance, size.mlp, size.heads, task.images)
        return plain_cut(small, importance, size.mlp, size.heads)

    return cut


def found_importance(task: Task) -> Importance:
    """The importance, times the multipliers that are found, which are taken from task.searches if they are there."""
    images = torch.cat(task.images)[:IMAGES]
    importance = gradient_importance(task.model, images, task.seed)
    if "snapvit" in task.searches:
        task.borrowed += task.searches["snapvit"]["seconds"]
    else:
        start = time.process_time()
        fitness = fitness_of(task.model, importance, images.split(len(task.images[0])))
        multipliers, distance = minimise(fitness, starting_multipliers(importance), EVALUATIONS, task.seed)
        found = {"multipliers": multipliers.tolist(), "distance": distance}
        task.searches["snapvit"] = found | {"seconds": time.process_time() - start}
    return importance.times(torch.tensor(task.searches["snapvit"]["multipliers"], dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# Importance


def gradient_importance(model: VisionTransformer, images: Tensor, seed: int) -> Importance:
    """The importance by the gradient over the images (B, C, height, width), without multipliers."""
    weights = [layer.weight for block in model.blocks for layer in (block.mlp.fc1, block.attn.qkv)]
    sums = [torch.zeros_like(weight) for weight in weights]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(seed))
        for chunk in progress_bar(images.split(CHUNK), "importance"):
            views = crops(chunk)
            features = output_of(model, views.flatten(0, 1), "features").unflatten(0, views.shape[:2])
            gradients = torch.autograd.grad(self_supervised_loss(features) / len(images), weights)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient
    heads = model.blocks[0].attn.num_heads
    units = torch.stack([gradient.square().mean(1) for gradient in sums[::2]])
    v = torch.stack([gradient.chunk(3)[2].unflatten(0, (heads, -1)) for gradient in sums[1::2]])
    return Importance(units.double(), v.square().mean((2, 3)).double())


def crops(images: Tensor) -> Tensor:
    """Random crops of images (B, C, height, width), all resized to their size: (views, B, C, height, width)."""
    views = []
    for count, scale in (GLOBAL, LOCAL):
        crop = v2.RandomResizedCrop(images.shape[-2:], scale=scale)
        views += [torch.stack([crop(image) for image in images]) for _ in range(count)]
    return torch.stack(views)


def self_supervised_loss(features: Tensor) -> Tensor:
    """How far the outputs (views, B, D) of all views are from those of the global ones; summed over images.

    The cross-entropy of the softmax of normalised outputs. Each global view teaches all views but itself.
    """
    features = F.normalize(features, dim=-1)
    teachers, students = features[: GLOBAL[0]].detach().softmax(-1), features.log_softmax(-1)
    crossed = -torch.einsum("tbd,sbd->ts", teachers, students)
    return crossed.sum() - crossed.diagonal().sum()


# ---------------------------------------------------------------------------------------------------------------------
# Cutting


def parts_of(importance: Importance, mlp: float, heads: float) -> list[tuple[Tensor, float, int]]:
    """For units and for heads: importance, the share that is removed, and the number that each block keeps at least."""
    fewest = int(MIN_UNITS * importance.units.shape[1]), int(MIN_HEADS * importance.heads.shape[1])
    return [(importance.units, mlp, max(1, fewest[0])), (importance.heads, heads, max(1, fewest[1]))]


def kept_of(importance: Tensor, share: float, fewest: int) -> Tensor:
    """Which units or heads stay, (L, n) of truth values, if a share of them is removed, the least important of all."""
    scores, count = importance.clone(), importance.numel()
    scores.scatter_(1, importance.topk(fewest, dim=1).indices, torch.inf)
    removed = min(int(share * count), count - fewest * len(importance))
    kept = torch.ones(count, dtype=torch.bool, device=importance.device)
    kept[scores.flatten().argsort(stable=True)[:removed]] = False
    return kept.view_as(importance)


def orders_of(importance: Importance, mlp: float, heads: float) -> list[list[tuple[Tensor, int]]]:
    """For each block, for its units and for its heads: their order, most important first, and how many stay."""
    found = []
    for scores, share, fewest in parts_of(importance, mlp, heads):
        kept = kept_of(scores, share, fewest)
        orders = scores.argsort(dim=1, descending=True, stable=True)
        found.append(list(zip(orders, kept.sum(1).tolist(), strict=True)))
    return [list(block) for block in zip(*found, strict=True)]


def plain_cut(small: VisionTransformer, importance: Importance, mlp: float, heads: float) -> VisionTransformer:
    """Cuts the network in place, and returns it."""
    for block, (units, kept_heads) in zip(small.blocks, orders_of(importance, mlp, heads), strict=True):
        keep_units(block.mlp, *units)
        keep_heads(block.attn, *kept_heads)
    return small


def corrected_cut(
    small: VisionTransformer, importance: Importance, mlp: float, heads: float, images: Iterable[Tensor]
) -> VisionTransformer:
    """Cuts the network in place and corrects the last layers of its branches in running order; returns it."""
    orders = orders_of(importance, mlp, heads)

    def watch(block: Block) -> dict[nn.Module, Collector]:
        return {layer: InputMoments(layer) for layer in (block.mlp.fc2, block.attn.proj)}

    def cut(index: int, block: Block, collectors: list[Collector]) -> None:
        (units, count), (heads, kept) = orders[index]
        hidden, mixed = collectors
        if count < len(units):
            keep_units(block.mlp, units, count, uncentred_prediction(hidden, units))
        if kept < len(heads):
            dims = torch.arange(len(mixed.mean), device=heads.device).view(len(heads), -1)[heads].flatten()
            keep_heads(block.attn, heads, kept, uncentred_prediction(mixed, dims))

    return cut_in_order(small, images, watch, cut)


def uncentred_prediction(moments: InputMoments, order: Tensor) -> Compensation:
    """Predicts the last inputs of the order from the first ones, without a constant."""
    second = moments.second[order][:, order].cpu()
    mean = second.diagonal().mean()
    second.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    return Compensation(second.new_zeros(len(order)), torch.linalg.cholesky(second), torch.ones(1))


# ---------------------------------------------------------------------------------------------------------------------
# Search


def starting_multipliers(importance: Importance) -> Tensor:
    """Multipliers (L + L H,) that fall from the first block to the last."""
    falling = torch.linspace(FIRST, LAST, len(importance.units), dtype=torch.float64)
    return torch.cat([falling, falling.repeat_interleave(importance.heads.shape[1])])


def fitness_of(
    model: VisionTransformer, importance: Importance, batches: Iterable[Tensor]
) -> Callable[[Tensor], float]:
    """A function from multipliers to the distance of cut networks' outputs from the whole one's.

    It is the mean over SEARCHED of 1 - cosine between their pooled outputs, in the principal components of the latter.
    """
    batches = list(batches)

    @torch.inference_mode()
    def outputs(network: VisionTransformer) -> Tensor:
        with torch.autocast(batches[0].device.type, dtype=torch.bfloat16):  # float64 stays as it is
            return torch.cat([output_of(network, images, "features") for images in batches]).double()

    whole = outputs(model)
    mean, axes = whole.mean(0), torch.eye(whole.shape[1]).to(whole)
    if min(whole.shape) > COMPONENTS:
        axes = torch.linalg.svd(whole - mean, full_matrices=False).Vh[:COMPONENTS].mT
    expected = (whole - mean) @ axes

    def fitness(multipliers: Tensor) -> float:
        found = importance.times(multipliers)
        distances = []
        for mlp, heads in SEARCHED:
            projected = (outputs(plain_cut(copy.deepcopy(model), found, mlp, heads)) - mean) @ axes
            distances.append(1 - F.cosine_similarity(projected, expected).mean().item())
        return sum(distances) / len(distances)

    return fitness


def minimise(fitness: Callable[[Tensor], float], start: Tensor, evaluations: int, seed: int) -> tuple[Tensor, float]:
    """The best point (n,) of a search by exponential natural evolution strategy (xNES), and its fitness.

    Glasmachers, Schaul, Sun, Wierstra, Schmidhuber: Exponential Natural Evolution Strategies, GECCO 2010, with their
    default population, utilities and rates. The first population is spread by 1 around `start`, (n,), in float64.
    """
    generator, n = torch.Generator().manual_seed(mixed_seed(seed)), len(start)
    population, rate = 4 + int(3 * math.log(n)), 0.6 * (3 + math.log(n)) / (n * math.sqrt(n))
    utility = (math.log(population / 2 + 1) - torch.arange(1, population + 1, dtype=torch.float64).log()).clamp(min=0)
    utility = utility / utility.sum() - 1 / population
    mean, root, best, lowest = start.clone(), torch.eye(n, dtype=torch.float64), start, math.inf
    drawn, values = [], []
    for _ in progress_bar(range(evaluations), "search"):
        drawn.append(torch.randn(n, generator=generator, dtype=torch.float64))
        point = mean + root @ drawn[-1]
        values.append(fitness(point))
        if values[-1] < lowest:
            best, lowest = point, values[-1]
        if len(drawn) == population:
            steps = torch.stack(drawn)[torch.tensor(values).argsort(stable=True)]
            mean = mean + root @ (utility @ steps)
            root = root @ torch.linalg.matrix_exp(rate / 2 * (steps.mT * utility) @ steps)
            drawn, values = [], []
    return best, lowest
