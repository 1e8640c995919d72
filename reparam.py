"""WPAC: contracts a pre-trained vision transformer. Its function stays; its knowledge moves to the leading dims."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from arguments import (
    Parser,
    add_common_arguments,
    add_cost_of,
    add_dropout_ratio,
    add_refit,
    decimal,
    open_network,
)
from datasets import check_labels, eval_loader, open_splits, proxy_set
from fidelity import Evaluator
from files import check_output_dir
from logs import TensorBoard
from models.backbone import full_widths
from models.extraction import extract
from models.loading import fit_head
from models.targets import COSTS, LABELLED, TARGETS, check_cost, check_target, default_cost
from report.frontier import make_evaluator
from report.measures import sentence
from supernet import Network
from supernet.contraction import METHODS, Contraction, contract_network, save_contracted
from supernet.tables import DROPOUT_RATIO
from utils import UserError, init_processes, is_main_process, peak_memory, run_program, say, seed_everything
from wpac.compensation import DAMPING
from wpac.refit import refit
from wpac.transform import BASES, ORDERS

SHARES = (0.25, 0.5, 0.75)
MEASURES = {"wpac": "weighted variance", "fisher": "effect on scores and loss"}  # by which a basis orders dims


def main() -> None:
    args = parse_arguments()
    device = init_processes(args)
    seed_everything(args.seed)
    if args.checkpoint is None and not args.pretrained:
        raise UserError("no weights to contract: give --checkpoint FILE, or --pretrained for timm's weights")
    check_output_dir(args.output_dir)

    images, val = open_splits(
        args.data_set, args.data_path, with_val=not args.no_eval, index=args.index, seed=args.seed
    )
    labels = images.num_classes is not None
    if args.cost in LABELLED:
        check_labels(images, args.data_set, f"--cost {args.cost}", "leave it out, or give another cost")
    network = open_network(args, plain_weights=True)
    if network.is_subnetwork:
        raise UserError(f"{args.checkpoint} is a sub-network: contract the whole network")
    model = network.model.to(device)
    network.target = args.target or network.target
    check_target(model, network.target)
    profile = network.profile(args.cost_of) if args.cost_of else None
    paper = args.method == "paper" and network.target == "logits" and labels
    cost = args.cost or ("logit" if paper else default_cost(network.target))
    check_cost(cost, network.target)
    if network.target == "logits" and (cost in LABELLED or (labels and val)):
        fit_head(model, images.num_classes, remake=False)
    proxy_images = proxy_set(images, args.proxy_samples, args.seed)
    proxy = eval_loader(proxy_images, network.preprocessing, batch_size=args.batch_size, workers=args.workers)

    found = {"before": make_evaluator(args, network, val, device, None)(model)} if val and labels else {}
    contraction = contract_network(
        network,
        proxy,
        method=args.method,
        cost=cost,
        basis=args.basis,
        order=args.order,
        damping=args.damping,
        dropout_ratio=args.dropout_ratio if args.mask_table else None,
        profile=profile,
    )
    facts = facts_of(args, contraction) | {"cost": cost, "proxy_samples": len(proxy_images)}
    report(facts, network.target)
    if val:
        evaluator = make_evaluator(args, network, val, device, model)
        facts["evaluation"] = found | truncated_models(network, evaluator, proxy, args.refit)
        for name, values in facts["evaluation"].items():
            say(f"{name}: {sentence(values)}")
    save_contracted(network, args.output_dir, facts, with_table=args.mask_table)
    show(contraction, facts, args.output_dir, len(proxy.dataset) / contraction.seconds, peak_memory(device))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="WPAC: rotate and sort the weights of a vision transformer, keeping its function.")
    add_common_arguments(parser)
    group = parser.add_argument_group("WPAC")
    group.add_argument(
        "--target",
        choices=TARGETS,
        help="what sub-networks keep of the whole network: logits, features (pooled, as the head would get them), or "
        "tokens (all of them after the last norm, for dense tasks) (default: logits; tokens where there is no head)",
    )
    group.add_argument(
        "--cost",
        choices=COSTS,
        help="the cost whose gradient weighs the tokens. With labels: logit of the true class, ce = cross-entropy. "
        "Without: pred = the largest logit, fisher = cross-entropy of a class drawn from the prediction; signs = the "
        "features or tokens times random signs (default: logit; fisher with --method best, or without labels; signs "
        "for features and tokens)",
    )
    group.add_argument(
        "--no-eval", action="store_true", help="skip the evaluation on val/, or on the images that are held back"
    )
    add_refit(group)
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
        help="of compensation: share of the mean variance that is added to the variance of each input (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--mask-table",
        action="store_true",
        help="with --method best: also write mask_table.json, sizes chosen by the loss of each dim, without training",
    )
    add_cost_of(group)
    add_dropout_ratio(group, DROPOUT_RATIO, "MACs, or with --cost-of of the time,")
    args = parser.parse_args()
    if args.mask_table and args.method != "best":
        parser.error("--mask-table needs --method best: its sizes are for compensated sub-networks")
    if args.refit is not False and args.no_eval:
        parser.error("--refit is for the sub-networks of the evaluation: leave --no-eval out")
    if args.cost_of and not args.mask_table:
        parser.error("--cost-of says what --mask-table is made for: give both")
    basis, order = METHODS[args.method]
    args.basis, args.order = args.basis or basis, args.order or order
    return args


def facts_of(args: argparse.Namespace, contraction: Contraction) -> dict:
    """What contracted.json says of how the weights were made, besides the description of the network."""
    facts = {
        "checkpoint": str(args.checkpoint or "timm pretrained"),
        **{key: getattr(args, key) for key in ("basis", "order", "seed")},
        "target_difference": contraction.difference,
        "shares": shares_of(contraction.spectra),
    }
    if args.method == "best":
        facts |= {"damping": args.damping, "not_compensated": contraction.not_compensated}
    return facts


def shares_of(spectra: dict[str, torch.Tensor]) -> dict[str, dict[str, list[float]]]:
    """Share of weighted variance (attention: qk, v) or of importance (MLP) in the first 1/4, 1/2, 3/4 dims."""
    shares = {}
    for key, spectrum in spectra.items():
        names = (("qk", "v") if len(spectrum) == 2 else ("v",)) if key.endswith(".attn") else ("hidden",)
        totals = spectrum.view(len(names), -1).cumsum(1)
        columns = [int(share * totals.shape[1]) - 1 for share in SHARES]
        shares[key] = {name: row[columns].tolist() for name, row in zip(names, totals, strict=True)}
    return shares


def report(facts: dict, target: str) -> None:
    """Prints what contraction found."""
    say(f"largest difference of the {target} before and after: {facts['target_difference']:.1e} of the largest value")
    for key in facts.get("not_compensated", []):
        say(f"{key} is cut without compensation, which makes the proxy images worse; more of them may help")
    say(f"share of {MEASURES[facts['basis']]} (MLP: of importance) in the first 1/4, 1/2, 3/4 of the dims:")
    for key, parts in facts["shares"].items():
        say(f"  {key:>8}  " + "   ".join(f"{name} " + " ".join(f"{v:.3f}" for v in row) for name, row in parts.items()))


def truncated_models(
    network: Network, evaluator: Evaluator, proxy: DataLoader, refit_steps: int | Literal[False]
) -> dict[str, dict[str, float]]:
    """What the evaluator finds of the contracted model: whole, and with 3/4, 1/2, 1/4 of its attention dims.

    refit_steps: of refitting on the proxy images (0: least squares); False leaves the truncated models as they are cut.
    """
    model, results = network.model, {"after": evaluator(network.model)}
    for share in reversed(SHARES):
        widths = {k: int(w * share) if k.endswith(".attn") else w for k, w in full_widths(model).items()}
        small = extract(model, widths)
        if refit_steps is not False:
            refit(model, small, (images for images, _ in proxy), network.target, refit_steps)
        results[truncated(share)] = evaluator(small)
    return results


def truncated(share: float) -> str:
    """The name of a truncated model in reports."""
    return f"at {share:g} of the attention dims"


def show(contraction: Contraction, facts: dict, folder: Path, images_per_second: float, memory: int) -> None:
    """Writes spectra.png, and to TensorBoard the picture, the evaluation, and speed and memory of the statistics.

    Contraction has no steps: a measured value stands at the percentage of the attention dims that are kept.
    """
    if not is_main_process():
        return
    from report.plots import draw_spectra, plot_spectra  # here, because matplotlib is slow to import

    shares = {key: np.atleast_2d(spectrum.cpu().numpy()).tolist() for key, spectrum in contraction.spectra.items()}
    measure = MEASURES[facts["basis"]]
    plot_spectra(shares, folder / "spectra.png", measure)
    say(f"written: {folder / 'spectra.png'}")
    log = TensorBoard(folder)
    log.figure("spectra", partial(draw_spectra, shares, measure), 0)
    found = facts.get("evaluation", {})
    for share, name in {1.0: "after", **{share: truncated(share) for share in SHARES}}.items() if found else ():
        log.scalars(found[name], round(100 * share))
    log.machine(images_per_second, memory, 0)
    log.close()


if __name__ == "__main__":
    run_program(main)
