"""A super-network from its files: a checkpoint and the mask table that goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.backbone import Backbone, full_widths
from models.loading import load_backbone
from piad.mask_table import MASK_TABLE, MaskTable
from utils import UserError

CONTRACTED = "contracted.safetensors"  # what WPAC writes, and PIAD starts from


def load_super_network(
    name: str,
    model_kwargs: dict[str, Any],
    *,
    checkpoint: Path,
    mask_table: Path | None = None,
    num_classes: int = 1000,
    use_ema: bool = False,
) -> tuple[Backbone, MaskTable]:
    """The full-size model, with the head of its weights, and its table, checked against each other.

    Without mask_table, the one lying beside the checkpoint is read. Raises UserError for files that are missing,
    damaged, or of another model.
    """
    if checkpoint is None:
        raise UserError("--checkpoint is missing: give the super-network's checkpoint_<epoch>.pth")
    model = load_backbone(name, model_kwargs, num_classes=num_classes, checkpoint=checkpoint, use_ema=use_ema)
    table = MaskTable.load(mask_table or Path(checkpoint).parent / MASK_TABLE)
    table.check(full_widths(model), name)
    return model, table
