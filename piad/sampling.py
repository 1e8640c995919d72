"""Which sub-network a rank trains at a step."""

from __future__ import annotations

import numpy as np


def generator_of(seed: int, epoch: int, step: int, rank: int) -> np.random.Generator:
    """A random generator that depends on its arguments only.

    A resumed run therefore draws the same numbers as an uninterrupted one, and ranks draw independently.
    """
    return np.random.default_rng([seed, epoch, step, rank])


def draw_op_code(op_codes: int, *, seed: int, epoch: int, step: int, rank: int) -> int:
    """Draws an op code uniformly from 0..op_codes - 1, whole and smallest network included."""
    return int(generator_of(seed, epoch, step, rank).integers(op_codes))
