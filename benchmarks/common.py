"""Shared by the benchmarks: arguments, facts about the machine, timing, peak memory, and the report."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.backbone import create_backbone
from utils import cpu_model, synchronize

ROOT = Path(__file__).resolve().parent.parent
PROC_STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Row:
    """One measurement.

    what: What is measured.
    against: What it is compared with, "-" for nothing.
    measured: The result, in `unit`.
    goal: `measured` must not exceed it, or with at_least must not fall below it. None if there is no goal.
    bound: An explanation that is printed if the goal is not met.
    numbers: The numbers that `measured` was computed from, for the JSON.
    """

    what: str
    against: str
    measured: float
    goal: float | None = None
    unit: str = "x"
    at_least: bool = False
    bound: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if self.goal is None:
            return None
        return self.measured >= self.goal if self.at_least else self.measured <= self.goal


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and the machine


def make_parser(description: str | None, *, model: str, batch_size: int, repeats: int) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have. model, batch_size, repeats: their defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default=model, help="timm name of the backbone; it gets random weights")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=positive, help="PyTorch threads on the CPU; None: PyTorch's default")
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="images per batch")
    parser.add_argument("--repeats", type=positive, default=repeats, help="timed rounds; the medians are reported")
    parser.add_argument("--warmup", type=positive, default=2, help="untimed rounds before the timed ones")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the images")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall: elapsed time; cpu: CPU time of the process and its children, which varies less on a shared machine "
        "if --threads is 1",
    )
    return parser


def positive(text: str) -> int:
    """argparse type for whole numbers above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def prepare(args: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """Checks the device and sets threads and seed. If the device is missing, the program ends with exit code 2."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this PyTorch sees no CUDA device; use --device cpu")
    if args.device.startswith("cuda") and args.clock == "cpu":
        parser.error("--clock cpu does not measure the work of a CUDA device; use --clock wall")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return torch.device(args.device)


def describe_machine(device: torch.device, threads: int | None = None) -> dict[str, Any]:
    """Facts about the machine and the libraries. threads: per process, default: those of this process."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def random_batch(model: VisionTransformer, images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images (B, C, height, width) of the model's input size and random targets (B,), with B = `images`."""
    size = (images, model.in_chans, *model.patch_embed.img_size)
    return torch.randn(size, device=device), torch.randint(model.num_classes, (images,), device=device)


def make_model(args: argparse.Namespace, device: torch.device) -> VisionTransformer:
    """The backbone of --model with random weights from --seed: the same ones at every call."""
    torch.manual_seed(args.seed)
    return create_backbone(args.model).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Time


def cpu_seconds() -> float:
    """CPU time, user and system, of this process and of its child processes that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": cpu_seconds}


def ratio(seconds: list[float], base: list[float]) -> float:
    """The median over the rounds of seconds / base, since the two runs of a round were close in time."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def milliseconds(seconds: list[float]) -> float:
    """The median of times in seconds, in milliseconds."""
    return statistics.median(seconds) * 1e3


def timing_numbers(seconds: dict[str, list[float]], base: str | None = None) -> dict[str, Any]:
    """For the JSON: median, lowest and highest ms of every variant and, with a base, of its ratio to the base."""
    numbers: dict[str, Any] = {
        f"ms_{name}": {"median": milliseconds(values), "lowest": min(values) * 1e3, "highest": max(values) * 1e3}
        for name, values in seconds.items()
    }
    for name, values in seconds.items() if base else ():
        if name != base:
            ratios = [a / b for a, b in zip(values, seconds[base], strict=True)]
            numbers[f"ratio_{name}_to_{base}"] = {
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def in_new_process(function: Callable, *args: Any) -> Any:
    """The result of `function(*args)` in a new process. `function` must be defined at the top level of a module."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def give_memory_back() -> None:
    """Returns freed memory to the operating system if the C library can do so.

    The next allocation then gets new pages instead of reusing old ones.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim:
        trim(0)


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Peak memory of `work` in bytes, in addition to the memory in use when it starts.

    On CUDA it is read from the allocator. On the CPU it is the resident memory of the process. An earlier, higher peak
    of the process would hide that of `work` on systems where the peak cannot be reset, so call this in a new process.
    """
    held = reset_peak(device)
    work()
    return peak_so_far(device) - held


def reset_peak(device: torch.device) -> int:
    """Makes the peak what is in use now, where the system allows it, and returns the peak in bytes."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        with contextlib.suppress(OSError):  # some containers forbid it
            CLEAR_REFS.write_text("5")  # Linux: the peak becomes what is resident now
    return peak_so_far(device)


def peak_so_far(device: torch.device) -> int:
    """Peak memory of this process since reset_peak(), in bytes."""
    if device.type == "cuda":
        synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _resident_peak()


def _resident_peak() -> int:
    """Peak resident memory of this process in bytes."""
    if PROC_STATUS.exists():  # getrusage() also counts the peak of the parent process
        line = next(line for line in PROC_STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---------------------------------------------------------------------------------------------------------------------
# Report


def report(rows: list[Row], settings: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """Prints the machine, the table of rows and, as the last line, the JSON object, which it also returns."""
    for key, value in machine.items():
        print(f"{key}: {value}")
    cells = [("what", "against", "measured", "goal", "")] + [_cells(row) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    print()
    for line, row in zip(cells, [None, *rows], strict=True):
        what, against, measured, goal, met = line
        padded = (what.ljust(widths[0]), against.ljust(widths[1]), measured.rjust(widths[2]), goal.ljust(widths[3]))
        print("  ".join([*padded, met]).rstrip())
        if row is not None and row.bound and row.met is False:
            print(f"    {row.bound}")
    print()
    facts = {"benchmark": Path(sys.argv[0]).stem, "machine": machine, "settings": settings}
    results = {**facts, "rows": [_as_json(row) for row in rows]}
    print(json.dumps(results))
    return results


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    met = {True: "met", False: "not met", None: ""}[row.met]
    return row.what, row.against, f"{row.measured:.4g} {row.unit}".rstrip(), _goal_text(row), met


def _goal_text(row: Row) -> str:
    return "" if row.goal is None else f"{'>=' if row.at_least else '<='} {row.goal:g} {row.unit}".rstrip()


def _as_json(row: Row) -> dict[str, Any]:
    return {**asdict(row), "goal": _goal_text(row) or None, "met": row.met}
