"""Measuring a device: the time of each kind of module of a network at a few widths, see supernet.device."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from models.backbone import Backbone, modules_of
from models.extraction import extract
from piad.dropout_list import pool_units, rounded_unit_sizes
from utils import UserError, device_name

from .device import FORMAT, DeviceProfile, shape_of
from .timing import RUNTIMES, dtype_in_words, random_images, time_alternately

SHARES = (1 / 4, 1 / 2, 3 / 4, 1)  # of the full width, which are measured besides one unit and 0
HALF = "half"


def measure_profile(
    model: Backbone,
    name: str,
    *,
    device: torch.device,
    batch_size: int = 1,
    amp: torch.dtype | None = None,
    runtime: str = "eager",
    repeats: int = 15,
    warmup: int = 3,
    now: Callable[[], float] = time.perf_counter,
) -> DeviceProfile:
    """Measures a network of a batch of random images on the device.

    Whole networks are measured, because a module on its own finds its weights in the cache and takes less time: in each
    of them the modules of one shape have one of a handful of widths, and all others half of their width. A module takes
    the difference from the network in which those of its shape are bypassed, divided by their number. All networks
    are in memory and take turns, and the median of the differences of `repeats` rounds counts; noise that would make a
    smaller width slower is averaged away. The rest is what the network at half of all widths takes besides its modules.

    amp: the dtype of autocast.  runtime: a key of supernet.timing.RUNTIMES.  now: the clock, in seconds.
    Raises UserError where the noise is larger than what a module takes.
    """
    images = random_images(model, batch_size, device)
    widths = measured_widths(model)
    shapes = {key: shape_of(module) for key, module in modules_of(model).items()}
    half = {key: _half(widths[shape]) for key, shape in shapes.items()}
    networks: dict[Any, dict[str, int]] = {HALF: half}
    for shape, own in widths.items():
        alike = [key for key in shapes if shapes[key] == shape]
        networks |= {(shape, width): half | dict.fromkeys(alike, width) for width in own if width != _half(own)}
    calls = {key: RUNTIMES[runtime](extract(model, network), images, amp) for key, network in networks.items()}
    seconds = time_alternately(calls, device, repeats=repeats, warmup=warmup, now=now)
    for shape, own in widths.items():
        seconds[shape, _half(own)] = seconds[HALF]
    counts = Counter(shapes.values())
    modules = {}
    for shape, own in widths.items():
        bypassed = seconds[shape, 0]
        found = [_median_difference(seconds[shape, width], bypassed) / counts[shape] for width in own]
        modules[shape] = {"count": counts[shape], "seconds": _rising(shape, own, found)}
    parts = sum(entry["count"] * entry["seconds"][str(_half(widths[shape]))] for shape, entry in modules.items())
    content = {
        "format": FORMAT,
        "model": name,
        "device": device_name(device),
        "runtime": runtime,
        "dtype": dtype_in_words(model, amp),
        "batch_size": batch_size,
        "torch": torch.__version__,
        "how": f"median of {repeats} runs in alternation, after {warmup} untimed ones",
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "rest": max(0.0, statistics.median(seconds[HALF]) - parts),
        "modules": modules,
    }
    return DeviceProfile(content, model, name)


def measured_widths(model: Backbone) -> dict[str, list[int]]:
    """Shape -> the widths that are measured, ascending: 0, one unit, and SHARES of the full width in whole units."""
    modules, found = modules_of(model), {}
    for key, size in rounded_unit_sizes(modules).items():
        width = modules[key].width
        shares = [width if share == 1 else round(width * share / size) * size for share in SHARES]
        found[shape_of(modules[key])] = sorted({0, min(size, width), *shares})
    return found


def _half(widths: list[int]) -> int:
    """The width nearest to half of the full one."""
    return min(widths, key=lambda width: abs(width - widths[-1] / 2))


def _median_difference(seconds: list[float], base: list[float]) -> float:
    return statistics.median(a - b for a, b in zip(seconds, base, strict=True))


def _rising(shape: str, widths: list[int], seconds: list[float]) -> dict[str, float]:
    """Width -> seconds that do not fall with the width: the nearest ones, by isotonic regression."""
    pools = pool_units(np.array(seconds[:0:-1]), 1)  # of all widths but 0
    rising = np.repeat([max(0.0, mean) for _, mean in pools], [count for count, _ in pools]).tolist()
    if not rising[-1]:
        raise UserError(
            f"{shape}: the time of these modules is lost in the noise: give more --repeats, or a larger --batch-size"
        )
    return {str(width): value for width, value in zip(widths, [0.0, *rising], strict=True)}
