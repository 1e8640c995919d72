"""How much of a network is left when every module is cut, without training: from sorting to refitting.

    python -m benchmarks.study_contraction --name vit_small_cifar10 --data-path DIR --checkpoint FILE ...
    python -m benchmarks.study_contraction --part proxies ...        64, 256 and 1,024 proxy images, and their damping
    python -m benchmarks.study_contraction --part apart ...          attention alone, q and k cut otherwise than v

Top-1 (percent) on val/, and the KL divergence of the outputs from the whole model's, for each method of METHODS and
share of the dims kept in every module; `allocation` has its own widths, within the MACs of that share. Writes
docs/results/contraction_NAME.json, a result as soon as it is there (what is there is not measured again), and .png.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from arguments import add_common_arguments, data_overrides, positive
from arguments import share as share_type
from benchmarks.common import ROOT, describe_machine
from datasets import eval_loader, open_splits, preprocessing, proxy_set
from files import write_text
from models.backbone import full_widths, load_backbone, modules_of
from models.elastic import make_elastic
from models.extraction import extract
from models.macs import count_macs
from piad.mask_table import MaskTable
from piad.progressive import ProgressiveDropout
from piad.selection import largest_within
from plots import plot_contraction
from reparam import table_without_training
from utils import init_processes, progress_bar, run_program
from wpac.allocation import dim_errors
from wpac.compensation import DAMPING, Compensation, OutputMoments, compensate, ordered_layer
from wpac.criteria import importance_by, sort_dims
from wpac.refit import refit
from wpac.statistics import collect_statistics
from wpac.transform import centre_values, contract

Batches = list[tuple[Tensor, Tensor]]
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
# Of the dims of q and k, and of v: each three have the same MACs.
APART = ((1 / 16, 3 / 16), (1 / 8, 1 / 8), (3 / 16, 1 / 16), (1 / 8, 3 / 8), (1 / 4, 1 / 4), (3 / 8, 1 / 8))
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass
class Contracted:
    """A model ready to be cut, and the table of its own sizes where it has one."""

    model: VisionTransformer
    table: MaskTable | None = None


def sort_by(criterion: str, model: VisionTransformer, batches: Batches, _damping: float) -> Contracted:
    sort_dims(model, importance_by(criterion, model, batches))
    return Contracted(model)


def contract_by(
    basis: str, order: str, centre: bool, compensation: bool, model: VisionTransformer, batches: Batches, damping: float
) -> Contracted:
    """As reparam.py does, in the parts that are asked for."""
    statistics = collect_statistics(model, batches, outputs=centre or compensation)
    contract(model, statistics, basis, order, damping)
    if centre:
        centre_values(model, statistics)
    if not compensation:
        return Contracted(model)
    for key in compensate(model, statistics.outputs, damping):
        print(f"{key} is not compensated")
    args = argparse.Namespace(model="", dropout_ratio=0.95)
    return Contracted(model, table_without_training(model, dim_errors(model, statistics, damping), args))


def piad_table(model: VisionTransformer, batches: Batches) -> MaskTable:
    """The mask table that PIAD's list gives of a model that is not trained meanwhile, in four steps."""
    piad = ProgressiveDropout(make_elastic(copy.deepcopy(model)), batches, ratio=0.95, epochs=4, seed=0, table=None)
    for epoch in range(piad.epochs):
        piad.begin_epoch(epoch)
    return piad.table


@torch.no_grad()
def cut_apart(model: VisionTransformer, qk: float, v: float) -> VisionTransformer:
    """A copy that gives what a network with these shares of the dims of q and k, and of v, would: the rest is zero."""
    model = copy.deepcopy(model)
    for block, module in zip(model.blocks, (m for m in modules_of(model).values() if m.kind == "attn"), strict=True):
        for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
            parameter.view(3, module.heads, module.width, -1)[:2, :, int(module.width * qk) :] = 0
        weight, bias = ordered_layer(model, module)
        cut, cut_bias = block.attn.compensation(weight, bias, module.heads * int(module.width * v))
        weight.zero_()[:, : cut.shape[1]] = cut
        block.attn.proj.weight.copy_(weight.unflatten(1, (module.width, module.heads)).transpose(1, 2).flatten(1))
        block.attn.proj.bias.copy_(cut_bias)
    return model


# How a model is made ready.
PREPARE: dict[str, Callable[[VisionTransformer, Batches, float], Contracted]] = {
    "taylor": partial(sort_by, "taylor"),
    "hessian": partial(sort_by, "hessian"),
    "wpac": partial(contract_by, "wpac", "taylor", False, False),
    "centred": partial(contract_by, "wpac", "taylor", True, False),
    "compensated": partial(contract_by, "wpac", "taylor", False, True),
    "best": partial(contract_by, "fisher", "fisher", False, True),
}


@dataclass(frozen=True)
class Method:
    """prepare: a key of PREPARE; refitted: whether a cut is; widths: the same share of all, or those of a table."""

    prepare: str
    refitted: bool = False
    widths: Literal["uniform", "allocation", "piad"] = "uniform"


METHODS = {
    "Taylor sort": Method("taylor"),
    "Hessian sort": Method("hessian"),
    "WPAC (the paper)": Method("wpac"),
    "WPAC + centring": Method("centred"),
    "WPAC + compensation": Method("compensated"),
    "+ bases and order (best)": Method("best"),
    "best, refitted": Method("best", refitted=True),
    "best, PIAD's order, untrained": Method("best", widths="piad"),
    "best, allocation": Method("best", widths="allocation"),
    "best, allocation, refitted": Method("best", refitted=True, widths="allocation"),
}


class Study:
    """The model, its data in memory, and the results so far."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.path = args.output_dir / f"contraction_{args.name}.json"
        self.images, val = open_splits(args.data_set, args.data_path)
        self.base = load_backbone(
            args.model, args.model_kwargs, num_classes=self.images.num_classes, checkpoint=args.checkpoint
        )
        self.base.to(device).eval()
        self.config = preprocessing(self.base, data_overrides(args))
        val = proxy_set(val, args.val_images, 0) if args.val_images else val
        self.val_images, self.val = len(val), self.batches(val)
        self.whole = self.logits(self.base)
        self.results = (
            json.loads(self.path.read_text())
            if self.path.exists()
            else {"whole": [], "rows": [], "damping": [], "apart": []}
        )
        facts = {"model": args.model, "model_kwargs": args.model_kwargs, "checkpoint": Path(args.checkpoint).name}
        self.results |= {**facts, "machine": describe_machine(device, args.threads), "default_damping": DAMPING}
        self.reference = {"macs": count_macs(self.base), "images": self.val_images, **self.scores(self.whole)}
        known = [row for row in self.results["whole"] if row["images"] != self.val_images]
        self.results["whole"] = [*known, self.reference]

    def batches(self, images: Any) -> Batches:
        loader = eval_loader(images, self.config, batch_size=self.args.batch_size, workers=self.args.workers)
        return [(x.to(self.device), y.to(self.device)) for x, y in loader]

    def proxy(self, number: int, draw: int) -> Batches:
        return self.batches(proxy_set(self.images, number, draw))

    @torch.inference_mode()
    def logits(self, model: VisionTransformer) -> Tensor:
        return torch.cat([model(images) for images, _ in self.val])

    def scores(self, logits: Tensor) -> dict[str, float]:
        """Top-1 in percent, and the mean KL divergence from the whole model's outputs to these."""
        targets = torch.cat([y for _, y in self.val])
        expected, found = self.whole.double().log_softmax(1), logits.double().log_softmax(1)
        kl = (expected.exp() * (expected - found)).sum(1).mean().item()
        return {"top1": 100 * (logits.argmax(1) == targets).double().mean().item(), "kl": kl}

    def is_known(self, **key: Any) -> bool:
        return any(all(row[name] == value for name, value in key.items()) for row in self.results["rows"])

    @functools.lru_cache(maxsize=1)  # noqa: B019 -- methods that are made ready alike stand next to each other
    def ready(self, prepare: str, proxy: int, draw: int, damping: float) -> tuple[Contracted, Batches, float]:
        """The model made ready, the proxy batches, and the seconds that took."""
        batches, start = self.proxy(proxy, draw), time.perf_counter()
        return PREPARE[prepare](copy.deepcopy(self.base), batches, damping), batches, time.perf_counter() - start

    def measure(self, name: str, draw: int, proxy: int, damping: float, shares: tuple[float, ...]) -> None:
        """One method at the shares that are not known yet."""
        key = {"method": name, "draw": draw, "proxy": proxy, "damping": damping, "images": self.val_images}
        shares = tuple(share for share in shares if not self.is_known(**key, share=share))
        if not shares:
            return
        method = METHODS[name]
        ready, batches, seconds = self.ready(method.prepare, proxy, draw, damping)
        table = {"uniform": None, "allocation": ready.table}.get(method.widths)
        if method.widths == "piad":
            table = piad_table(ready.model, batches)
        for share in shares:
            widths = {module: int(width * share) for module, width in full_widths(self.base).items()}
            macs = count_macs(self.base, widths)
            if table:
                widths = table.widths(largest_within(self.base, table, max_macs=macs))
            start = time.perf_counter()
            small = extract(ready.model, widths)
            if method.refitted:
                refit(ready.model, small, [images for images, _ in batches], damping)
            times = {"seconds_to_prepare": seconds, "seconds_to_cut": time.perf_counter() - start}
            row = {**key, "share": share, "macs": count_macs(self.base, widths), **self.scores(self.logits(small))}
            self.add("rows", row | times)

    def apart(self, draw: int, proxy: int) -> None:
        """Attention alone, with other widths for q and k than for v, at the same MACs: would two widths pay?"""
        for shares in APART:
            known = [row for row in self.results["apart"] if row["images"] == self.val_images]
            if any((row["qk"], row["v"]) == shares for row in known):
                continue
            ready, _, _ = self.ready("best", proxy, draw, DAMPING)
            row = {"qk": shares[0], "v": shares[1], "images": self.val_images, "draw": draw, "proxy": proxy}
            self.add("apart", row | self.scores(self.logits(cut_apart(ready.model, *shares))))

    def add(self, kind: str, row: dict[str, Any]) -> None:
        self.results[kind].append(row)
        write_text(self.path, json.dumps(self.results, indent=1) + "\n")
        words = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
        print(*words.values(), sep="  ", flush=True)

    def held_out(self, number: int, draw: int) -> None:
        """The error of the guess, fitted on half of the proxy images, on the other half: relative, for each damping."""
        if any((row["proxy"], row["draw"]) == (number, draw) for row in self.results["damping"]):
            return
        batches = self.batches(proxy_set(self.images, number, draw))
        images, targets = (torch.cat(part) for part in zip(*batches, strict=True))
        halves = [list(zip(images[i::2].split(64), targets[i::2].split(64), strict=True)) for i in (0, 1)]
        model = copy.deepcopy(self.base)
        statistics = collect_statistics(model, halves[0], outputs=True)
        contract(model, statistics, "fisher", "fisher")
        others = collect_statistics(model, halves[1], outputs=True).outputs
        errors = dict.fromkeys(DAMPINGS, 0.0)
        for key, module in modules_of(model).items():
            order = torch.arange(module.heads * module.width).view(module.heads, module.width).T.flatten()
            weight, bias = ordered_layer(model, module)
            other = others[key].ordered(order)
            for damping in DAMPINGS:
                fitted = statistics.outputs[key]
                lower = torch.linalg.cholesky(fitted.damped(damping))
                cut, _ = Compensation(fitted.mean, lower, fitted.positions)(weight, bias, weight.shape[1] // 4)
                errors[damping] += relative_error(weight, cut, other) / len(others)
        self.add("damping", {"proxy": number, "draw": draw, "held_out_error": {f"{d:g}": e for d, e in errors.items()}})


def relative_error(weight: Tensor, cut: Tensor, moments: OutputMoments) -> float:
    """What a cut layer loses of the variance of a layer's output, in the metric of the loss."""
    lost = weight.clone()
    lost[:, : cut.shape[1]] -= cut
    error, whole = ((moments.metric * (w @ moments.covariance @ w.T)).sum() for w in (lost, weight))
    return (error / whole).item()


def markdown(results: dict[str, Any]) -> str:
    """The results as tables: a line a method, top-1 and KL at each share, mean over the draws; then the damping."""
    lines = []
    for whole in sorted(results["whole"], key=lambda whole: -whole["images"]):
        rows = [row for row in results["rows"] if row["images"] == whole["images"]]
        if rows:
            lines += [
                f"Whole: {whole['top1']:.1f} % of {whole['images']} images, {whole['macs'] / 1e6:.4g} M MACs.",
                "",
            ]
            lines += [*_rows(rows), ""]
    if results["damping"]:
        dampings = list(results["damping"][0]["held_out_error"])
        lines += ["| proxy images | " + " | ".join(f"damping {damping}" for damping in dampings) + " |"]
        lines += ["|---" * (len(dampings) + 1) + "|"]
        for row in results["damping"]:
            errors = " | ".join(f"{error:.4f}" for error in row["held_out_error"].values())
            lines.append(f"| {row['proxy']} (draw {row['draw']}) | {errors} |")
        lines.append("")
    if results.get("apart"):
        lines += ["| q and k kept | v kept | images | top-1 | KL |", "|---|---|---|---|---|"]
        for row in results["apart"]:
            lines.append(f"| {row['qk']:g} | {row['v']:g} | {row['images']} | {row['top1']:.1f} | {row['kl']:.4f} |")
    return "\n".join(lines).strip()


def _rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    shares = sorted({row["share"] for row in rows})
    yield "| method | proxy images x draws, damping | " + " | ".join(f"{share:g}" for share in shares) + " |"
    yield "|---" * (len(shares) + 2) + "|"
    groups = {(row["proxy"], row["damping"], row["method"]) for row in rows}
    order = list(METHODS)
    for proxy, damping, method in sorted(groups, key=lambda g: (-g[0], g[1] != DAMPING, g[1], order.index(g[2]))):
        same = [row for row in rows if (row["proxy"], row["damping"], row["method"]) == (proxy, damping, method)]
        cells = []
        for share in shares:
            found = [row for row in same if row["share"] == share]
            values = [sum(row[key] for row in found) / max(len(found), 1) for key in ("top1", "kl")]
            cells.append(f"{values[0]:.1f}, {values[1]:.4f}" if found else "")
        draws = len({row["draw"] for row in same})
        yield f"| {method} | {proxy} x {draws}, {damping:g} | " + " | ".join(cells) + " |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    group = parser.add_argument_group("study")
    group.add_argument("--name", required=True, help="of the model and data, for the files")
    group.add_argument(
        "--part", choices=("methods", "proxies", "apart"), default="methods", help="(default: %(default)s)"
    )
    group.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="seeds of the proxy sets")
    group.add_argument("--val-images", type=positive, metavar="N", help="of val/, drawn once (default: all)")
    group.add_argument(
        "--proxies", type=positive, nargs="+", default=[64, 256, 1024], metavar="N", help="numbers of proxy images"
    )
    group.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help="(default: all)")
    group.add_argument(
        "--shares", type=share_type, nargs="+", default=SHARES, metavar="X", help="of the dims that are kept"
    )
    group.add_argument("--threads", type=positive, metavar="N", help="of the CPU (default: PyTorch's)")
    parser.set_defaults(output_dir=ROOT / "docs" / "results", workers=2)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    study = Study(args, init_processes(args))
    whole = study.reference
    print(f"whole: top-1 {whole['top1']:.2f} % on {whole['images']} images, {whole['macs'] / 1e9:.3f} GMACs")
    for draw in progress_bar(args.draws, "draws"):
        if args.part == "methods":
            for method in args.methods:
                study.measure(method, draw, args.proxy_samples, DAMPING, args.shares)
            continue
        if args.part == "apart":
            study.apart(draw, args.proxy_samples)
            continue
        for number in args.proxies:
            study.held_out(number, draw)
            for damping in (DAMPING / 10, DAMPING * 10, DAMPING):
                study.measure("+ bases and order (best)", draw, number, damping, args.shares)
            study.measure("best, refitted", draw, number, DAMPING, args.shares)
            study.measure("WPAC + compensation", draw, number, DAMPING, args.shares)
    print(markdown(study.results))
    picture(study.results, study.path.with_suffix(".png"), args.name.replace("_", " "))
    print(json.dumps({"file": study.path.name, "rows": len(study.results["rows"]), "whole": whole}))


def picture(results: dict[str, Any], path: Path, title: str) -> None:
    """The picture of the methods on the most images, with the usual damping and the most proxy images."""
    whole = max(results["whole"], key=lambda whole: whole["images"])
    rows = [row for row in results["rows"] if (row["images"], row["damping"]) == (whole["images"], DAMPING)]
    most = max((row["proxy"] for row in rows), default=0)
    rows = sorted((row for row in rows if row["proxy"] == most), key=lambda row: list(METHODS).index(row["method"]))
    plot_contraction(rows, whole, path, f"{title}, {whole['images']} images")


if __name__ == "__main__":
    run_program(main)
