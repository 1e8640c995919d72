"""The images that refitting works on, as residual streams of both networks, and which of them are held out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.backbone import Backbone
from models.parts import Part, parts_of
from utils import UserError, checksum, gather_over_ranks, mixed_seed

HELD_OUT = 8  # one image in so many is never fitted: damping is chosen on these, and they say whether a fit helps


@dataclass
class Batch:
    """The residual streams of the same images in the whole network and in the cut one, (B, N, D) or (B, H, W, D)."""

    whole: Tensor
    cut: Tensor
    held_out: bool


def streams_of(
    model: Backbone, small: Backbone, images: Iterable[Tensor], device: torch.device
) -> tuple[list[Part], list[Part], list[Batch]]:
    """The parts of both networks (see models.parts.parts_of) and the first block's inputs, held-out images apart."""
    streams, keys, whole_parts, cut_parts = [], [], [], []
    for batch in images:
        x, parts = parts_of(model, batch.to(device))
        if not streams:
            whole_parts, cut_parts = parts, parts_of(small, batch[:1].to(device))[1]
        streams.append(x)
        keys.append([image_key(image) for image in batch])
    limit = held_out_limit([key for batch in keys for key in batch])
    masks = [torch.tensor([key <= limit for key in batch], device=device) for batch in keys]
    held_out = [x[mask] for x, mask in zip(streams, masks, strict=True)]
    fitted = [x[~mask] for x, mask in zip(streams, masks, strict=True)]
    size = max(map(len, streams))
    batches = [Batch(x, x, held_out=False) for x in fitted if len(x)]
    batches += [Batch(x, x, held_out=True) for x in torch.cat(held_out).split(size) if len(x)]
    return whole_parts, cut_parts, batches


def image_key(image: Tensor) -> float:
    """A number that depends on every bit of the image and on nothing else; those of other images are spread evenly."""
    return float(mixed_seed(checksum([image])) >> 11)  # of 52 bits, which float64 holds


def held_out_limit(keys: list[float]) -> float:
    """The largest key of a held-out image. keys: of this rank's images.

    So the choice does not depend on the order of the images, on the batch size or on the number of processes, and the
    same image is never on both sides.
    """
    most = int(max(row[0] for row in gather_over_ranks([float(len(keys))])))
    rows = gather_over_ranks(keys + [math.inf] * (most - len(keys)))
    found = sorted({key for row in rows for key in row} - {math.inf})
    if len(found) < 2:
        raise UserError(f"refitting needs at least two different images, and there are {len(found)}")
    return found[max(1, len(found) // HELD_OUT) - 1]
