"""Evaluating sub-networks of several sizes: how good they are, and the report."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from arguments import data_overrides
from datasets import eval_loader, open_images, preprocessing, proxy_set
from engine import evaluate
from files import write_text
from main_arguments import super_network_words
from models.backbone import Backbone, full_widths
from models.extraction import extract
from models.loading import fit_head, load_backbone
from models.macs import count_macs, count_params
from piad.mask_table import MaskTable
from supernet.budgets import asks_for_size, chosen_op_codes
from supernet.folder import load_subnetwork, save_subnetwork
from supernet.latency import measure_latency
from supernet.opening import load_super_network
from supernet.selection import format_amount
from utils import UserError, device_name, is_main_process, progress_bar, say
from wpac.compensation import compensate_from
from wpac.refit import check_refit, refit


def evaluate_command(args: argparse.Namespace, device: torch.device) -> None:
    """Evaluates sub-networks of a super-network at the sizes asked for, or one sub-network folder."""
    val_images = open_images(args.data_set, args.data_path, "val")
    model, table, op_codes, config, grade = _open(args, val_images.num_classes)
    baseline = None
    if args.baseline:
        baseline = load_backbone(
            args.model, args.model_kwargs, num_classes=val_images.num_classes, checkpoint=args.baseline
        ).eval()
    loading = {"batch_size": args.batch_size, "workers": args.workers}
    val = eval_loader(val_images, config, **loading)
    weights = args.sub_network or args.checkpoint
    kind = "averaged (EMA)" if args.use_ema else "raw"
    say(f"weights: {weights}, {kind}; {len(val_images)} images of {args.data_set}")
    cut = extract
    if args.refit:
        train = open_images(args.data_set, args.data_path, "train")
        proxy = eval_loader(proxy_set(train, args.proxy_samples, args.seed), config, **loading)
        cut, grade = partial(refitted, images=[images for images, _ in proxy], device=device), "refitted"
    facts = {
        "title": f"{args.data_set}: one super-network of {format_amount(count_params(model))} parameters",
        "weights": str(weights),
        "averaged_weights": args.use_ema,
        "grade": grade,
        "images": len(val_images),
        "device": device_name(device),
        "batch_size": args.batch_size,
    }
    if not args.sub_network:
        facts |= {"full_widths": table.widths(0), "arguments": super_network_words(args)}
    write = partial(write_sub_network, args, config, facts) if args.write_sub_networks else None
    amp = getattr(torch, args.amp) if args.amp else None
    rows = evaluate_sizes(model, table, op_codes, val, device, amp=amp, baseline=baseline, cut=cut, then=write)
    write_report(rows, args.output_dir, facts)


def _open(args: argparse.Namespace, num_classes: int) -> tuple[Backbone, MaskTable, list[int], dict[str, Any], str]:
    """What the flags name: the model, its sizes, the op codes asked for, the preprocessing, and how sizes are cut."""
    if args.sub_network:
        if args.refit or args.compensate:
            raise UserError(f"--sub-network {args.sub_network} is cut already: leave --refit and --compensate out")
        if asks_for_size(args) or args.frontier:
            raise UserError(f"--sub-network {args.sub_network} has one size: leave --op-code and budgets out")
        model, facts = load_subnetwork(args.sub_network)
        table, op_codes, grade = MaskTable([full_widths(model)]), [0], facts.get("grade", "cut")
        config = facts["preprocessing"] | {k: v for k, v in data_overrides(args).items() if v is not None}
    else:
        model, table = load_super_network(
            args.model,
            args.model_kwargs,
            checkpoint=args.checkpoint,
            mask_table=args.mask_table,
            num_classes=num_classes,
            use_ema=args.use_ema,
        )
        if args.refit:
            check_refit(model)
        grade = compensate_from(args.checkpoint, model, args.compensate)
        op_codes = chosen_op_codes(args, model, table)
        config = preprocessing(model, data_overrides(args))
    fit_head(model, num_classes, remake=False)
    return model.eval(), table, op_codes, config, grade


def refitted(model: Backbone, widths: dict[str, int], images: list[torch.Tensor], device: torch.device) -> Backbone:
    """The sub-network at `widths`, its linear layers solved anew on the images."""
    small = extract(model, widths).to(device)
    refit(model, small, images)
    return small


def write_sub_network(
    args: argparse.Namespace, config: dict, facts: dict[str, Any], model: Backbone, row: dict[str, Any]
) -> None:
    """Writes an evaluated sub-network as the folder op_<code>/."""
    if is_main_process():
        save_subnetwork(
            args.output_dir / f"op_{row['op_code']}",
            model,
            name=args.model,
            model_kwargs=args.model_kwargs,
            preprocessing=config,
            op_code=row["op_code"],
            accuracy={key: row[key] for key in ("top1", "top5", "loss")} | {"images": facts["images"]},
            data_set=args.data_set,
            grade=facts["grade"],
        )


def describe(model: Backbone) -> dict[str, int]:
    """The size of a model as it stands: macs_linear and macs_full for one image, params."""
    return {
        "macs_linear": count_macs(model),
        "macs_full": count_macs(model, convention="full"),
        "params": count_params(model),
    }


def evaluate_sizes(
    model: Backbone,
    table: MaskTable,
    op_codes: list[int],
    batches: DataLoader,
    device: torch.device,
    *,
    amp: torch.dtype | None = None,
    baseline: Backbone | None = None,
    cut: Callable[[Backbone, dict[str, int]], Backbone] = extract,
    then: Callable[[Backbone, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """A row for each op code: widths, size counted on the extracted model, accuracy on the batches, speed by latency.

    baseline: other weights of the same backbone, cut to the same widths; their top-1 goes into baseline_top1.
    cut: makes a sub-network of widths.  then(sub-network, row): what else is done with each.
    """
    rows = []
    for code in progress_bar(op_codes, "sizes"):
        widths = table.widths(code)
        small = cut(model, widths).to(device)
        speed = {"images_per_second": batches.batch_size / measure_latency(small, batches.batch_size, amp)}
        row = {"op_code": code, **describe(small), **evaluate(small, batches, device, amp), **speed, "widths": widths}
        if baseline is not None:
            row["baseline_top1"] = evaluate(extract(baseline, widths).to(device), batches, device, amp)["top1"]
        rows.append(row)
        if then:
            then(small, row)
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as text, with a line on what the columns mean."""
    columns = {
        "op code": lambda row: str(row["op_code"]),
        "MACs": lambda row: format_amount(row["macs_linear"]),
        "MACs full": lambda row: format_amount(row["macs_full"]),
        "params": lambda row: format_amount(row["params"]),
        "top-1": lambda row: f"{row['top1']:.2f}",
        "top-5": lambda row: f"{row['top5']:.2f}",
        "images/s": lambda row: f"{row['images_per_second']:.0f}",
    }
    notes = ["MACs: for one image, linear layers alone, as the paper counts; MACs full: attention products too."]
    if "baseline_top1" in rows[0]:
        columns["untrained"] = lambda row: f"{row['baseline_top1']:.2f}"
        notes.append("untrained: top-1 of the same widths cut from the contracted weights, without PIAD.")
    lines = ["  ".join(f"{name:>9}" for name in columns)]
    lines += ["  ".join(f"{cell(row):>9}" for cell in columns.values()) for row in rows]
    return "\n".join(lines + notes)


def write_report(rows: list[dict[str, Any]], folder: Path, facts: dict[str, Any]) -> None:
    """Prints the rows and writes frontier.txt, .csv, .json (with the facts) and .png, and widths.png.

    On the main process. facts: title, device and batch_size of the measurement, and full_widths, without which there
    is no widths.png.
    """
    if not is_main_process():
        return
    print(table_of(rows))
    write_text(folder / "frontier.txt", table_of(rows) + "\n")
    text = io.StringIO()
    columns = [name for name in rows[0] if name != "widths"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "frontier.csv", text.getvalue())
    write_text(folder / "frontier.json", json.dumps({**facts, "sizes": rows}, indent=1) + "\n")
    from report.plots import plot_frontier, plot_widths  # only here: matplotlib is slow to import

    measured = f"{facts['batch_size']} at a time, {facts['device']}"
    plot_frontier(rows, folder / "frontier.png", facts["title"], measured)
    names = ["frontier.txt", "frontier.csv", "frontier.json", "frontier.png"]
    if "full_widths" in facts:
        plot_widths(rows, facts["full_widths"], folder / "widths.png")
        names.append("widths.png")
    else:
        (folder / "widths.png").unlink(missing_ok=True)  # of another evaluation
    say(f"written: {folder}/{', '.join(names)}")
