"""Networks of any depth whose blocks are made from shared weights, as in ALBERT, TLEG and WAVE.

Lan et al.: ALBERT: A Lite BERT for Self-supervised Learning of Language Representations, ICLR 2020: one block for all.
Xia et al.: Transformer as Linear Expansion of Learngene, AAAI 2024 (TLEG): blocks are a linear function of their place.
Feng et al.: WAVE: Weight Templates for Adaptive Initialization of Variable-sized Models, CVPR 2025: a weight is a sum
of Kronecker products of templates, which all blocks share, and small scalers of its own.

All start from the blocks of a pre-trained network, by least squares: from their mean, from the line through them, and
from the templates that come nearest to them. Only the way of sharing is theirs. In the papers, ALBERT has one depth;
TLEG trains a network of one depth, then trains each network of another depth without the linear rule; WAVE trains
templates in one network, then new scalers for each other size, and then each size by itself. Here the weights stay
shared, and the sizes differ only in depth.

L blocks of the whole network, D embedding.
"""

from __future__ import annotations

import copy
import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from models.parts import classify, embed
from piad.sampling import generator_of

SPLIT = 2  # rows and columns of WAVE's scalers
TEMPLATES = 2 * SPLIT**2  # of a weight: as many numbers as in the two blocks that TLEG learns


class Shared(nn.Module):
    """Makes the weights of blocks from parameters that blocks share.

    blocks: block by block, parameter name -> weight, of the network that it starts from.
    """

    def __init__(self, blocks: list[dict[str, Tensor]]):
        super().__init__()
        self.names = list(blocks[0])
        self.weights = nn.ParameterDict()
        for name in self.names:
            for part, value in self.start(torch.stack([block[name] for block in blocks])).items():
                self.weights[self.key(name, part)] = nn.Parameter(value.contiguous())

    @staticmethod
    def key(name: str, part: str) -> str:
        return f"{name}.{part}".replace(".", "-")  # a ParameterDict takes no dots

    def start(self, stacked: Tensor) -> dict[str, Tensor]:
        """The parameters that come nearest to the weights (L, ...) of all blocks: part -> values."""
        raise NotImplementedError

    def block(self, index: int, depth: int) -> dict[str, Tensor]:
        """Parameter name -> weight of a block (0 to depth - 1) of a network of `depth` blocks."""
        return {name: self.weight(name, index, depth) for name in self.names}

    def weight(self, name: str, index: int, depth: int) -> Tensor:
        raise NotImplementedError


class Albert(Shared):
    """All blocks are one."""

    def start(self, stacked: Tensor) -> dict[str, Tensor]:
        return {"all": stacked.mean(0)}

    def weight(self, name: str, index: int, depth: int) -> Tensor:
        return self.weights[self.key(name, "all")]


class Tleg(Shared):
    """A block at place l of 1..depth is A + l / depth * B."""

    def start(self, stacked: Tensor) -> dict[str, Tensor]:
        places = torch.arange(1, len(stacked) + 1, dtype=torch.float64, device=stacked.device) / len(stacked)
        design = torch.stack([torch.ones_like(places), places], 1)  # (L, 2)
        found = torch.linalg.pinv(design) @ stacked.double().flatten(1)
        first, slope = found.to(stacked.dtype).view(2, *stacked.shape[1:])
        return {"first": first, "slope": slope}

    def weight(self, name: str, index: int, depth: int) -> Tensor:
        first, slope = (self.weights[self.key(name, part)] for part in ("first", "slope"))
        return first + (index + 1) / depth * slope


class Wave(Shared):
    """A matrix of a block is the sum over templates t of scaler (a, b) x template (m / a, n / b), Kronecker products.

    Biases and norms are the blocks' own. A network of fewer blocks takes the scalers of some, evenly spaced.
    """

    def start(self, stacked: Tensor) -> dict[str, Tensor]:
        if stacked.ndim != 3:
            return {"own": stacked}
        L, m, n = stacked.shape
        a, b = math.gcd(m, SPLIT), math.gcd(n, SPLIT)
        tiles = stacked.view(L, a, m // a, b, n // b).transpose(2, 3).reshape(L * a * b, -1)
        left, values, right = torch.linalg.svd(tiles.double(), full_matrices=False)
        kept = min(TEMPLATES, len(values))
        scalers = (left * values)[:, :kept].view(L, a, b, kept).to(stacked.dtype)
        return {"scalers": scalers, "templates": right[:kept].view(kept, m // a, n // b).to(stacked.dtype)}

    def weight(self, name: str, index: int, depth: int) -> Tensor:
        own = self.key(name, "own")
        if own in self.weights:
            return self.weights[own][self.taken(len(self.weights[own]), depth)[index]]
        scalers, templates = (self.weights[self.key(name, part)] for part in ("scalers", "templates"))
        scaler = scalers[self.taken(len(scalers), depth)[index]]
        weight = torch.einsum("abt,tij->aibj", scaler, templates)
        return weight.reshape(scaler.shape[0] * templates.shape[1], -1)

    @staticmethod
    def taken(blocks: int, depth: int) -> list[int]:
        """Which blocks a network of fewer has: evenly spaced, the last one included."""
        return [-(-blocks * (index + 1) // depth) - 1 for index in range(depth)]


class SharedDepth(nn.Module):
    """A ViT of any depth up to that of `model`, whose blocks come from a Shared; everything else is its own.

    depth: number of blocks that forward() runs.
    """

    def __init__(self, model: VisionTransformer, kind: type[Shared]):
        super().__init__()
        blocks = [dict(block.state_dict()) for block in model.blocks]
        self.shared, self.depth = kind(blocks), len(blocks)
        self.outer = copy.deepcopy(model)
        self.outer.blocks = nn.Sequential()
        self.like = [model.blocks[0]]  # in a list, since its parameters are not this module's

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, height, width) -> logits (B, classes)."""
        x = embed(self.outer, images)
        for index in range(self.depth):
            x = functional_call(self.like[0], self.shared.block(index, self.depth), (x,))
        return classify(self.outer, x)

    def no_weight_decay(self) -> set[str]:
        """The names of parameters that the optimizer does not decay, besides those of one dimension; timm asks."""
        outer = {f"outer.{name}" for name in self.outer.no_weight_decay()}
        return outer | {name for name, _ in self.named_parameters() if name.endswith("-own")}  # biases and norms

    def plain(self, depth: int) -> VisionTransformer:
        """A network of this depth with weights of its own."""
        model = copy.deepcopy(self.outer)
        model.blocks = nn.Sequential(*(copy.deepcopy(self.like[0]) for _ in range(depth)))
        for index, block in enumerate(model.blocks):
            block.load_state_dict(self.shared.block(index, depth))
        return model


class DepthRule:
    """Each step trains one depth, drawn uniformly in the logarithm from 1 to all blocks."""

    sizes_per_step = 1

    def __init__(self, model: SharedDepth, seed: int):
        self.model, self.seed, self.deepest = model, seed, model.depth

    def begin_epoch(self, epoch: int) -> None:
        """Does nothing."""

    def choose(self, *, epoch: int, step: int, rank: int, number: int = 0) -> int:
        """Draws the depth of the step, and returns it."""
        drawn = generator_of(self.seed, epoch, step, 0).uniform(0, math.log(self.deepest + 1))
        self.model.depth = min(int(math.exp(drawn)), self.deepest)
        return self.model.depth

    def step_scalars(self) -> dict[str, float]:
        """There is nothing to log."""
        return {}
