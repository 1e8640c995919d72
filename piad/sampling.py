"""Which sub-network a step trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

# Functions of the MACs in which draws are uniform. The inverse draws small sizes more often than the logarithm does.
SCALES: dict[str, Callable[[float], float]] = {"log-macs": math.log, "inverse-macs": lambda macs: 1 / macs}
SAMPLING = ("uniform", *SCALES)  # laws of the draw


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


def draw_by_scale(
    scale: Sequence[float], *, seed: int, epoch: int, step: int, rank: int, number: int = 0, numbers: int = 1
) -> int:
    """Draws a value uniformly between the smallest and the whole network; returns the op code that is nearest to it.

    Both ends can be drawn.
    scale: of each op code, one of SCALES of its MACs.  number, numbers: as in draw_op_code().
    """
    smallest, whole = scale[-1], scale[0]
    part = (number + generator_of(seed, epoch, step, rank, number).uniform()) / numbers
    return int(np.abs(np.asarray(scale) - (smallest + (whole - smallest) * part)).argmin())
