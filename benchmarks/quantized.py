"""Half of the MACs and int8 in ONNX Runtime: the speed of a model with random weights, or what int8 costs a network.

python -m benchmarks.quantized --model deit_small_patch16_224 --threads 2 --clock wall
python -m benchmarks.quantized --checkpoint output/best --data-set cifar10 --data-path cifar10 --threads 1
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import supernet
from benchmarks.common import (
    CLOCKS,
    Row,
    describe_machine,
    make_model,
    make_parser,
    milliseconds,
    positive,
    prepare,
    random_batch,
    ratio,
    report,
    timing_numbers,
)
from benchmarks.sizes import half_widths
from datasets import drawn, eval_loader, open_images, proxy_set
from fidelity import Evaluator
from models.backbone import Backbone
from models.extraction import extract
from models.macs import count_macs
from report.exports import FileModel
from supernet.formats import model_of_target
from supernet.graphs import ONNX_PACKAGES, Outputs, check_packages, graph_of, onnx_outputs, write_onnx_graph
from supernet.reduction import write_float16, write_int8
from supernet.timing import time_alternately
from utils import run_program

GOALS = {"half": 1.8, "half_int8": 3.0}  # times faster than the whole model
OPERATORS = ("blocks", "linear", "products", "all")


def measure_speed(args: argparse.Namespace, device: torch.device, folder: Path) -> list[Row]:
    """Whole in float32, half of the MACs in float32 and in int8, side by side, at each batch size."""
    whole = make_model(args, device).eval()
    small = extract(whole, half_widths(whole)["uniform"])
    size = [whole.in_chans, *whole.patch_embed.img_size]
    for name, model in {"whole": whole, "half": small}.items():
        write_onnx_graph(graph_of(model, size), folder / f"{name}.onnx", "logits")
        batches = (random_batch(whole, 16, device)[0] for _ in range(2))
        write_int8(folder / f"{name}.onnx", folder / f"{name}_int8.onnx", batches)
    runs = {path.stem: onnx_outputs(path) for path in sorted(folder.glob("*.onnx"))}
    rows = []
    for batch_size in args.batch_sizes:
        images, _ = random_batch(whole, batch_size, device)
        variants = {name: partial(run, images) for name, run in runs.items()}
        seconds = time_alternately(variants, device, repeats=args.repeats, warmup=args.warmup, now=CLOCKS[args.clock])
        for name in ("whole_int8", "half", "half_int8"):
            rows.append(
                Row(
                    f"{name}, {args.model}, batch {batch_size}, {milliseconds(seconds[name]):.4g} ms",
                    "whole in float32, times faster",
                    ratio(seconds["whole"], seconds[name]),
                    GOALS.get(name),
                    at_least=True,
                    numbers=timing_numbers({key: seconds[key] for key in (name, "whole")}, "whole")
                    | {"batch_size": batch_size, "macs_share": count_macs(small) / count_macs(whole)},
                )
            )
    return rows


def measure_operators(args: argparse.Namespace, folder: Path) -> list[Row]:
    """What float16, and int8 of more and more operators, change in a size of half the MACs, on held-out images."""
    network = supernet.load(args.checkpoint)
    small = network.cut(network.select(max_macs=args.share * network.macs())).eval()
    parts = {name: open_images(args.data_set, args.data_path, name, None, args.seed) for name in ("train", "val")}
    proxy = proxy_set(parts["train"], args.calibration, args.seed)
    load = partial(eval_loader, config=network.preprocessing, workers=0)
    labels = network.target == "logits" and parts["val"].num_classes == network.model.num_classes
    held_out = load(drawn(parts["val"], args.images, args.seed), batch_size=64)
    evaluator = Evaluator(network.target, held_out, torch.device("cpu"), labels=labels, whole=small)
    source = folder / "model.onnx"
    graph = graph_of(model_of_target(small, network.target), network.preprocessing["input_size"])
    write_onnx_graph(graph, source, network.target)
    batches: list[Tensor] = [images for images, _ in load(proxy, batch_size=16)]
    rows = [_fidelity_row("float32", evaluator, onnx_outputs(source), small)]
    write_float16(source, folder / "float16.onnx")
    rows.append(_fidelity_row("float16", evaluator, onnx_outputs(folder / "float16.onnx"), small))
    for operators in OPERATORS:
        path = folder / f"{operators}.onnx"
        write_int8(source, path, batches, operators)
        rows.append(_fidelity_row(f"int8, {operators}", evaluator, onnx_outputs(path), small))
    return rows


def _fidelity_row(name: str, evaluator: Evaluator, outputs_of: Outputs, small: Backbone) -> Row:
    found = evaluator(FileModel(outputs_of, small, evaluator.target))
    measure, unit = ("kl", "nats") if "kl" in found else ("feature_cosine", "")
    words = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
    return Row(f"{name}: {words}", "the size in float32", found[measure], unit=unit, numbers=found)


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], model="deit_small_patch16_224", batch_size=1, repeats=20)
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 16], help="replaces --batch-size")
    parser.add_argument(
        "--checkpoint", type=Path, help="a super-network: what its operators lose, instead of the speed"
    )
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs, of the size of --checkpoint")
    parser.add_argument("--data-set", default="digits", help="images of --checkpoint, as in main.py")
    parser.add_argument("--data-path", help="folder of --data-set")
    parser.add_argument("--calibration", type=positive, default=256, help="images to calibrate on")
    parser.add_argument("--images", type=positive, default=1000, help="held-out images to compare on")
    args = parser.parse_args()
    check_packages(ONNX_PACKAGES, "benchmarks.quantized")
    if args.device != "cpu":
        parser.error(f"--device {args.device}: ONNX Runtime is timed on the CPU here, leave it out")
    device = prepare(args, parser)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_operators(args, Path(folder)) if args.checkpoint else measure_speed(args, device, Path(folder))
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    report(rows, settings, describe_machine(device))


if __name__ == "__main__":
    run_program(main)
