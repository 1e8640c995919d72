"""Benchmarks of the passes with gradients: the statistics of WPAC and the steps of PIAD. Run by benchmarks.speed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import (
    CLOCKS,
    Row,
    in_new_process,
    make_model,
    milliseconds,
    peak_bytes,
    random_batch,
    ratio,
    timing_numbers,
)
from benchmarks.sizes import half_widths
from models.backbone import full_widths, modules_of
from models.elastic import make_elastic, set_widths
from models.extraction import extract
from models.macs import count_macs, count_params
from models.targets import COSTS
from models.taylor import collect
from piad.distillation import Distillation, Teacher
from supernet.timing import time_alternately
from utils import synchronize
from wpac.statistics import collect_statistics

# ---------------------------------------------------------------------------------------------------------------------
# WPAC statistics


def measure_statistics(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time and peak memory of collect_statistics(), compared with a plain forward and backward pass."""
    work = statistics_work(args, device)
    seconds = time_alternately(work, device, repeats=args.repeats, warmup=1, now=CLOCKS[args.clock])
    peaks = {name: in_new_process(statistics_peak, args, name) for name in work}
    sums, outputs = (milliseconds(seconds[k]) - milliseconds(seconds["gradients"]) for k in ("statistics", "outputs"))
    images = f"{args.model}, {args.images} images"
    return [
        Row(
            f"WPAC statistics, {images}",
            "forward + backward, time",
            ratio(seconds["statistics"], seconds["plain"]),
            1.15,
            bound=f"the weighted sums in float64 take {sums:.0f} ms; the same pass with hooks but without sums is "
            f"{ratio(seconds['gradients'], seconds['plain']):.3f} x",
            numbers=timing_numbers(seconds, "plain"),
        ),
        Row(
            f"WPAC statistics, {images}",
            "forward + backward, peak memory",
            peaks["statistics"] / peaks["plain"],
            1.3,
            bound=f"with hooks but without sums it is {peaks['gradients'] / peaks['plain']:.3f} x",
            numbers={f"peak_bytes_{name}": peak for name, peak in peaks.items()},
        ),
        Row(
            f"statistics of --method best, {images}",
            "forward + backward, time",
            ratio(seconds["outputs"], seconds["plain"]),
            1.5,
            bound=f"the sums, which include the inputs of every last layer, take {outputs:.0f} ms",
            numbers=timing_numbers(seconds, "plain"),
        ),
    ]


def statistics_work(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Name -> a pass over the same batches; "gradients" has the hooks of the statistics but computes no sums."""
    model = make_model(args, device).eval()
    images, targets = random_batch(model, args.images, device)
    batches = list(zip(images.split(args.batch_size), targets.split(args.batch_size), strict=True))

    def plain() -> None:
        for batch, target in batches:
            model.zero_grad()
            COSTS["logit"](model(batch), target, ()).backward()
        model.zero_grad()

    return {
        "plain": plain,
        "statistics": partial(collect_statistics, model, batches),
        "outputs": partial(collect_statistics, model, batches, outputs=True),
        "gradients": partial(collect, model, dict.fromkeys(modules_of(model), NoCollector()), batches, "logit"),
    }


def statistics_peak(args: argparse.Namespace, name: str) -> int:
    """Peak memory of one pass of statistics_work() in bytes, without model and images. Call in a new process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    return peak_bytes(statistics_work(args, device)[name], device)


class NoCollector:
    """A models.taylor.Collector that discards its input."""

    def update(self, x: Tensor, g: Tensor) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# PIAD steps


class Step:
    """A training step on one batch: set_widths() (of a super-network), forward, loss, backward, AdamW."""

    def __init__(
        self,
        model: VisionTransformer,
        batch: tuple[Tensor, Tensor],
        device: torch.device,
        widths: dict | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ):
        """widths: set at each step if `model` is a super-network; None for other models.

        loss_fn(outputs, images, targets): default, the cross-entropy.
        """
        self.loss_fn = loss_fn or (lambda outputs, _images, targets: F.cross_entropy(outputs, targets))
        self.model, self.batch, self.device, self.widths = model.train(), batch, device, widths
        self.optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-5, weight_decay=0.05)
        self.phases: dict[str, list[float]] = {}

    def __call__(self, mark: Callable[[str], None] = lambda _phase: None) -> None:
        images, targets = self.batch
        if self.widths is not None:
            set_widths(self.model, self.widths)
        mark("set_widths")
        loss = self.loss_fn(self.model(images), images, targets)
        mark("forward")
        self.optimizer.zero_grad()
        loss.backward()
        mark("backward")
        self.optimizer.step()
        mark("optimizer")

    def timed(self, clock: Callable[[], float]) -> None:
        """A step whose phases are timed; the device is synchronized after each phase."""
        synchronize(self.device)
        last = clock()

        def mark(phase: str) -> None:
            nonlocal last
            synchronize(self.device)
            now = clock()
            self.phases.setdefault(phase, []).append(now - last)
            last = now

        self(mark)

    def phase_milliseconds(self) -> dict[str, float]:
        """Phase -> median time."""
        return {phase: milliseconds(seconds) for phase, seconds in self.phases.items()}


def measure_step(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time of a PIAD step at full widths, compared with the same step of the stock model."""
    model = make_model(args, device)
    batch = random_batch(model, args.batch_size, device)
    widths = {key: module.width for key, module in modules_of(model).items()}
    super_network = make_elastic(make_model(args, device))
    name = f"PIAD step, full width, {args.model}, batch {args.batch_size}"
    step, base = Step(super_network, batch, device, widths), Step(model, batch, device)
    return [compared_steps(args, device, name, "stock model's step", step, base, goal=1.05)]


def loss_with_teacher(teacher: VisionTransformer, amp: torch.dtype | None = None) -> Callable[..., Tensor]:
    """A loss_fn of Step: half of it from the labels, half from the teacher. amp: dtype of its autocast."""
    distillation = Distillation(Teacher(teacher, "logits", amp), "soft", 0.5, 1.0)
    return lambda logits, images, targets: distillation(
        F.cross_entropy, {"logits": logits}, distillation.teacher(images), targets
    )


def measure_teacher(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time that a teacher adds to a PIAD step at full widths, compared with a forward pass without gradients."""
    model, super_network = make_model(args, device), make_elastic(make_model(args, device))
    batch = random_batch(model, args.batch_size, device)
    step = Step(super_network, batch, device, full_widths(model), loss_with_teacher(make_model(args, device)))
    base = Step(super_network, batch, device, full_widths(model))
    forward = partial(torch.inference_mode()(model.eval()), batch[0])
    work = {"step": step, "base": base, "forward": forward}
    seconds = time_alternately(work, device, repeats=args.repeats, warmup=args.warmup, now=CLOCKS[args.clock])
    step_ms, base_ms, forward_ms = (milliseconds(seconds[name]) for name in work)
    return [
        Row(
            f"teacher of a PIAD step, {args.model}, batch {args.batch_size}",
            "forward without gradients",
            (step_ms - base_ms) / forward_ms,
            1.1,
            bound=f"the step takes {step_ms:.1f} ms, without a teacher {base_ms:.1f} ms, a forward {forward_ms:.1f} ms",
            numbers=timing_numbers(seconds, "base"),
        )
    ]


def measure_half_step(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time of a PIAD step at half of the MACs, compared with the same step of the extracted model."""
    rows = []
    for kind, widths in half_widths(make_model(args, device)).items():
        super_network = make_elastic(make_model(args, device))
        batch = random_batch(super_network, args.batch_size, device)
        small = extract(super_network, widths)
        share = count_macs(small) / count_macs(super_network)
        name = f"PIAD step, half the MACs, {kind}, {args.model}, batch {args.batch_size}"
        step, base = Step(super_network, batch, device, widths), Step(small, batch, device)
        row = compared_steps(args, device, name, "extracted model's step", step, base, goal=1.10)
        row.numbers |= {
            "macs_share": share,
            "widths": widths,
            "params": count_params(super_network),
            "params_extracted": count_params(small),
        }
        rows.append(row)
    return rows


def compared_steps(
    args: argparse.Namespace, device: torch.device, what: str, against: str, step: Step, base: Step, goal: float
) -> Row:
    """A step against another, `base`, timed in alternation; in words, what they are."""
    rounds = {"repeats": args.repeats, "warmup": args.warmup, "now": CLOCKS[args.clock]}
    seconds = time_alternately({"step": step, "base": base}, device, **rounds)
    timed = {"step": partial(step.timed, CLOCKS[args.clock]), "base": partial(base.timed, CLOCKS[args.clock])}
    time_alternately(timed, device, repeats=max(3, args.repeats // 3), warmup=0)
    phases, base_phases = step.phase_milliseconds(), base.phase_milliseconds()
    more = ", ".join(f"{phase} {phases[phase] - base_phases[phase]:+.1f}" for phase in phases)
    return Row(
        what,
        against,
        ratio(seconds["step"], seconds["base"]),
        goal,
        bound=f"the base takes {milliseconds(seconds['base']):.1f} ms; difference in ms by phase: {more}",
        numbers=timing_numbers(seconds, "base") | {"phases_ms_step": phases, "phases_ms_base": base_phases},
    )
