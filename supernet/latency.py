"""The latency of sub-networks: measured on extracted models, on this device, and kept in latency.json."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from files import read_json, write_text
from models.backbone import Backbone
from models.extraction import extract
from models.macs import count_macs
from piad.mask_table import MaskTable
from utils import UserError, device_name, gather_over_ranks, is_main_process, progress_bar, say, synchronize

from .runtimes import check_runtime, runner, version_of
from .timing import dtype_in_words, random_images

LATENCY = "latency.json"
WARMUP = 3  # untimed runs, in which memory is allocated and kernels are chosen
FEWEST, MOST = 7, 100  # timed runs
DOUBTFUL = 1.5  # a size this many times slower than expected from another size is measured again
SECONDS = 1.0  # after this time no further run starts, once the fewest are done


def measure_latency(model: Backbone, batch_size: int, amp: torch.dtype | None = None, runtime: str = "eager") -> float:
    """Seconds of a forward pass of `batch_size` random images, on the model's device.

    amp: the dtype of autocast; None runs in the model's own dtype.  runtime: see runtimes.runner().
    """
    images = random_images(model, batch_size, next(model.parameters()).device)
    training = model.training
    run = runner(model, batch_size, amp, runtime)
    with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):  # it keeps the cast weights
        seconds = time_runs(run, images)
    model.train(training)
    return seconds


def conditions_of(
    model: Backbone, device: torch.device, batch_size: int, amp: torch.dtype | None, runtime: str
) -> dict[str, Any]:
    """What the time of a network depends on besides its widths, as files that contain times say it."""
    return {
        "device": device_name(device),
        "batch_size": batch_size,
        "dtype": dtype_in_words(model, amp),
        "torch": torch.__version__,
        "runtime": version_of(runtime),
    }


def time_runs(run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Seconds of a run on the images, (B, C, height, width).

    The median of 7 to 100 runs, as many as start within a second, after 3 untimed ones; the device is synchronized
    after each.
    """
    seconds: list[float] = []
    for number in range(WARMUP + MOST):
        synchronize(images.device)
        start = time.perf_counter()
        run(images)
        synchronize(images.device)
        seconds += [time.perf_counter() - start] if number >= WARMUP else []
        if len(seconds) >= FEWEST and sum(seconds) >= SECONDS:
            break
    return statistics.median(seconds)


class Latencies:
    """Seconds per batch of each op code, measured when first asked for.

    seconds: op code -> what is known so far.  where: batch, device, dtype and runtime in words.  key: what they are
    latencies of, as latency.json says it.
    """

    def __init__(
        self,
        model: Backbone,
        table: MaskTable,
        *,
        batch_size: int = 1,
        amp: torch.dtype | None = None,
        device: torch.device | None = None,
        path: Path | None = None,
        runtime: str = "eager",
    ):
        """device: where to measure (default: the model's device).  path: a latency.json to read and to add to.

        runtime: see runtimes.runner(). Only figures of the same device, threads, batch size, dtype, torch version,
        runtime, architecture and table are taken from the file. Raises UserError for a file that does not hold
        latencies, or a runtime that is not installed.
        """
        parameter = next(model.parameters())
        self.model, self.table, self.batch_size, self.amp = model, table, batch_size, amp
        self.runtime = check_runtime(runtime)
        self.device = device or parameter.device
        self.path = path if is_main_process() else None
        self.key = conditions_of(model, self.device, batch_size, amp, runtime)
        self.key["network"] = _fingerprint(model, table)
        images = "1 image" if batch_size == 1 else f"{batch_size} images"
        self.where = f"{images} on {self.key['device']} ({self.key['dtype']}, {self.key['runtime']})"
        mine = next((entry["seconds"] for entry in self._entries() if self._is_mine(entry)), {})
        known = gather_over_ranks([mine.get(str(code), 0.0) for code in range(len(table))])[0]
        self.seconds: dict[int, float] = {code: seconds for code, seconds in enumerate(known) if seconds}
        self.remeasured: set[int] = set()
        if self.seconds:
            say(f"{len(self.seconds)} latencies are known from {path}: delete it to measure them anew")

    def of(self, op_code: int) -> float:
        """The seconds of an op code. With several processes rank 0 measures, and all get its figure.

        A figure that other sizes contradict, perhaps taken while other work was running, is measured once more, and
        the lower of the two is kept.
        """
        if op_code not in self.seconds:
            self.seconds[op_code] = self._measured(op_code)
        if op_code not in self.remeasured and self._is_doubtful(op_code):
            self.remeasured.add(op_code)
            self.seconds[op_code] = self._measured(op_code)
        return self.seconds[op_code]

    def _is_doubtful(self, op_code: int) -> bool:
        """Whether it is far slower than a larger size, or than a smaller one when scaled up by the MACs."""
        macs = {code: count_macs(self.model, self.table.widths(code)) for code in self.seconds}
        return any(
            self.seconds[op_code] > DOUBTFUL * seconds * max(1.0, macs[op_code] / macs[code])
            for code, seconds in self.seconds.items()
        )

    def _measured(self, op_code: int) -> float:
        """The lower of what is known and what rank 0 measures now; written to the file."""
        found = 0.0
        for _ in progress_bar(range(1) if is_main_process() else (), f"latency of op code {op_code}"):
            small = extract(self.model, self.table.widths(op_code)).to(self.device)
            found = measure_latency(small, self.batch_size, self.amp, self.runtime)
        found = min(gather_over_ranks([found])[0][0], self.seconds.get(op_code, float("inf")))
        if self.path is not None:
            seconds = self.seconds | {op_code: found}
            mine = {**self.key, "seconds": {str(code): seconds[code] for code in sorted(seconds)}}
            entries = [entry for entry in self._entries() if not self._is_mine(entry)]
            try:
                write_text(self.path, json.dumps([*entries, mine], indent=1) + "\n")
            except UserError as error:  # the super-network may lie in a read-only folder
                say(f"latencies are not kept: {error}")
                self.path = None
        return found

    def _is_mine(self, entry: dict[str, Any]) -> bool:
        return all({"runtime": "eager", **entry}.get(key) == value for key, value in self.key.items())

    def _entries(self) -> list[dict[str, Any]]:
        """The content of the file: an entry for each device, batch size, dtype, torch version, runtime and network."""
        if self.path is None or not self.path.exists():
            return []
        entries = read_json(self.path)
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise UserError(f"{self.path} does not hold latencies; delete it, they are measured anew")
        return entries


def _is_entry(entry: Any) -> bool:
    seconds = entry.get("seconds") if isinstance(entry, dict) else None
    return isinstance(seconds, dict) and all(
        code.isdecimal() and code.isascii() and type(value) in (int, float) and 0 < value < float("inf")
        for code, value in seconds.items()
    )


def _fingerprint(model: Backbone, table: MaskTable) -> str:
    """A hash of the architecture, the image size and the table; the values of the weights do not matter."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    text = json.dumps([shapes, list(model.patch_embed.img_size), table.rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
