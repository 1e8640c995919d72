"""Timing of anything that can be called, and models made ready to be timed on a runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.backbone import Backbone
from utils import synchronize

Call = Callable[[], Any]


def time_alternately(
    variants: dict[str, Call],
    device: torch.device,
    *,
    repeats: int,
    warmup: int,
    now: Callable[[], float] = time.perf_counter,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
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
    seconds: dict[str, list[float]] = {name: [] for name in variants}
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


def random_images(model: Backbone, batch_size: int, device: torch.device) -> Tensor:
    """Images (B, C, height, width) as the model takes them, in the dtype of its weights."""
    size = (batch_size, model.in_chans, *model.patch_embed.img_size)
    return torch.randn(size, device=device, dtype=next(model.parameters()).dtype)


def dtype_in_words(model: Backbone, amp: torch.dtype | None) -> str:
    """The dtype that a model runs in, for a measured time. amp: the dtype of autocast, if any."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{dtype}, autocast to {str(amp).removeprefix('torch.')}" if amp else dtype


def eager(model: Backbone, images: Tensor, amp: torch.dtype | None) -> Call:
    """A forward pass of PyTorch as it is."""
    return partial(_forward, model.eval().to(images.device), images, amp)


@torch.inference_mode()
def _forward(model: Backbone, images: Tensor, amp: torch.dtype | None) -> Tensor:
    with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
        return model(images)


# Runtime -> (model, images (B, C, height, width), dtype of autocast or None) -> a function that runs the model on the
# images. What it returns is all that is timed; preparing the model may take as long as it likes.
RUNTIMES: dict[str, Callable[[Backbone, Tensor, torch.dtype | None], Call]] = {"eager": eager}
