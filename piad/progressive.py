"""PIAD over a training run: extends the mask table at the start of an epoch and draws the sub-network of each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from models.backbone import Backbone, full_widths
from models.elastic import set_widths
from models.extraction import extract
from models.macs import count_macs
from utils import is_main_process

from .dropout_list import grow, units_of
from .importance import Batches, importance_of_dims
from .mask_table import MASK_TABLE, MaskTable
from .sampling import SCALES, draw_by_scale, draw_op_code, generator_of


class ProgressiveDropout:
    """Holds the mask table of a super-network during training.

    At the start of each epoch e < epochs the dropout list grows until it holds ratio * (e + 1) / epochs of the
    network's MACs (linear convention). The order comes from the importance of dims on the proxy set, taken at the
    smallest network so far. The importance is reduced over ranks, so every rank holds the same table.

    Args:
        model: Super-network, see models.elastic.make_elastic().
        proxy: Batches of the proxy set.
        ratio: Share of the network's MACs that has left after the last growing epoch.
        epochs: Number of growing epochs; 0 for a table that stays as it is.
        seed: Seed of the draws.
        table: Table to go on with, None to start with the whole network. Its widths need not be those of whole units:
            tables for a device have other units.
        sampling: "uniform" draws op codes uniformly, "log-macs" uniformly in the logarithm of their MACs,
            "inverse-macs" uniformly in 1 / MACs.
        per_rank: Each rank draws its own op code. Otherwise all ranks train the same sub-network at a step, so that
            none waits for a larger one.
        sizes_per_step: Sub-networks that a step trains on its images, each drawn from its own part of the sizes.

    Raises:
        UserError: If the table does not fit the model.
    """

    def __init__(
        self,
        model: Backbone,
        proxy: Batches,
        *,
        ratio: float,
        epochs: int,
        seed: int,
        table: MaskTable | None,
        sampling: str = "uniform",
        per_rank: bool = False,
        sizes_per_step: int = 1,
    ):
        self.model, self.proxy = model, proxy
        self.ratio, self.epochs, self.seed = ratio, epochs, seed
        self.sampling, self.per_rank, self.sizes_per_step = sampling, per_rank, sizes_per_step
        self.scale: list[float] = []  # of each op code, see piad.sampling.SCALES
        self.units = units_of(model)
        self.network_macs = count_macs(model)
        self.sampled_shares: list[float] = []  # of the network's MACs, of the sub-networks of the current step
        full = full_widths(model)
        self.table = table or MaskTable([full])
        self.table.check(full, "the model")

    def begin_epoch(self, epoch: int) -> None:
        """Extends the table if the epoch is a growing one."""
        if epoch >= self.epochs:
            return
        smallest = extract(self.model, self.table.widths(-1)).eval()
        target_macs = self.ratio * (epoch + 1) / self.epochs * self.network_macs
        self.table = grow(self.table, importance_of_dims(smallest, self.proxy), self.units, target_macs)

    def choose(self, *, epoch: int, step: int, rank: int, number: int = 0) -> int:
        """Draws an op code of the step, sets the super-network to its widths and returns it.

        number: 0..sizes_per_step - 1, from small to large.
        """
        place = {"seed": self.seed, "epoch": epoch, "step": step, "rank": rank if self.per_rank else 0}
        place |= {"number": number, "numbers": self.sizes_per_step}
        if self.sampling == "uniform":
            op_code = draw_op_code(len(self.table), **place)
        else:
            new = self.table.rows[len(self.scale) :]  # a table only grows
            self.scale += [SCALES[self.sampling](count_macs(self.model, row)) for row in new]
            op_code = draw_by_scale(self.scale, **place)
        self.run_at(self.table.widths(op_code), number)
        return op_code

    def generator(self, epoch: int, step: int, rank: int) -> np.random.Generator:
        """What a regime without op codes draws the sub-network of a step from."""
        return generator_of(self.seed, epoch, step, rank if self.per_rank else 0)

    def run_at(self, widths: dict[str, int], number: int = 0) -> None:
        """Sets the super-network to widths that the step trains. number: of these, counted within the step."""
        set_widths(self.model, widths)
        self.sampled_shares = [*self.sampled_shares[:number], count_macs(self.model, widths) / self.network_macs]

    def step_scalars(self) -> dict[str, float]:
        """Values to log for a step: the share of the network's MACs that this rank's sub-networks have, on average."""
        return {"macs_share": sum(self.sampled_shares) / len(self.sampled_shares)}

    def epoch_scalars(self) -> dict[str, float]:
        """Values to log for an epoch: the number of op codes, and the share of the MACs that the smallest one has."""
        return {"op_codes": len(self.table), "macs_share_smallest": self.macs_share(-1)}

    def macs_share(self, op_code: int) -> float:
        """The share of the network's MACs that a sub-network has."""
        return count_macs(self.model, self.table.widths(op_code)) / self.network_macs

    def state_dict(self) -> dict[str, Any]:
        """The table as plain data, for a checkpoint. There is no other state."""
        return {"mask_table": self.table.to_json()}

    def save(self, folder: Path) -> None:
        """Writes mask_table.json into the folder, on the main process only."""
        if is_main_process():
            self.table.save(folder / MASK_TABLE)
