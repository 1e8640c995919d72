"""Which sub-network a step trains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SAMPLING = ("uniform", "log-macs")  # laws of the draw


def generator_of(seed: int, epoch: int, step: int, rank: int) -> np.random.Generator:
    """A random generator that depends on its arguments only.

    A resumed run therefore draws the same numbers as an uninterrupted one, and ranks draw independently.
    """
    return np.random.default_rng([seed, epoch, step, rank])


def draw_op_code(op_codes: int, *, seed: int, epoch: int, step: int, rank: int) -> int:
    """Draws an op code uniformly from 0..op_codes - 1, whole and smallest network included."""
    return int(generator_of(seed, epoch, step, rank).integers(op_codes))


def draw_by_log_macs(log_macs: Sequence[float], *, seed: int, epoch: int, step: int, rank: int) -> int:
    """Draws a number of MACs between the smallest and the whole network, uniformly in its logarithm.

    Returns the op code whose MACs are nearest to it, in the logarithm, so that both ends can be drawn.
    log_macs: of each op code.
    """
    drawn = generator_of(seed, epoch, step, rank).uniform(log_macs[-1], log_macs[0])
    return int(np.abs(np.asarray(log_macs) - drawn).argmin())
