"""Study 1: what is left of a network when attention dims are cut without training, and what that hangs on.

    python -m studies.truncation --name vit_small_cifar10 --data-path DIR --checkpoint FILE ...

Parts: by which criterion dims are chosen (the paper's table); which tokens weigh in WPAC's statistics; how many proxy
images; which cost; what is cut. Top-1 (percent) on val/, and the KL divergence of the outputs from the whole model's.
Writes docs/results/truncation_NAME.json, a row as soon as it is there (what is there is not measured again), and a
picture a part.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from models.backbone import full_widths
from models.extraction import extract
from report.plots import plot_truncation
from studies.common import CutStudy, add_study_arguments, silence
from studies.criteria import CRITERIA, importance_by, sort_dims
from utils import init_processes, progress_bar, run_program
from wpac.statistics import collect_statistics
from wpac.transform import contract

SHARES = (1 / 4, 1 / 2, 3 / 4)
# The paper's, of DeiT-B on ImageNet (whole: 81.8): top-1 in % at SHARES of the attention dims.
PAPER = {
    "random": (0.9, 24.4, 74.0),
    "magnitude": (1.7, 29.2, 71.9),
    "taylor": (6.0, 52.4, 78.1),
    "hessian": (5.1, 52.0, 78.2),
    "wpac": (41.8, 76.9, 81.2),
}


@dataclass(frozen=True)
class Setting:
    """How dims are chosen, and which are cut: "attn", its "qk" or "v" alone, "mlp", or "all"."""

    criterion: str = "wpac"
    weighting: str = "all"
    proxy: int = 1024
    cost: str = "logit"
    cut: str = "attn"


PARTS: dict[str, dict[str, Setting]] = {
    "criteria": {name: Setting(name) for name in (*CRITERIA, "wpac")},
    "weighting": {
        "no weights": Setting(weighting="none"),
        "all tokens weighted": Setting(),
        "class token only": Setting(weighting="class"),
    },
    "proxies": {f"{number:,} images": Setting(proxy=number) for number in (16, 64, 256, 1024, 4096)},
    "cost": {name: Setting(cost=name) for name in ("logit", "ce", "pred")},
    "modules": {
        "q and k": Setting(cut="qk"),
        "v and the output projection": Setting(cut="v"),
        "MLP": Setting(cut="mlp"),
        "attention": Setting(),
        "all": Setting(cut="all"),
    },
}


class Study(CutStudy):
    """The settings, one after another."""

    @functools.lru_cache(maxsize=1)  # noqa: B019 -- settings that differ in what is cut stand next to each other
    def ready(self, setting: Setting, draw: int) -> VisionTransformer:
        """A copy of the model with the dims of its modules in order, by the setting but for its cut."""
        model = copy.deepcopy(self.base)
        batches = [] if setting.criterion in ("random", "magnitude") else self.proxy(setting.proxy, draw)
        if setting.criterion == "wpac":
            contract(model, collect_statistics(model, batches, setting.cost, weighting=setting.weighting))
        else:
            sort_dims(model, importance_by(setting.criterion, model, batches, setting.cost, seed=draw))
        return model

    def measure(self, setting: Setting, draw: int) -> None:
        key = {**asdict(setting), "draw": draw, "images": self.val_images}
        if setting.proxy > len(self.images):
            return
        for share in SHARES:
            if not self.results.rows("rows", **key, share=share):
                model = cut(self.ready(replace(setting, cut="attn"), draw), setting.cut, share)
                self.results.add("rows", {**key, "share": share, **self.scores(self.logits(model))})


def cut(model: VisionTransformer, what: str, share: float) -> VisionTransformer:
    """A copy with a share of the dims; of q and k, or of v, alone the rest is zero, which gives the same."""
    if what in ("qk", "v"):
        return silence(copy.deepcopy(model), **{what: share})
    kinds = ("attn", "mlp") if what == "all" else (what,)
    full = full_widths(model).items()
    return extract(model, {key: int(width * share) if key.endswith(kinds) else width for key, width in full})


def measured(results: dict[str, Any], part: str, images: int) -> dict[str, list[list[dict[str, Any]]]]:
    """label of a setting -> the rows (one a draw) at each of SHARES, of the settings that are there."""
    found = {}
    for label, setting in PARTS[part].items():
        own = [row for row in results["rows"] if {**row, **asdict(setting), "images": images} == row]
        if own:
            found[label] = [[row for row in own if row["share"] == share] for share in SHARES]
    return found


def markdown(results: dict[str, Any]) -> str:
    """A table for each part and number of val/ images: mean top-1 (least to most, where there are draws), and KL."""
    lines = []
    for whole in sorted(results["whole"], key=lambda whole: -whole["images"]):
        for part in PARTS:
            found = measured(results, part, whole["images"])
            if len(found) < 2:
                continue
            paper = part == "criteria"
            head = [part, "draws", *(f"{share:g} kept" for share in SHARES)] + ["the paper's"] * paper
            lines += [f"Whole: {whole['top1']:.1f} % of {whole['images']} images.", ""]
            lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
            for label, shares in found.items():
                cells = [label, str(max(map(len, shares))), *map(_cell, shares)]
                cells += [" / ".join(map(str, PAPER[label]))] if paper else []
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines).strip()


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    top1 = [row["top1"] for row in rows]
    spread = f" ({min(top1):.1f} to {max(top1):.1f})" if len(rows) > 1 else ""
    return f"{statistics.mean(top1):.1f}{spread}, {statistics.mean(row['kl'] for row in rows):.4f}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = add_study_arguments(parser)
    group.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help="(default: all)")
    group.add_argument("--settings", nargs="+", metavar="NAME", help="of the parts, as their tables say (default: all)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    study = Study(args, init_processes(args), args.output_dir / f"truncation_{args.name}.json")
    for draw in progress_bar(args.draws, "draws"):
        for part in args.parts:
            for label, setting in PARTS[part].items():
                if not args.settings or label in args.settings:
                    study.measure(setting, 0 if setting.criterion == "magnitude" else draw)  # which draws nothing
    study.results.log()
    print(markdown(study.results.content))
    pictures(study.results.content, study.results.path.stem, args)
    print(json.dumps({"file": study.results.path.name, "rows": len(study.results.rows("rows"))}))


def pictures(results: dict[str, Any], stem: str, args: argparse.Namespace) -> None:
    """One a part, of the most val/ images that the part was measured on."""
    for part in PARTS:
        for whole in sorted(results["whole"], key=lambda whole: -whole["images"]):
            found = measured(results, part, whole["images"])
            if len(found) > 1:
                title = f"{args.name.replace('_', ' ')}, {whole['images']} images, no training"
                path = args.output_dir / f"{stem}_{part}.png"
                plot_truncation(found, SHARES, whole, PAPER if part == "criteria" else {}, path, title)
                break


if __name__ == "__main__":
    run_program(main)
