"""Mask tables made from the loss of each dim, without training: for MACs, or for the time on a device."""

from __future__ import annotations

import numpy as np

from models.backbone import Backbone, full_widths
from models.macs import count_macs
from piad.dropout_list import grow, units_of
from piad.mask_table import MaskTable

from .device import DeviceProfile

DROPOUT_RATIO = 0.92  # share of the MACs, or of the time, that a table can drop, unless something else is asked for


def table_of_losses(
    model: Backbone,
    losses: dict[str, np.ndarray],
    stamp: str,
    dropout_ratio: float = DROPOUT_RATIO,
    profile: DeviceProfile | None = None,
) -> MaskTable:
    """The mask table in which the dims leave first that matter least per MAC or, with a profile, per second.

    losses: module key -> (width,), of wpac.allocation.dim_errors().  stamp: of the weights.  dropout_ratio: share of
    the MACs or of the time of the whole network that the table can drop.
    """
    full = full_widths(model)
    whole = MaskTable([full], {"made_by": "contraction, without training", "stamp": stamp})
    if profile is None:
        return grow(whole, losses, units_of(model), dropout_ratio * count_macs(model))
    whole.meta["made_for"] = profile.conditions()
    return grow(whole, losses, profile.units(), dropout_ratio * profile.of(full))
