"""What PIAD is compared with: other ways to choose what a step trains (paper, ablation), chosen by main.py --regime."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from models.backbone import Backbone, blocks_of, cuts_v_alone
from utils import UserError

from .dropout_list import UNITS, grow
from .importance import Batches, importance_of_dims
from .mask_table import MaskTable
from .progressive import ProgressiveDropout
from .sampling import generator_of


class NoDropout(ProgressiveDropout):
    """The whole network at every step; its table, which stands from the start, cuts all modules alike."""

    def __init__(
        self, model: Backbone, proxy: Batches, *, ratio: float, epochs: int, seed: int, table: MaskTable | None
    ):
        super().__init__(model, proxy, ratio=ratio, epochs=epochs, seed=seed, table=table)
        modules = sum(width * self.macs[key] + self.fixed[key] for key, width in self.table.widths(0).items())
        self.share = min(1.0, ratio * self.network_macs / modules)  # what `ratio` comes to where something can leave
        if table is None:
            self.table = self.first_table()

    def first_table(self) -> MaskTable:
        """Uniform truncation, in even steps, as many as the finest module has units."""
        steps = max(UNITS.values())
        shares = [1 - self.share * step / steps for step in range(steps + 1)]
        full = self.table.widths(0)
        return MaskTable(
            [{key: round(full[key] // size * share) * size for key, size in self.sizes.items()} for share in shares]
        )

    def begin_epoch(self, epoch: int) -> None:
        """Nothing grows."""

    def choose(self, *, epoch: int, step: int, rank: int) -> int:
        """Sets the super-network to what this rank trains at the step. Returns the op code, 0: it is in no table."""
        self.run_at(self.table.widths(0))
        return 0


class ChannelDropout(NoDropout):
    """Every unit is dropped with one probability, half of the share: on average what PIAD drops.

    What is dropped is anywhere in a module, so it is silenced and not cut: q, k, v and hidden units become 0.
    """

    def __init__(self, model: Backbone, *args, **kwargs):
        if any(cuts_v_alone(block.attn) for block in blocks_of(model)):
            raise UserError("this regime drops dims of q, k and v alike, which this model does not allow: use piad")
        self.masks: dict[str, Tensor] = {}  # module key -> (units,), 1 where kept, of the step under way
        super().__init__(model, *args, **kwargs)
        self.probability = self.drop_probability()
        for key in self.sizes:
            index, kind = key.split(".")
            block = blocks_of(model)[int(index)]
            if kind == "attn":
                block.attn.qkv.register_forward_hook(partial(self._silence_attention, key))
            else:
                block.mlp.fc2.register_forward_pre_hook(partial(self._silence_units, key))

    def drop_probability(self) -> dict[str, Tensor]:
        """Module key -> (units,), head to tail."""
        return {key: torch.full((units,), self.share / 2) for key, units in self._units().items()}

    def choose(self, *, epoch: int, step: int, rank: int) -> int:
        """Draws the units that stay."""
        generator = generator_of(self.seed, epoch, step, rank)
        for key, probability in self.probability.items():
            self.masks[key] = torch.from_numpy(generator.random(len(probability))) >= probability
        return super().choose(epoch=epoch, step=step, rank=rank)

    def _units(self) -> dict[str, int]:
        return {key: self.table.widths(0)[key] // size for key, size in self.sizes.items()}

    def _silence_attention(self, key: str, layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        """output: (B, N, 3 H d) of q, k, v."""
        return self._silenced(key, output) if layer.training and key in self.masks else output

    def _silence_units(self, key: str, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """inputs: (B, N, M)."""
        return (self._silenced(key, inputs[0]),) if layer.training and key in self.masks else inputs

    def _silenced(self, key: str, x: Tensor) -> Tensor:
        mask = self.masks[key].to(x).repeat_interleave(self.sizes[key])
        return x * mask.repeat(x.shape[-1] // len(mask))


class WeightedChannelDropout(ChannelDropout):
    """A unit is dropped with a probability by its importance for each MAC at the start.

    From 0 for the most important of all units to the share for the least, evenly: on average what PIAD drops. The
    probabilities are kept in the table's meta, with which a run goes on.
    """

    def first_table(self) -> MaskTable:
        """PIAD's list, but all of it at once."""
        importance = importance_of_dims(self.model.eval(), self.proxy)
        table = grow(self.table, importance, self.sizes, self.macs, self.ratio * self.network_macs, self.fixed)
        units = {key: importance[key].reshape(-1, size).sum(1) for key, size in self.sizes.items()}  # (units,)
        density = np.concatenate([units[key] / (size * self.macs[key]) for key, size in self.sizes.items()])
        ranks = np.argsort(np.argsort(-density, kind="stable"))  # 0 for the most important
        probability = np.split(self.share * ranks / (len(ranks) - 1), np.cumsum([len(u) for u in units.values()])[:-1])
        table.meta["drop_probability"] = {key: p.tolist() for key, p in zip(units, probability, strict=True)}
        return table

    def drop_probability(self) -> dict[str, Tensor]:
        """(units,) of each module, as the table's meta keeps them."""
        return {key: torch.tensor(values) for key, values in self.table.meta["drop_probability"].items()}


class LayerDrop(NoDropout):
    """A module is bypassed as a whole, each with one probability, half of the share: on average what PIAD drops."""

    def first_table(self) -> MaskTable:
        """Whole modules leave, the least important for each MAC at the start first."""
        importance = importance_of_dims(self.model.eval(), self.proxy)
        return grow(self.table, importance, self.table.widths(0), self.macs, self.ratio * self.network_macs, self.fixed)

    def choose(self, *, epoch: int, step: int, rank: int) -> int:
        """Draws the modules that stay."""
        full = self.table.widths(0)
        stays = generator_of(self.seed, epoch, step, rank).random(len(full)) >= self.share / 2
        self.run_at({key: int(stay) * full[key] for key, stay in zip(full, stays, strict=True)})
        return 0


REGIMES: dict[str, type[ProgressiveDropout]] = {
    "piad": ProgressiveDropout,
    "none": NoDropout,
    "channel": ChannelDropout,
    "weighted-channel": WeightedChannelDropout,
    "layer": LayerDrop,
}
