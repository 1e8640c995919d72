"""Which sub-network a step trains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SAMPLING = ("uniform", "log-macs")  # laws of the draw


def generator_of(seed: int, epoch: int, step: int, rank: int, number: int = 0) -> np.random.Generator:
    """A random generator that depends on its arguments only.

    A resumed run therefore draws the same numbers as an uninterrupted one, and ranks draw independently.
    number: of the size, where a step trains several.
    """
    place = [seed, epoch, step, rank]
    return np.random.default_rng(place if number == 0 else [*place, number])


def draw_op_code(
    op_codes: int, *, seed: int, epoch: int, step: int, rank: int, number: int = 0, numbers: int = 1
) -> int:
    """Draws an op code uniformly from 0..op_codes - 1, whole and smallest network included.

    Where a step trains several sizes, they are numbered 0..numbers - 1 from small to large, and each is drawn from its
    own part of the op codes.
    """
    low, high = (op_codes * (numbers - 1 - number + end) // numbers for end in (0, 1))
    return int(generator_of(seed, epoch, step, rank, number).integers(low, max(high, low + 1)))


def draw_by_log_macs(
    log_macs: Sequence[float], *, seed: int, epoch: int, step: int, rank: int, number: int = 0, numbers: int = 1
) -> int:
    """Draws a number of MACs between the smallest and the whole network, uniformly in its logarithm.

    Returns the op code whose MACs are nearest to it, in the logarithm, so that both ends can be drawn.
    log_macs: of each op code.  number, numbers: as in draw_op_code().
    """
    low, high = (log_macs[-1] + (log_macs[0] - log_macs[-1]) * (number + end) / numbers for end in (0, 1))
    drawn = generator_of(seed, epoch, step, rank, number).uniform(low, high)
    return int(np.abs(np.asarray(log_macs) - drawn).argmin())
