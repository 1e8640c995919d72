"""Measuring a device: the time of each kind of module of a network at a few widths, see supernet.device."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from models.backbone import Backbone, modules_of
from piad.dropout_list import pool_units, rounded_unit_sizes
from utils import UserError, device_name

from .device import FORMAT, DeviceProfile, shape_of
from .runtimes import version_of
from .timing import dtype_in_words, time_networks

SHARES = (1 / 4, 1 / 2, 3 / 4, 1)  # of the full width, which are measured besides one unit and 0


def measure_profile(
    model: Backbone,
    name: str,
    *,
    batch_size: int = 1,
    amp: torch.dtype | None = None,
    runtime: str = "eager",
    repeats: int = 15,
    warmup: int = 3,
    now: Callable[[], float] = time.perf_counter,
) -> DeviceProfile:
    """Measures a network on its device, on a batch of random images.

    Whole networks are measured, because a module on its own finds its weights in the cache and takes less time. In each
    of them the modules of one shape have one of a handful of widths and all others half of theirs, or all modules have
    the same share of their width (see networks_to_measure()). The times of the modules and of the rest are those that
    explain the times of the networks best: least squares of the relative errors. All networks are in memory and take
    turns, and the median of `repeats` rounds counts; noise that would make a smaller width slower is averaged away.
    "errors" in the content says how far the profile is from the times that were measured, relative to them.

    amp: the dtype of autocast.  runtime: see runtimes.runner().  now: the clock, in seconds.
    Raises UserError where the noise is larger than what a module takes.
    """
    shapes = {key: shape_of(module) for key, module in modules_of(model).items()}
    networks = networks_to_measure(model)
    kind = {"batch_size": batch_size, "amp": amp, "runtime": runtime}
    rounds = time_networks(model, dict(enumerate(networks)), **kind, repeats=repeats, warmup=warmup, now=now)
    named = [[(shapes[key], width) for key, width in widths.items()] for widths in networks]
    seconds = _medians(np.array(list(rounds.values())))
    times, rest = _explained(named, seconds)
    modules = {}
    for shape, widths in measured_widths(model).items():
        found = [times[shape, width] for width in widths if width]
        modules[shape] = {"count": Counter(shapes.values())[shape], "seconds": _rising(shape, widths, found)}
    content = {
        "format": FORMAT,
        "model": name,
        "device": device_name(next(model.parameters()).device),
        "runtime": runtime,
        "dtype": dtype_in_words(model, amp),
        "batch_size": batch_size,
        "torch": torch.__version__,
        "how": f"median of {repeats} runs in alternation in {version_of(runtime)}, after {warmup} untimed ones",
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "rest": rest,
        "modules": modules,
    }
    profile = DeviceProfile(content, model, name)
    errors = [abs(profile.of(widths) / time - 1) for widths, time in zip(networks, seconds, strict=True)]
    content["errors"] = {"networks": len(errors), "median": statistics.median(errors), "largest": max(errors)}
    return profile


def measured_widths(model: Backbone) -> dict[str, list[int]]:
    """Shape -> the widths that are measured, ascending: 0, one unit, and SHARES of the full width in whole units."""
    modules, found = modules_of(model), {}
    for key, size in rounded_unit_sizes(modules).items():
        width = modules[key].width
        shares = [width if share == 1 else round(width * share / size) * size for share in SHARES]
        found[shape_of(modules[key])] = sorted({0, min(size, width), *shares})
    return found


def networks_to_measure(model: Backbone) -> list[dict[str, int]]:
    """The widths of the networks that are measured, each of them once."""
    shapes = {key: shape_of(module) for key, module in modules_of(model).items()}
    measured = measured_widths(model)

    def all_at(share: float) -> dict[str, int]:
        return {key: _nearest(measured[shape], share) for key, shape in shapes.items()}

    networks = [all_at(share) for share in (0, *SHARES)]
    for shape, widths in measured.items():
        alike = [key for key in shapes if shapes[key] == shape]
        networks += [all_at(1 / 2) | dict.fromkeys(alike, width) for width in widths]
    return [network for index, network in enumerate(networks) if network not in networks[:index]]


def _nearest(widths: list[int], share: float) -> int:
    """The width that is nearest to this share of the full one."""
    return min(widths, key=lambda width: abs(width - share * widths[-1]))


def _medians(seconds: np.ndarray) -> np.ndarray:
    """The median time of each network (networks,); seconds: (networks, rounds), of which each has its own speed."""
    speed = seconds.mean(0)
    return np.median(seconds / speed * np.median(speed), axis=1)


def _explained(
    networks: list[list[tuple[str, int]]], seconds: np.ndarray
) -> tuple[dict[tuple[str, int], float], float]:
    """The time of each (shape, width) above 0, and of the rest, that explain the times of networks best.

    networks: the modules of each.  seconds: (networks,).
    """
    parts = sorted({part for network in networks for part in network if part[1]})
    counts = np.array([[*map(network.count, parts), 1] for network in networks]) / seconds[:, None]
    *times, rest = np.linalg.lstsq(counts, np.ones(len(networks)), rcond=None)[0].tolist()
    return dict(zip(parts, times, strict=True)), max(0.0, rest)


def _rising(shape: str, widths: list[int], seconds: list[float]) -> dict[str, float]:
    """Width -> seconds that do not fall with the width: the nearest ones, by isotonic regression.

    widths: ascending from 0.  seconds: of all but 0.
    """
    pools = pool_units(np.array(seconds[::-1]), 1)
    rising = np.repeat([max(0.0, mean) for _, mean in pools], [count for count, _ in pools]).tolist()
    if not rising[-1]:
        raise UserError(
            f"{shape}: the time of these modules is lost in the noise: give more --repeats, or a larger --batch-size"
        )
    return {str(width): value for width, value in zip(widths, [0.0, *rising], strict=True)}
