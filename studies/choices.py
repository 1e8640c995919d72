"""The recipes that studies.recipes compares, and the sub-networks that each of them draws."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from models.macs import count_macs
from models.parts import EMBEDDING
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout
from piad.sampling import SCALES, draw_by_scale, draw_op_code
from supernet import Network


@dataclass(frozen=True)
class Recipe:
    """How a super-network is trained.

    alpha: share of the teacher in the loss, the rest is that of the labels.  tau: temperature of the teacher.
    distance: from the teacher, "kl", "squared" (error of the logits), or "features" (KL divergence, and the squared
    error of the tokens after the last norm).  tokens: main.py's --distillation-tokens.
    compensated: sub-networks are compensated in training.  law: main.py's --op-code-sampling.
    sandwich: each step trains the whole network, the smallest, and one between; there are fewer steps, so that the MACs
    are the same.  sizes: main.py's --sizes-per-step, for as many steps, so that the MACs grow.  table: "best", the one
    of the start, or "piad", made from its importance.  growing: the first half of the epochs opens the table bit by
    bit.  lr: times that of the flags.  passes: the network is contracted and compensated again between them.
    freeze: parameters whose names contain one of these words do not move.
    weight_decay, ema_decay, mixup, smoothing: as in main.py; None is what the flags say.
    """

    alpha: float = 0.5
    tau: float = 1.0
    distance: str = "kl"
    tokens: float = 0.0
    compensated: bool = True
    law: str = "log-macs"
    sandwich: bool = False
    sizes: int = 1
    table: str = "best"
    growing: bool = False
    lr: float = 1.0
    passes: int = 1
    freeze: tuple[str, ...] = ()
    weight_decay: float | None = None
    ema_decay: float | None = None
    mixup: float | None = None
    smoothing: float | None = None


ENDS = ("patch_embed", "pos_embed", "cls_token", "norm", "head")
BASE = Recipe()
RECIPES = {
    "base": BASE,
    "labels alone": replace(BASE, alpha=0.0),
    "alpha 0.75": replace(BASE, alpha=0.75),
    "alpha 0.9": replace(BASE, alpha=0.9),
    "tau 2": replace(BASE, tau=2.0),
    "squared error of the logits": replace(BASE, distance="squared"),
    "with the features": replace(BASE, distance="features"),
    "tokens of four blocks, 1": replace(BASE, tokens=1.0),
    "tokens of four blocks, 4": replace(BASE, tokens=4.0),
    "cut": replace(BASE, compensated=False),
    "uniform op codes": replace(BASE, law="uniform"),
    "op codes uniform in 1 / MACs": replace(BASE, law="inverse-macs"),
    "whole, smallest and one between": replace(BASE, sandwich=True),
    "two sizes on each image": replace(BASE, sizes=2),
    "three sizes on each image": replace(BASE, sizes=3),
    "growing table": replace(BASE, growing=True),
    "PIAD's table": replace(BASE, table="piad"),
    "PIAD's table, growing": replace(BASE, table="piad", growing=True),
    "learning rate / 4": replace(BASE, lr=0.25),
    "learning rate / 2": replace(BASE, lr=0.5),
    "learning rate * 2": replace(BASE, lr=2.0),
    "learning rate * 4": replace(BASE, lr=4.0),
    "weight decay 0": replace(BASE, weight_decay=0.0),
    "averaging 0.9": replace(BASE, ema_decay=0.9),
    "averaging 0.998": replace(BASE, ema_decay=0.998),
    "ends frozen": replace(BASE, freeze=ENDS),
    "embedding frozen": replace(BASE, freeze=EMBEDDING),
    "Mixup 0.2": replace(BASE, mixup=0.2),
    "no smoothing": replace(BASE, smoothing=0.0),
    "two passes": replace(BASE, passes=2),
    "learning rate * 2, Mixup 0.2": replace(BASE, lr=2.0, mixup=0.2),
    "learning rate * 2, alpha 0.75": replace(BASE, lr=2.0, alpha=0.75),
    "learning rate * 2, alpha 0.75, 1 / MACs": replace(BASE, lr=2.0, alpha=0.75, law="inverse-macs"),
    "learning rate * 2, features": replace(BASE, lr=2.0, distance="features"),
}


class Codes:
    """The mask table of a run, and the sub-networks of each of its steps."""

    def __init__(self, network: Network, recipe: Recipe, proxy: Any, epochs: float, ratio: float, seed: int):
        self.network, self.recipe, self.seed, self.used = network, recipe, seed, 0.0
        self.opening = epochs / 2 if recipe.growing else 0
        self.piad = None
        self.set_table(network.table)
        if recipe.table == "piad":
            self.piad = ProgressiveDropout(
                network.model, proxy, ratio=ratio, epochs=max(1, int(self.opening)), seed=seed, table=None
            )
        self.smallest = self.shares[-1]

    def set_table(self, table: MaskTable) -> None:
        """Draws from this table from now on."""
        self.table = table
        full = count_macs(self.network.model)
        self.shares = np.array([count_macs(self.network.model, row) / full for row in table.rows])

    def begin_epoch(self, epoch: int) -> None:
        """Opens more of the table, or lets PIAD extend it, where the recipe says so."""
        if self.piad is not None:
            self.piad.begin_epoch(epoch)
            if self.piad.table is not self.table:
                self.set_table(self.piad.table)
        opened = 0 if self.opening == 0 or self.piad else max(0, 1 - (epoch + 1) / self.opening)
        self.open = np.flatnonzero(self.shares >= self.smallest + opened * (1 - self.smallest))

    def draw(self, step: int) -> list[dict[str, int]]:
        """The widths that the step trains; none where a sandwich has used the MACs of the steps so far."""
        shares, place = self.shares[self.open], {"seed": self.seed, "epoch": 0, "step": step, "rank": 0}
        chosen = [self.draw_one(shares, place | {"number": number}) for number in range(self.recipe.sizes)]
        if self.recipe.sandwich:
            code = chosen[0]
            self.used -= shares[code]  # what a step of one sub-network costs
            if self.used > 0:
                return []
            chosen = [0, code, len(shares) - 1]
            self.used += shares[chosen].sum()
        return [self.table.widths(code) for code in chosen]

    def draw_one(self, shares: np.ndarray, place: dict[str, int]) -> int:
        """The op code, among those that are open, of one size of a step."""
        place = place | {"numbers": self.recipe.sizes}
        if self.recipe.law == "uniform":
            return draw_op_code(len(shares), **place)
        return draw_by_scale([SCALES[self.recipe.law](share) for share in shares], **place)
