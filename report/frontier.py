"""Evaluating a super-network at several sizes, and the report."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import supernet
from arguments import open_network
from datasets import UNLABELLED, Images, drawn, eval_loader, open_images, proxy_set
from fidelity import ACCURACY, FIDELITY, Evaluator
from files import read_json, write_text
from main_arguments import words_to_open
from models.backbone import Backbone
from models.loading import fit_head
from models.macs import count_macs, count_params
from supernet import Network
from supernet.amounts import format_amount
from supernet.budgets import asks_for_size, chosen_op_codes
from supernet.latency import conditions_of, measure_latency
from utils import UserError, is_main_process, progress_bar, say
from wpac.compensation import COMPENSATION
from wpac.refit import refit_grade

from .measures import measures_of


def evaluate_command(args: argparse.Namespace, device: torch.device) -> None:
    """Evaluates a super-network at the sizes that the flags ask for, or a sub-network."""
    val_images = open_images(args.data_set, args.data_path, "val", args.index, args.seed)
    network, op_codes = open_at_sizes(args, val_images.num_classes)
    compared = {args.compare.name: read_compared(args.compare, network.target, val_images)} if args.compare else {}
    network.model.to(device)
    baseline = open_baseline(args, network)
    whole = network if not network.is_subnetwork else baseline
    if baseline:
        baseline.model.to(device)
    if whole is None and val_images.num_classes is None:
        raise UserError(
            f"--data-set {args.data_set} has no labels, and {args.checkpoint} is a sub-network, without the whole "
            "network to compare it with: give that as --baseline, or a data set with labels"
        )
    weights = args.checkpoint if network.is_subnetwork else network.source
    kind = "averaged (EMA)" if network.averaged else "raw"
    data = Path(args.data_path).name if args.data_set == UNLABELLED else args.data_set
    say(f"weights: {weights}, {kind}; {len(val_images)} images of {data}")
    facts = {
        "title": f"{data}: one super-network of {format_amount(count_params(network.model))} parameters",
        "weights": str(weights),
        **network.describe(),
        "grade": network.grade if args.refit is False else refit_grade(args.refit),
        "compared_with": str(whole.source) if whole else None,
        "images": len(val_images),
        **conditions_of(network.model, device, args.batch_size, args.amp, args.runtime),
    }
    if not network.is_subnetwork:
        facts |= {"full_widths": network.table.widths(0), "arguments": words_to_open(args)}
    rows = evaluate_sizes(
        network,
        op_codes,
        make_evaluator(args, network, val_images, device, whole.model if whole else None),
        device,
        batch_size=args.batch_size,
        amp=args.amp,
        runtime=args.runtime,
        baseline=baseline,
        cut=cut_or_refit(args, network, args.batch_size, args.workers),
        then=partial(write_sub_network, args, network, facts) if args.write_sub_networks else None,
    )
    write_report(rows, args.output_dir, facts, compared)


def read_compared(folder: Path, target: str, val: Images) -> list[dict[str, Any]]:
    """The sizes of another evaluation. Raises UserError for a folder without one, or with one of other measures."""
    found = read_json(folder / "frontier.json")
    sizes = found.get("sizes") if isinstance(found, dict) else None
    rows = sizes if isinstance(sizes, list) else []
    if not rows or not all(isinstance(row, dict) and type(row.get("macs_linear")) is int for row in rows):
        raise UserError(f"--compare {folder}: its frontier.json holds no sizes: give the folder of an evaluation")
    labels = any(key in row for row in rows for key in ACCURACY)
    if (found.get("images"), found.get("target"), labels) != (len(val), target, val.num_classes is not None):
        raise UserError(
            f"--compare {folder} was evaluated on {found.get('images')} images for the target {found.get('target')}, "
            f"this evaluation has {len(val)} images and the target {target}: give one of the same data and target"
        )
    return rows


def make_evaluator(
    args: argparse.Namespace, network: Network, val: Images, device: torch.device, whole: Backbone | None
) -> Evaluator:
    """What evaluates models of the network's target on the images, as far as these and the flags allow.

    whole: the network to compare with, on the device.
    """
    loading = {"batch_size": args.batch_size, "workers": args.workers}
    labels, training = val.num_classes is not None, None
    if labels and network.target != "logits":
        train = open_images(args.data_set, args.data_path, "train", args.index, args.seed)
        training = eval_loader(drawn(train, args.knn_images, args.seed), network.preprocessing, **loading)
    batches = eval_loader(val, network.preprocessing, **loading)
    amp = getattr(args, "amp", None)
    return Evaluator(network.target, batches, device, labels=labels, training=training, whole=whole, amp=amp)


def open_at_sizes(args: argparse.Namespace, num_classes: int | None) -> tuple[Network, list[int]]:
    """The network that the flags name, and the op codes that they ask for. num_classes: of the data, if it has any."""
    if args.checkpoint is None:
        raise UserError("--checkpoint is missing: give the super-network's checkpoint_<epoch>.pth, or its folder")
    network = open_network(args)
    if network.is_subnetwork:
        if args.refit is not False:
            raise UserError(f"{args.checkpoint} is a sub-network, which is cut already: leave --refit out")
        if asks_for_size(args) or args.frontier or args.latency_table:
            raise UserError(
                f"{args.checkpoint} is a sub-network, which has one size: leave --op-code, budgets and tables out"
            )
    if network.target == "logits" and num_classes is not None:
        fit_head(network.model, num_classes, remake=False)
    return network, [0] if network.is_subnetwork else chosen_op_codes(args, network)


def open_baseline(args: argparse.Namespace, network: Network) -> Network | None:
    """The weights of --baseline with the mask table of the network that they are compared with."""
    if args.baseline is None:
        return None
    folder = args.baseline if args.baseline.is_dir() else args.baseline.parent
    alone = network.is_subnetwork or not (folder / COMPENSATION).is_file()
    baseline = supernet.load(args.baseline, name=network.name, model_kwargs=network.model_kwargs, plain_weights=alone)
    if baseline.preprocessing != network.preprocessing:
        raise UserError(
            f"--baseline {args.baseline} prepares images by {baseline.preprocessing}, {network.source} by "
            f"{network.preprocessing}: they cannot be compared"
        )
    return replace(baseline, table=network.table)


def cut_or_refit(
    args: argparse.Namespace, network: Network, batch_size: int, workers: int
) -> Callable[[int], Backbone]:
    """What cuts the sub-network of an op code and, where --refit says so, refits it on the proxy set."""
    if args.refit is False:
        return network.cut
    train = open_images(args.data_set, args.data_path, "train", args.index, args.seed)
    proxy = proxy_set(train, args.proxy_samples, args.seed)
    loader = eval_loader(proxy, network.preprocessing, batch_size=batch_size, workers=workers)
    return lambda code: network.cut(code, refit=(images for images, _ in loader), refit_steps=args.refit)


def write_sub_network(
    args: argparse.Namespace, network: Network, facts: dict[str, Any], model: Backbone, row: dict[str, Any]
) -> None:
    """Writes an evaluated sub-network as the folder op_<code>/, with the accuracy and the fidelity that were found."""
    if is_main_process():
        found = {}
        for name, measures in {"accuracy": ACCURACY, "fidelity": FIDELITY}.items():
            values = {key: row[key] for key in measures if key in row}
            found |= {name: values | {"images": facts["images"], "data_set": args.data_set}} if values else {}
        network.save(
            args.output_dir / f"op_{row['op_code']}",
            model,
            op_code=row["op_code"],
            **found,
        )


def describe(model: Backbone) -> dict[str, int]:
    """The size of a model: macs_linear and macs_full per image, params."""
    return {
        "macs_linear": count_macs(model),
        "macs_full": count_macs(model, convention="full"),
        "params": count_params(model),
    }


def evaluate_sizes(
    network: Network,
    op_codes: list[int],
    evaluator: Evaluator,
    device: torch.device,
    *,
    batch_size: int,
    amp: torch.dtype | None = None,
    runtime: str = "eager",
    baseline: Network | None = None,
    cut: Callable[[int], Backbone] | None = None,
    then: Callable[[Backbone, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """A row per op code: widths, size counted on the extracted model, what the evaluator finds, images per second.

    runtime: of the images per second, see supernet.runtimes.
    baseline: other weights with the same mask table, on the device; what they have of the first measure goes into
    baseline_<measure>.  cut: gives the sub-network of an op code (default: network.cut).  then(sub-network, row) is
    called for each.
    """
    rows = []
    for code in progress_bar(op_codes, "sizes"):
        small = (cut or network.cut)(code).to(device)
        speed = {"images_per_second": batch_size / measure_latency(small, batch_size, amp, runtime)}
        found = evaluator(small)
        row = {"op_code": network.known_code(code), "grade": network.grade_of(small)}
        row |= {**describe(small), **found, **speed, "widths": network.table.widths(code)}
        if baseline is not None:
            main = next(iter(measures_of(found)))
            row[f"baseline_{main}"] = evaluator(baseline.cut(code))[main]
        rows.append(row)
        if then:
            then(small, row)
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as a text table, with lines on what the columns mean."""
    columns = {
        "op code": lambda row: str(row["op_code"]),
        "MACs": lambda row: format_amount(row["macs_linear"]),
        "MACs full": lambda row: format_amount(row["macs_full"]),
        "params": lambda row: format_amount(row["params"]),
    }
    notes = ["MACs: per image, linear layers alone, as the paper counts; MACs full: with the attention products."]
    measures = measures_of(rows[0])
    for key, measure in measures.items():
        columns[measure.name] = lambda row, key=key, measure=measure: measure.text(row[key])
        notes += [measure.note()] if key not in ("top1", "top5") else []
    if "images_per_second" in rows[0]:
        columns["images/s"] = lambda row: f"{row['images_per_second']:.0f}"
    main = next(iter(measures), None)
    if f"baseline_{main}" in rows[0]:
        columns["untrained"] = lambda row: measures[main].text(row[f"baseline_{main}"])
        notes.append(f"untrained: {measures[main].name} of the same widths cut from the weights of --baseline.")
    lines = ["  ".join(f"{name:>9}" for name in columns)]
    lines += ["  ".join(f"{cell(row):>9}" for cell in columns.values()) for row in rows]
    return "\n".join(lines + notes)


def write_report(
    rows: list[dict[str, Any]],
    folder: Path,
    facts: dict[str, Any],
    compared: dict[str, list[dict[str, Any]]] | None = None,
) -> None:
    """Prints the rows, and writes frontier.txt, .csv, .json (with the facts) and .png, and widths.png.

    On the main process. facts: title, device and batch_size of the measurement; full_widths, without which there is no
    widths.png; and whatever else is to stand in frontier.json.  compared: name -> rows of another evaluation.
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
    from report.plots import plot_frontier, plot_widths  # here, because matplotlib is slow to import

    measured = f"{facts['batch_size']} at a time, {facts['device']}"
    plot_frontier(rows, folder / "frontier.png", facts["title"], measured, compared or {})
    names = ["frontier.txt", "frontier.csv", "frontier.json", "frontier.png"]
    if "full_widths" in facts:
        plot_widths(rows, facts["full_widths"], folder / "widths.png")
        names.append("widths.png")
    else:
        (folder / "widths.png").unlink(missing_ok=True)  # of an earlier evaluation
    say(f"written: {folder}/{', '.join(names)}")
