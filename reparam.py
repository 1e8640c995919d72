"""WPAC: contracts a pre-trained vision transformer. Its function stays; its knowledge moves to the leading dims."""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from arguments import Parser, add_common_arguments, add_dropout_ratio, data_overrides, decimal
from datasets import eval_loader, open_splits, preprocessing, proxy_set
from engine import evaluate
from files import atomic_file, check_output_dir, write_text
from logs import TensorBoard
from models.backbone import Backbone, full_widths, modules_of
from models.extraction import extract
from models.loading import fit_head, load_backbone
from models.macs import count_macs, fixed_macs, macs_per_dim
from models.taylor import COSTS
from piad.dropout_list import grow, unit_sizes
from piad.mask_table import MASK_TABLE, MaskTable
from supernet.opening import CONTRACTED
from utils import (
    UserError,
    init_processes,
    is_main_process,
    peak_memory,
    progress_bar,
    run_program,
    say,
    seed_everything,
)
from wpac.allocation import dim_errors
from wpac.compensation import COMPENSATION, DAMPING, compensate, save_compensation
from wpac.statistics import collect_statistics
from wpac.transform import BASES, ORDERS, contract

SHARES = (0.25, 0.5, 0.75)


# --method: basis and order.
MEASURES = {"wpac": "weighted variance", "fisher": "effect on scores and loss"}  # by which a basis orders dims
METHODS = {"paper": ("wpac", "taylor"), "best": ("fisher", "fisher")}


def main() -> None:
    args = parse_arguments()
    device = init_processes(args)
    seed_everything(args.seed)
    if args.checkpoint is None and not args.pretrained:
        raise UserError("no weights to contract: give --checkpoint FILE, or --pretrained for timm's weights")
    check_output_dir(args.output_dir)

    images, val = open_splits(args.data_set, args.data_path, with_val=not args.no_eval)
    model = load_backbone(
        args.model,
        args.model_kwargs,
        num_classes=images.num_classes,
        checkpoint=args.checkpoint,
        pretrained=args.pretrained,
        use_ema=args.use_ema,
    ).to(device)
    model.eval()
    if args.cost != "pred":
        fit_head(model, images.num_classes, remake=False)
    config = preprocessing(model, data_overrides(args))
    loading = {"batch_size": args.batch_size, "workers": args.workers}
    proxy = eval_loader(proxy_set(images, args.proxy_samples, args.seed), config, **loading)
    val_batches = eval_loader(val, config, **loading) if val else None

    probe = next(iter(proxy))[0].to(device)
    before = logits_of(model, probe)
    top1_before = evaluate(model, val_batches, device)["top1"] if val else None
    start = time.perf_counter()
    statistics = collect_statistics(
        model,
        progress_bar(proxy, "statistics"),
        args.cost,
        squared=args.order == "hessian",
        outputs=args.method == "best" or "fisher" in (args.basis, args.order),
    )
    images_per_second = len(proxy.dataset) / (time.perf_counter() - start)
    spectra = contract(model, statistics, args.basis, args.order, args.damping)
    if args.method == "best":
        without = compensate(model, statistics.outputs, args.damping)
    after = logits_of(model, probe)
    facts = {
        "model": args.model,
        "model_kwargs": args.model_kwargs,
        "num_classes": model.num_classes,
        "preprocessing": config,
        "checkpoint": str(args.checkpoint or "timm pretrained"),
        "averaged_weights": args.use_ema,
        "cost": args.cost,
        "method": args.method,
        "basis": args.basis,
        "order": args.order,
        "proxy_samples": args.proxy_samples,
        "seed": args.seed,
        "logit_difference": ((after - before).abs().max() / before.abs().max()).item(),
        "shares": shares_of(spectra),
    }
    if args.method == "best":
        facts |= {"damping": args.damping, "not_compensated": without}
    report(facts)
    if val:
        facts["top1"] = {"before": top1_before, **truncated_top1(model, val_batches, device)}
        for name, value in facts["top1"].items():
            say(f"top-1 {name}: {value:.2f} %")
    table = None
    if args.mask_table:
        table = table_without_training(model, dim_errors(model, statistics, args.damping), args)
    save(model, facts, table, args.output_dir)
    show(spectra, facts, args.output_dir, images_per_second, peak_memory(device))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="WPAC: rotate and sort the weights of a vision transformer, keeping its function.")
    add_common_arguments(parser)
    group = parser.add_argument_group("WPAC")
    group.add_argument(
        "--cost",
        choices=COSTS,
        default="logit",
        help="whose gradient weighs the tokens: logit of the true class, ce = cross-entropy, pred = the "
        "largest logit, for images without labels (default: %(default)s)",
    )
    group.add_argument("--no-eval", action="store_true", help="skip the evaluation on val/")
    group.add_argument(
        "--method",
        choices=METHODS,
        default="paper",
        help="paper: principal axes for attention, hidden units sorted; best: both by their effect on the loss, and "
        "compensation.safetensors, with which sub-networks make up for what they lost (default: %(default)s)",
    )
    group.add_argument("--basis", choices=BASES, help="of attention dims (default: wpac; fisher with --method best)")
    group.add_argument("--order", choices=ORDERS, help="of hidden units (default: taylor; fisher with --method best)")
    group.add_argument(
        "--damping",
        type=decimal,
        default=DAMPING,
        metavar="X",
        help="of compensation: share of the mean variance added to each input's (default: %(default)s)",
    )
    group.add_argument(
        "--mask-table",
        action="store_true",
        help="with --method best: also write mask_table.json, sizes chosen by the loss of each dim, without training",
    )
    add_dropout_ratio(group)
    args = parser.parse_args()
    if args.mask_table and args.method != "best":
        parser.error("--mask-table needs --method best: its sizes are for compensated sub-networks")
    basis, order = METHODS[args.method]
    args.basis, args.order = args.basis or basis, args.order or order
    return args


@torch.inference_mode()
def logits_of(model: Backbone, images: torch.Tensor) -> torch.Tensor:
    return model(images).double()


def shares_of(spectra: dict[str, torch.Tensor]) -> dict[str, dict[str, list[float]]]:
    """Share of weighted variance (attention: qk, v) or of importance (MLP) in the first 1/4, 1/2, 3/4 dims."""
    shares = {}
    for key, spectrum in spectra.items():
        names = (("qk", "v") if len(spectrum) == 2 else ("v",)) if key.endswith(".attn") else ("hidden",)
        totals = spectrum.view(len(names), -1).cumsum(1)
        columns = [int(share * totals.shape[1]) - 1 for share in SHARES]
        shares[key] = {name: row[columns].tolist() for name, row in zip(names, totals, strict=True)}
    return shares


def report(facts: dict) -> None:
    say(f"largest difference of the logits before and after: {facts['logit_difference']:.1e} of the largest logit")
    for key in facts.get("not_compensated", []):
        say(f"{key} is cut without compensation: with it the proxy images come out worse; more of them may help")
    say(f"share of {MEASURES[facts['basis']]} (MLP: of importance) in the first 1/4, 1/2, 3/4 of the dims:")
    for key, parts in facts["shares"].items():
        say(f"  {key:>8}  " + "   ".join(f"{name} " + " ".join(f"{v:.3f}" for v in row) for name, row in parts.items()))


def truncated_top1(model: Backbone, batches: DataLoader, device: torch.device) -> dict[str, float]:
    """Top-1 of the contracted model, percent: whole, and with 3/4, 1/2, 1/4 of its attention dims."""
    results = {"after": evaluate(model, batches, device)["top1"]}
    for share in reversed(SHARES):
        widths = {k: int(w * share) if k.endswith(".attn") else w for k, w in full_widths(model).items()}
        small = extract(model, widths)
        results[truncated(share)] = evaluate(small, batches, device)["top1"]
    return results


def truncated(share: float) -> str:
    """The name of a model that is cut so."""
    return f"at {share:g} of the attention dims"


def table_without_training(model: Backbone, errors: dict[str, np.ndarray], args: argparse.Namespace) -> MaskTable:
    """The mask table that drops units by the loss of their dims for each MAC, all at once."""
    modules = modules_of(model)
    macs = {key: macs_per_dim(module) for key, module in modules.items()}
    fixed = {key: fixed_macs(module) for key, module in modules.items()}
    whole = MaskTable([full_widths(model)], {"model": args.model, "made_by": "reparam.py --mask-table"})
    return grow(whole, errors, unit_sizes(modules), macs, args.dropout_ratio * count_macs(model), fixed)


def save(model: Backbone, facts: dict, table: MaskTable | None, folder: Path) -> None:
    if not is_main_process():
        return
    weights = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_file(folder / CONTRACTED) as temporary:
        save_file(weights, temporary)
    write_text(folder / "contracted.json", json.dumps(facts, indent=1) + "\n")
    say(f"written: {folder / CONTRACTED} and contracted.json")
    if facts["method"] == "best":
        size = save_compensation(folder / COMPENSATION, model)
        say(f"written: {folder / COMPENSATION}, {size / 1e6:.1f} MB")
    else:
        (folder / COMPENSATION).unlink(missing_ok=True)  # of weights that are no longer there
    if table:
        table.save(folder / MASK_TABLE)
        say(f"written: {folder / MASK_TABLE}, {len(table)} sizes, without training")


def show(spectra: dict[str, torch.Tensor], facts: dict, folder: Path, images_per_second: float, memory: int) -> None:
    """Writes spectra.png, and TensorBoard: the picture, top-1, and speed and memory of the statistics.

    There is one pass and no step: a point of top-1 stands at the percentage of the attention dims that are kept.
    """
    if not is_main_process():
        return
    from report.plots import draw_spectra, plot_spectra  # only here: matplotlib is slow to import

    shares = {key: np.atleast_2d(spectrum.cpu().numpy()).tolist() for key, spectrum in spectra.items()}
    measure = MEASURES[facts["basis"]]
    plot_spectra(shares, folder / "spectra.png", measure)
    say(f"written: {folder / 'spectra.png'}")
    log = TensorBoard(folder)
    log.figure("spectra", partial(draw_spectra, shares, measure), 0)
    top1 = facts.get("top1", {})
    for share, name in {1.0: "after", **{share: truncated(share) for share in SHARES}}.items() if top1 else ():
        log.scalars({"top1": top1[name]}, round(100 * share))
    log.machine(images_per_second, memory, 0)
    log.close()


if __name__ == "__main__":
    run_program(main)
