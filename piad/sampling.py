"""Which sub-network a rank trains at a step."""

from __future__ import annotations

import numpy as np


def generator_of(seed: int, epoch: int, step: int, rank: int) -> np.random.Generator:
    """Keyed by where it draws, so that a resumed run draws what it would have drawn, and ranks draw apart."""
    return np.random.default_rng([seed, epoch, step, rank])


def draw_op_code(op_codes: int, *, seed: int, epoch: int, step: int, rank: int) -> int:
    """An op code drawn uniformly from 0..op_codes - 1: the whole network and the smallest included."""
    return int(generator_of(seed, epoch, step, rank).integers(op_codes))
