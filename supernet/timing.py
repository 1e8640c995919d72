"""Timing functions in alternation, and models in a runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.backbone import Backbone
from models.extraction import extract
from utils import synchronize

from .runtimes import runner


def time_alternately(
    variants: dict[Any, Callable[[], Any]],
    device: torch.device,
    *,
    repeats: int,
    warmup: int,
    now: Callable[[], float] = time.perf_counter,
    before: Callable[[], object] = lambda: None,
) -> dict[Any, list[float]]:
    """Times several functions in alternation, so that changes in the speed of the machine affect all of them.

    A round runs every variant once; every other round runs them in the opposite order. The result of a variant is freed
    after the clock has stopped.

    Args:
        variants: Name -> function to time.
        device: Device to synchronize before and after each run.
        repeats: Number of timed rounds.
        warmup: Number of untimed rounds before them.
        now: The clock, in seconds.
        before: Called before each run, outside the measured time.

    Returns:
        Name -> seconds in each timed round.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in variants}
    for round_number in range(warmup + repeats):
        names = list(variants) if round_number % 2 else list(variants)[::-1]
        for name in names:
            before()
            synchronize(device)
            start = now()
            result = variants[name]()
            synchronize(device)
            elapsed = now() - start
            del result
            if round_number >= warmup:
                seconds[name].append(elapsed)
    return seconds


def time_networks(
    model: Backbone,
    networks: dict[Any, dict[str, int]],
    *,
    batch_size: int,
    amp: torch.dtype | None,
    runtime: str,
    repeats: int,
    warmup: int = 3,
    now: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float]]:
    """Name -> seconds of each round, of sub-networks of a model at these widths, on random images on its device.

    All of them are in memory at once, and take turns. amp: the dtype of autocast.  runtime: see runtimes.runner().
    """
    device = next(model.parameters()).device
    images = random_images(model, batch_size, device)
    calls = {
        name: partial(runner(extract(model, widths), batch_size, amp, runtime), images)
        for name, widths in networks.items()
    }
    return time_alternately(calls, device, repeats=repeats, warmup=warmup, now=now)


def random_images(model: Backbone, batch_size: int, device: torch.device) -> Tensor:
    """Images (B, C, height, width) as the model takes them, in the dtype of its weights."""
    size = (batch_size, model.in_chans, *model.patch_embed.img_size)
    return torch.randn(size, device=device, dtype=next(model.parameters()).dtype)


def dtype_in_words(model: Backbone, amp: torch.dtype | None) -> str:
    """The dtype that a model runs in, for a measured time. amp: the dtype of autocast, if any."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{dtype}, autocast to {str(amp).removeprefix('torch.')}" if amp else dtype
