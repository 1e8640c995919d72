"""CORP: closed-form pruning of hidden units and of the dims of q and k, written from its paper's description.

Zhang, Yang: CORP: Closed-Form One-shot Representation-Preserving Structured Pruning for Vision Transformers,
arXiv 2602.05243. Every block loses the same shares.

Hidden units are ranked by their active energy, the mean of x^2 times the share of tokens at which x is active. What the
removed units gave is predicted from the others by ridge regression, which is folded into fc2.

Dims of q and k are ranked in each head by their logit energy, the squared norm of what a dim adds to the scores of an
image. With q = (q_S, q_P) and k = (k_S, k_P), S the dims that stay, the scores lose q_P^T k_P, which is replaced by
q_S^T M k_S: with G and C the second moments within S and between S and P, M solves G_q M G_k + r M = C_q C_k^T. The
factors of 1 + M = U V^T are folded into q and k. The authors' code makes 1 + M symmetric before it is factorised and
divides the scores by the root of the smaller number of dims; leaving both out is better, and is what is done here.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from studies.rivals_cut import Collector, InputMoments, check_plain, cut_in_order, keep_units, narrow_query_key
from studies.rivals_task import Cutter, Size, Task, macs_without, smallest_cut
from wpac.compensation import Compensation

ACTIVE = 0.01  # times the root mean square of a layer's activations: below it, a unit is not active
RIDGE = 1e-3  # added to the variances at least
MIN_UNITS, MIN_DIMS = 64, 8  # that every MLP and every head keep


class QueryKeyMoments:
    """Moments of q and k of each head over all tokens, from the outputs of qkv; sums in float64.

    second (2, H, d, d), mean (2, H, d): of q and of k.  energy (H, d): mean over images of the squared norm of what a
    dim adds to the scores, (sum over tokens of q^2) (sum over tokens of k^2).  tokens: their number.
    """

    def __init__(self, attn: Attention):
        self.heads, self.tokens, self.images = attn.num_heads, 0, 0
        shape, more = (attn.num_heads, attn.head_dim), {"dtype": torch.float64, "device": attn.qkv.weight.device}
        self._second, self._first = torch.zeros(2, *shape, shape[1], **more), torch.zeros(2, *shape, **more)
        self._energy = torch.zeros(shape, **more)

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Adds a batch of what qkv gives, `outputs` of shape (B, N, 3 H d)."""
        qk = outputs.unflatten(-1, (3, self.heads, -1))[:, :, :2].permute(2, 3, 0, 1, 4).double()  # (2, H, B, N, d)
        self._energy += qk.square().sum(3).prod(0).sum(1)
        rows = qk.flatten(2, 3)  # (2, H, B N, d)
        self._second += rows.mT @ rows
        self._first += rows.sum(2)
        self.tokens, self.images = self.tokens + rows.shape[2], self.images + qk.shape[2]

    @property
    def second(self) -> Tensor:
        return self._second / self.tokens

    @property
    def mean(self) -> Tensor:
        return self._first / self.tokens

    @property
    def energy(self) -> Tensor:
        return self._energy / self.images


def corp(task: Task, sequential: bool) -> Cutter:
    """Gives a function that cuts networks; see the top of this file.

    sequential: see rivals_cut.cut_in_order(). The authors' code takes new statistics after each block.
    """
    model = task.model
    check_plain(model)
    hidden, dims = model.blocks[0].mlp.fc1.out_features, model.blocks[0].attn.head_dim
    fewest = min(MIN_UNITS, hidden), min(MIN_DIMS, dims)

    def kept(size: Size) -> tuple[int, int]:
        """Units, and dims of q and k, that each block would keep."""
        return hidden - int(hidden * size.mlp), dims - int(dims * size.qk)

    def equal_shares(share: float) -> tuple[int, int]:
        """The same share of both is removed, but a block keeps the fewest of each."""
        units, narrow = kept(Size(mlp=share, qk=share))
        return max(units, fewest[0]), max(narrow, fewest[1])

    def macs(share: float) -> int:
        units, narrow = equal_shares(share)
        return macs_without(model, units=len(model.blocks) * (hidden - units), qk=len(model.blocks) * (dims - narrow))

    def cut(size: Size) -> VisionTransformer | None:
        if size.macs is None:
            units, narrow = kept(size)
            if size.heads or units < fewest[0] or narrow < fewest[1]:
                return None
        else:
            share = smallest_cut(macs, size.macs * macs_without(model))
            if share is None:
                return None
            units, narrow = equal_shares(share)
        step = partial(cut_block, units=units, dims=narrow)
        return cut_in_order(copy.deepcopy(model), task.images, watch, step, sequential)

    return cut


def watch(block: Block) -> dict[nn.Module, Collector]:
    """The collectors of a block: of q and k, and of the hidden units."""
    return {block.attn.qkv: QueryKeyMoments(block.attn), block.mlp.fc2: InputMoments(block.mlp.fc2, ACTIVE)}


def cut_block(_index: int, block: Block, collectors: list[Collector], units: int, dims: int) -> None:
    """Cuts a block to `units` hidden units and `dims` dims of q and k per head."""
    query_key, hidden = collectors
    if units < len(hidden.mean):
        energy = hidden.second.diagonal() * hidden.active
        order = energy.argsort(descending=True, stable=True)
        keep_units(block.mlp, order, units, ridge_prediction(hidden, order, units))
    if dims < query_key.mean.shape[-1]:
        narrow_query_key(block.attn, score_maps(query_key, dims))


def ridge_prediction(hidden: InputMoments, order: Tensor, kept: int) -> Compensation:
    """Predicts the units after the first `kept` of the order from those, by ridge regression."""
    mean, covariance = hidden.mean[order].cpu(), hidden.covariance[order][:, order].cpu()
    covariance.diagonal().add_(ridge(covariance[:kept, :kept], hidden.tokens))
    return Compensation(mean, torch.linalg.cholesky(covariance), torch.ones(1))


def ridge(covariance: Tensor, tokens: int) -> float:
    """What is added to the variances (p, p): by oracle approximating shrinkage, and RIDGE at least."""
    p, trace, square = len(covariance), covariance.trace().item(), covariance.square().sum().item()
    spread = square - trace**2 / p
    if spread <= 0:  # all eigenvalues are equal
        return max(RIDGE, trace / p)
    shrinkage = ((1 - 2 / p) * square + trace**2) / ((tokens + 1 - 2 / p) * spread)
    return max(RIDGE, min(1.0, shrinkage) * trace / p)


def score_maps(moments: QueryKeyMoments, kept: int) -> Tensor:
    """Maps of q and k to `kept` dims whose products are nearest to the scores: (2, H, kept, d), float64."""
    maps = []
    for head, energy in enumerate(moments.energy):
        order = energy.argsort(descending=True, stable=True)
        second = moments.second[:, head][:, order][:, :, order]
        mean = moments.mean[0, head, order[:kept]]
        amount = ridge(second[0, :kept, :kept] - torch.outer(mean, mean), moments.tokens) / moments.tokens**2
        lost = lost_scores(second, kept, amount)
        left, values, right = torch.linalg.svd(torch.eye(kept).to(lost) + lost)
        factors = torch.stack([left.mT, right]) * values.sqrt()[:, None]  # U^T and V^T
        maps.append(second.new_zeros(2, kept, len(order)))
        maps[-1][:, :, order[:kept]] = factors
    return torch.stack(maps, 1)


def lost_scores(second: Tensor, kept: int, amount: float) -> Tensor:
    """M (kept, kept), for which q_S^T M k_S is nearest to q_P^T k_P over all pairs of tokens.

    second: of q and k, (2, d, d), the dims that stay first.  amount: r, the ridge.
    """
    values, vectors = torch.linalg.eigh(second[:, :kept, :kept])
    floor = torch.finfo(second.dtype).eps * values.amax(1).prod()
    target = vectors[0].mT @ second[0, :kept, kept:] @ second[1, kept:, :kept] @ vectors[1]
    solution = target / (torch.outer(*values.clamp(min=0)) + max(amount, floor.item()))
    return vectors[0] @ solution @ vectors[1].mT
