"""WPAC: contracts a pre-trained vision transformer. Its function stays; its knowledge moves to the leading dims."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader

from arguments import data_overrides, parse_reparam_arguments
from datasets import eval_loader, open_splits, preprocessing, proxy_set
from engine import evaluate
from files import atomic_file, check_output_dir, write_text
from models.backbone import fit_head, full_widths, load_backbone
from models.extraction import extract
from utils import UserError, init_processes, is_main_process, progress_bar, run_program, say, seed_everything
from wpac.statistics import collect_statistics
from wpac.transform import contract

SHARES = (0.25, 0.5, 0.75)


def main() -> None:
    args = parse_reparam_arguments()
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
    statistics = collect_statistics(model, progress_bar(proxy, "statistics"), args.cost)
    spectra = contract(model, statistics)
    after = logits_of(model, probe)
    facts = {
        "model": args.model,
        "model_kwargs": args.model_kwargs,
        "num_classes": model.num_classes,
        "preprocessing": config,
        "checkpoint": str(args.checkpoint or "timm pretrained"),
        "averaged_weights": args.use_ema,
        "cost": args.cost,
        "proxy_samples": args.proxy_samples,
        "seed": args.seed,
        "logit_difference": ((after - before).abs().max() / before.abs().max()).item(),
        "shares": shares_of(spectra),
    }
    report_exactness(facts)
    if val:
        facts["top1"] = {"before": top1_before, **truncated_top1(model, val_batches, device)}
        for name, value in facts["top1"].items():
            say(f"top-1 {name}: {value:.2f} %")
    save(model, facts, args.output_dir)


@torch.inference_mode()
def logits_of(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    return model(images).double()


def shares_of(spectra: dict[str, torch.Tensor]) -> dict[str, dict[str, list[float]]]:
    """Share of weighted variance (attention: qk, v) or of importance (MLP) in the first 1/4, 1/2, 3/4 dims."""
    shares = {}
    for key, spectrum in spectra.items():
        names = ("qk", "v") if key.endswith(".attn") else ("hidden",)
        totals = spectrum.view(len(names), -1).cumsum(1)
        columns = [int(share * totals.shape[1]) - 1 for share in SHARES]
        shares[key] = {name: row[columns].tolist() for name, row in zip(names, totals, strict=True)}
    return shares


def report_exactness(facts: dict) -> None:
    say(f"largest difference of the logits before and after: {facts['logit_difference']:.1e} of the largest logit")
    say("share of weighted variance (MLP: of importance) in the first 1/4, 1/2, 3/4 of the dims:")
    for key, parts in facts["shares"].items():
        say(f"  {key:>8}  " + "   ".join(f"{name} " + " ".join(f"{v:.3f}" for v in row) for name, row in parts.items()))


def truncated_top1(model: VisionTransformer, batches: DataLoader, device: torch.device) -> dict[str, float]:
    """Top-1 of the contracted model, percent: whole, and with 3/4, 1/2, 1/4 of its attention dims."""
    results = {"after": evaluate(model, batches, device)["top1"]}
    for share in reversed(SHARES):
        widths = {k: int(w * share) if k.endswith(".attn") else w for k, w in full_widths(model).items()}
        small = extract(model, widths)
        results[f"at {share:g} of the attention dims"] = evaluate(small, batches, device)["top1"]
    return results


def save(model: VisionTransformer, facts: dict, folder: Path) -> None:
    if not is_main_process():
        return
    weights = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_file(folder / "contracted.safetensors") as temporary:
        save_file(weights, temporary)
    write_text(folder / "contracted.json", json.dumps(facts, indent=1) + "\n")
    say(f"written: {folder / 'contracted.safetensors'} and contracted.json")


if __name__ == "__main__":
    run_program(main)
