"""Training regimes that PIAD is compared with (paper, ablation). main.py --regime chooses one of REGIMES."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.backbone import Backbone, modules_of
from models.macs import macs_per_dim
from models.subnetwork import blocks_of, cuts_v_alone
from utils import UserError

from .dropout_list import UNITS, grow, unit_totals
from .importance import Batches, importance_of_dims
from .mask_table import MaskTable
from .progressive import ProgressiveDropout


class NoDropout(ProgressiveDropout):
    """Trains the whole network at every step. The table is fixed from the start and cuts all modules by one share."""

    def __init__(self, model: Backbone, proxy: Batches, *, ratio: float, table: MaskTable | None, **more: Any):
        super().__init__(model, proxy, ratio=ratio, table=table, **more)
        modules = self.units.total(self.table.widths(0))
        self.share = min(1.0, ratio * self.network_macs / modules)  # `ratio` as a share of the MACs of the modules
        if table is None:
            self.table = self.initial_table()

    def initial_table(self) -> MaskTable:
        """Uniform truncation in even steps, as many as the module with the most units has."""
        steps = max(UNITS.values())
        shares = [1 - self.share * step / steps for step in range(steps + 1)]
        edges = self.edges()
        return MaskTable(
            [{key: places[round((len(places) - 1) * share)] for key, places in edges.items()} for share in shares]
        )

    def edges(self) -> dict[str, list[int]]:
        """Module key -> the widths between its units, ascending, with 0 and the full width."""
        return {key: self.units.edges(key, width) for key, width in self.table.widths(0).items()}

    def begin_epoch(self, epoch: int) -> None:
        """Does nothing: the table does not grow."""

    def choose(self, *, epoch: int, step: int, rank: int, number: int = 0) -> int:
        """Sets the super-network to full widths.

        Returns 0, also in the subclasses: the sub-networks that they train have no op code.
        """
        self.run_at(self.table.widths(0))
        return 0


class ChannelDropout(NoDropout):
    """Drops every unit with the same probability, share / 2: on average as much as PIAD drops.

    The dropped units can be anywhere in a module, so they are not cut: their q, k, v or hidden activations are set to
    zero. Raises UserError for a model whose q and k are not cut (see models.backbone.cuts_v_alone).
    """

    def __init__(self, model: Backbone, *args, **kwargs):
        if any(cuts_v_alone(block.attn) for block in blocks_of(model)):
            raise UserError("this regime drops dims of q, k and v together, which this model does not allow: use piad")
        self.masks: dict[str, Tensor] = {}  # module key -> (units,), True for the units that the current step keeps
        super().__init__(model, *args, **kwargs)
        self.probability = self.drop_probability()
        for key in self.units.sizes:
            index, kind = key.split(".")
            block = blocks_of(model)[int(index)]
            if kind == "attn":
                block.attn.qkv.register_forward_hook(partial(self._mask_attention, key))
            else:
                block.mlp.fc2.register_forward_pre_hook(partial(self._mask_mlp, key))

    def drop_probability(self) -> dict[str, Tensor]:
        """Module key -> probability of each unit to be dropped (units,), head to tail."""
        return {key: torch.full((len(places) - 1,), self.share / 2) for key, places in self.edges().items()}

    def choose(self, *, epoch: int, step: int, rank: int, number: int = 0) -> int:
        """Draws the units that the step keeps."""
        generator = self.generator(epoch, step, rank)
        for key, probability in self.probability.items():
            self.masks[key] = torch.from_numpy(generator.random(len(probability))) >= probability
        return super().choose(epoch=epoch, step=step, rank=rank)

    def _mask_attention(self, key: str, layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        """Forward hook. output: q, k and v (B, N, 3 * H * d)."""
        return self._masked(key, output) if layer.training and key in self.masks else output

    def _mask_mlp(self, key: str, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Forward pre-hook. inputs: hidden activations (B, N, M)."""
        return (self._masked(key, inputs[0]),) if layer.training and key in self.masks else inputs

    def _masked(self, key: str, x: Tensor) -> Tensor:
        mask = self.masks[key].to(x).repeat_interleave(self.units.sizes[key])[: self.table.widths(0)[key]]
        return x * mask.repeat(x.shape[-1] // len(mask))


class WeightedChannelDropout(ChannelDropout):
    """Drops a unit with a probability that depends on its importance per MAC at the start of training.

    The probability rises evenly with the rank, from 0 for the most important unit of the network to the share for the
    least important one: on average as much as PIAD drops. The probabilities are kept in the table's meta, from where a
    resumed run takes them.
    """

    def initial_table(self) -> MaskTable:
        """The table of PIAD, grown at once."""
        importance = importance_of_dims(self.model.eval(), self.proxy)
        table = grow(self.table, importance, self.units, self.ratio * self.network_macs)
        macs = {key: macs_per_dim(module) for key, module in modules_of(self.model).items()}
        dims = {key: np.diff(places) for key, places in self.edges().items()}  # (units,)
        totals = {key: unit_totals(importance[key], size) for key, size in self.units.sizes.items()}
        density = np.concatenate([totals[key] / (dims[key] * macs[key]) for key in dims])
        ranks = np.argsort(np.argsort(-density, kind="stable"))  # 0 for the most important
        ends = np.cumsum([len(total) for total in totals.values()])
        probability = np.split(self.share * ranks / (len(ranks) - 1), ends[:-1])
        table.meta["drop_probability"] = {key: p.tolist() for key, p in zip(totals, probability, strict=True)}
        return table

    def drop_probability(self) -> dict[str, Tensor]:
        """Module key -> probability of each unit to be dropped (units,), from the table's meta."""
        return {key: torch.tensor(values) for key, values in self.table.meta["drop_probability"].items()}


class LayerDrop(NoDropout):
    """Bypasses every module with the same probability, share / 2: on average as much as PIAD drops."""

    def initial_table(self) -> MaskTable:
        """Whole modules leave, those of the least importance per MAC at the start of training first."""
        importance = importance_of_dims(self.model.eval(), self.proxy)
        whole_modules = dataclasses.replace(self.units, sizes=self.table.widths(0))
        return grow(self.table, importance, whole_modules, self.ratio * self.network_macs)

    def choose(self, *, epoch: int, step: int, rank: int, number: int = 0) -> int:
        """Draws the modules that the step keeps."""
        full = self.table.widths(0)
        kept = self.generator(epoch, step, rank).random(len(full)) >= self.share / 2
        self.run_at({key: int(keep) * full[key] for key, keep in zip(full, kept, strict=True)})
        return 0


REGIMES: dict[str, type[ProgressiveDropout]] = {
    "piad": ProgressiveDropout,
    "none": NoDropout,
    "channel": ChannelDropout,
    "weighted-channel": WeightedChannelDropout,
    "layer": LayerDrop,
}
