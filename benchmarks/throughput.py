"""Images per second and peak memory of training and evaluation, for DeiT-Ti, DeiT-S and DeiT-B.

    python -m benchmarks.throughput --device cuda --amp bfloat16 --batch-size 128
    python -m benchmarks.throughput --threads 2 --batch-size 8 --repeats 3

Each of WORK is measured in a new process: the step of timm's own model, that of the super-network at all of its MACs
and at half of them, the latter with a teacher too, that of RECIPE=best (three compensated sizes, a teacher and its
tokens), and evaluation without gradients. Weights and images are random and
on the device already, so loading is not in the figures. On a CPU in half precision, no step fuses attention, as in
main.py. Memory is that of the process beyond the libraries on the CPU, that of the allocator on CUDA: weights,
gradients, AdamW's moments and activations, at their peak.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn import functional as F

from arguments import any_precision
from benchmarks.common import (
    CLOCKS,
    Row,
    describe_machine,
    in_new_process,
    make_model,
    make_parser,
    peak_so_far,
    prepare,
    random_batch,
    report,
    reset_peak,
)
from benchmarks.compensation import contract_and_compensate
from benchmarks.sizes import half_widths, uniform_widths
from benchmarks.training import Step, loss_with_teacher
from engine import backward, update
from main_training import freeze_embedding, use_plain_attention
from models.backbone import full_widths
from models.elastic import make_elastic, set_widths
from piad.distillation import Distillation, StudentOutputs, Teacher
from supernet.timing import time_alternately
from training import Training
from utils import run_program, tf32
from wpac.statistics import collect_statistics

MODELS = ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"]
BEST = "step of RECIPE=best"
WORK = ("timm's step", "step, all MACs", "step, half of the MACs", "the same with a teacher", BEST, "evaluation")
BEST_SHARES = (0.42, 0.16, 0.1)  # of the MACs: the mean sizes of its draws in 1 / MACs, down to a twelfth


def measure(args: argparse.Namespace, model: str, name: str) -> dict[str, Any]:
    """Seconds of each run and peak bytes of one of WORK. Call in a new process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    held = reset_peak(device)
    work = work_of(argparse.Namespace(**{**vars(args), "model": model}), name, device)
    reset_peak(device)  # what was needed to build it does not count
    amp = torch.autocast(device.type, dtype=args.amp, enabled=args.amp != torch.float32)

    def run() -> None:
        with amp, tf32():
            work()

    seconds = time_alternately({name: run}, device, repeats=args.repeats, warmup=args.warmup, now=CLOCKS[args.clock])[
        name
    ]
    return {"seconds": seconds, "bytes": peak_so_far(device) - held}


def work_of(args: argparse.Namespace, name: str, device: torch.device) -> Callable[[], Any]:
    """One of WORK on one batch."""
    model = make_model(args, device)
    batch = random_batch(model, args.batch_size, device)
    if name == "evaluation":
        return partial(torch.inference_mode()(model.eval()), batch[0])
    if device.type == "cpu" and args.amp != torch.float32:
        use_plain_attention(model)
    if name == "timm's step":
        return Step(model, batch, device)
    if name == BEST:
        contract_and_compensate(model.eval(), collect_statistics(model, [batch], outputs=True))
        return best_step(make_elastic(model.to(device)), make_model(args, device), batch, amp_of(args))
    loss_fn = None
    if name == "the same with a teacher":
        loss_fn = loss_with_teacher(make_model(args, device), amp_of(args))
    widths = full_widths(model) if name == "step, all MACs" else half_widths(model)["uniform"]
    return Step(make_elastic(model), batch, device, widths, loss_fn)


def amp_of(args: argparse.Namespace) -> torch.dtype | None:
    """The dtype of autocast, None without it."""
    return None if args.amp == torch.float32 else args.amp


def best_step(
    model: VisionTransformer, teacher: VisionTransformer, batch: tuple[Tensor, Tensor], amp: torch.dtype | None
) -> Callable[[], None]:
    """A step of three sizes of a super-network, half of the loss from the teacher, with its tokens.

    Sizes are compensated, the embedding does not move, and the weights are averaged.
    """
    images, targets = batch
    sizes = [partial(set_size, model, uniform_widths(model, share)) for share in BEST_SHARES]
    distillation = Distillation(Teacher(teacher, "logits", amp, tokens=True), "soft", 0.5, 1.0, tokens=1.0)
    freeze_embedding(model.train())
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-5, weight_decay=0.05)
    training = Training(
        model, optimizer, F.cross_entropy, images.device, 0, amp=amp, distillation=distillation,
        runner=StudentOutputs(model, "logits", tokens=True), ema=ModelEmaV3(model, decay=0.998),
    )  # fmt: skip

    def step() -> None:
        backward(training, images, targets, sizes)
        update(training, 0)

    return step


def set_size(model: VisionTransformer, widths: dict[str, int]) -> int:
    """Sets the widths of a super-network; returns 0 in place of an op code, which nothing uses here."""
    set_widths(model, widths)
    return 0


def main() -> None:
    parser = make_parser(__doc__, model=MODELS[0], batch_size=128, repeats=10)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm names, instead of --model")
    parser.add_argument("--amp", type=any_precision, default="none", help="bfloat16, float16, or none (default)")
    args = parser.parse_args()
    device = prepare(args, parser)
    rows = []
    for model in args.models:
        for name in WORK:
            found = in_new_process(measure, args, model, name)
            speed = args.batch_size / statistics.median(found["seconds"])
            rows.append(Row(f"{model}, {name}", "-", speed, unit="images/s", numbers=found))
            rows.append(Row(f"{model}, {name}", "-", found["bytes"] / 1e9, unit="GB"))
    settings = {key: getattr(args, key) for key in ("models", "batch_size", "repeats", "warmup", "seed", "clock")}
    report(rows, settings | {"amp": str(args.amp)}, describe_machine(device, args.threads))


if __name__ == "__main__":
    run_program(main)
