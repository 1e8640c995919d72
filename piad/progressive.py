"""PIAD over a training run: the table that grows at the start of an epoch, and the sub-network of each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.backbone import Backbone, modules_of
from models.elastic import set_widths
from models.extraction import extract
from models.macs import count_macs, fixed_macs, macs_per_dim
from utils import UserError, is_main_process

from .dropout_list import grow, unit_sizes
from .importance import Batches, importance_of_dims
from .mask_table import MASK_TABLE, MaskTable
from .sampling import draw_op_code


class ProgressiveDropout:
    """Holds the mask table of a super-network in training.

    The list of what is dropped grows to ratio * (e + 1) / epochs of the network's MACs (linear convention) at the
    start of each epoch e < epochs, by the importance of dims on the proxy batches at the smallest network so far.
    Every rank holds the same table, since the importance is reduced over the ranks.
    """

    def __init__(
        self, model: Backbone, proxy: Batches, *, ratio: float, epochs: int, seed: int, table: MaskTable | None
    ):
        """model: a super-network (elastic); table: of the run that goes on.

        Raises UserError where a module does not divide into units, or the table is not one of the model.
        """
        modules = modules_of(model)
        self.model, self.proxy = model, proxy
        self.ratio, self.epochs, self.seed = ratio, epochs, seed
        self.sizes = unit_sizes(modules)
        self.macs = {key: macs_per_dim(module) for key, module in modules.items()}
        self.fixed = {key: fixed_macs(module) for key, module in modules.items()}
        self.network_macs = count_macs(model)
        self.sampled_share = 1.0  # of the MACs, that the sub-network of the step under way has
        full = {key: module.width for key, module in modules.items()}
        self.table = table or MaskTable([full])
        self.table.check(full, "the model")
        for key, width in self.table.widths(-1).items():
            if width % self.sizes[key]:
                raise UserError(
                    f"mask table: {key} has width {width}, which is not in whole units of {self.sizes[key]}"
                )

    def begin_epoch(self, epoch: int) -> None:
        """Grows the table, if the epoch is one of the growing ones."""
        if epoch >= self.epochs:
            return
        smallest = extract(self.model, self.table.widths(-1)).eval()
        target = self.ratio * (epoch + 1) / self.epochs * self.network_macs
        self.table = grow(
            self.table, importance_of_dims(smallest, self.proxy), self.sizes, self.macs, target, self.fixed
        )

    def choose(self, *, epoch: int, step: int, rank: int) -> int:
        """Draws this rank's op code for the step and sets the super-network to its widths."""
        op_code = draw_op_code(len(self.table), seed=self.seed, epoch=epoch, step=step, rank=rank)
        self.run_at(self.table.widths(op_code))
        return op_code

    def run_at(self, widths: dict[str, int]) -> None:
        """Sets the super-network to the widths that a step trains."""
        set_widths(self.model, widths)
        self.sampled_share = count_macs(self.model, widths) / self.network_macs

    def step_scalars(self) -> dict[str, float]:
        """What is logged of a step: the share of the network's MACs that this rank's sub-network has."""
        return {"macs_share": self.sampled_share}

    def epoch_scalars(self) -> dict[str, float]:
        """What is logged of an epoch: how many sizes there are, and the share of the MACs that the smallest has."""
        return {"op_codes": len(self.table), "macs_share_smallest": self.macs_share(-1)}

    def macs_share(self, op_code: int) -> float:
        """The share of the network's MACs that a sub-network has."""
        return count_macs(self.model, self.table.widths(op_code)) / self.network_macs

    def state_dict(self) -> dict[str, Any]:
        """The table, for a checkpoint: it is all the state there is."""
        return {"mask_table": self.table.to_json()}

    def save(self, folder: Path) -> None:
        """Writes mask_table.json into the folder, on the main process."""
        if is_main_process():
            self.table.save(folder / MASK_TABLE)
