"""Accuracy of a network whose attention dims are cut without training, and what it depends on.

    python -m studies.truncation --name vit_small_cifar10 --data-path DIR --checkpoint FILE ...

Each part varies one choice: the criterion by which dims are sorted (the paper's table), the weights of the tokens in
WPAC's statistics, the number of proxy images, the cost, or what is cut. Measures top-1 (percent) on val/ and the KL
divergence of the outputs from those of the whole network. Writes docs/results/truncation_NAME.json after each
measurement, skips measurements that are already there, and writes one picture per part.
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

from arguments import Parser
from models.backbone import full_widths
from models.extraction import extract
from studies.common import CutStudy, add_study_arguments, zero_dims
from studies.criteria import CRITERIA, ClassTokenOnly, EqualTokens, importance_by, sort_dims
from studies.plots import plot_truncation
from utils import init_processes, progress_bar, run_program
from wpac.statistics import TokenCollector, collect_statistics
from wpac.transform import contract

SHARES = (1 / 4, 1 / 2, 3 / 4)
# Results of the paper for DeiT-B on ImageNet (whole network: 81.8): top-1 in % at SHARES of the attention dims.
PAPER = {
    "random": (0.9, 24.4, 74.0),
    "magnitude": (1.7, 29.2, 71.9),
    "taylor": (6.0, 52.4, 78.1),
    "hessian": (5.1, 52.0, 78.2),
    "wpac": (41.8, 76.9, 81.2),
}


WEIGHTINGS: dict[str, type[TokenCollector]] = {"all": TokenCollector, "none": EqualTokens, "class": ClassTokenOnly}


@dataclass(frozen=True)
class Setting:
    """One measurement.

    criterion: "wpac" or one of CRITERIA.  weighting: of the tokens, a key of WEIGHTINGS.
    proxy: number of proxy images.  cost: a key of models.targets.COSTS.
    cut: "attn", only its "qk" or only its "v", "mlp", or "all".
    """

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
    """Measures the settings one after another."""

    @functools.lru_cache(maxsize=1)  # noqa: B019 -- consecutive settings may differ only in what is cut
    def prepared(self, setting: Setting, draw: int) -> VisionTransformer:
        """A copy of the model with its dims sorted or contracted as the setting says, but not yet cut."""
        model = copy.deepcopy(self.base)
        batches = [] if setting.criterion in ("random", "magnitude") else self.proxy(setting.proxy, draw)
        if setting.criterion == "wpac":
            collector = WEIGHTINGS[setting.weighting]
            contract(model, collect_statistics(model, batches, setting.cost, token_collector=collector))
        else:
            sort_dims(model, importance_by(setting.criterion, model, batches, setting.cost, seed=draw))
        return model

    def measure(self, setting: Setting, draw: int) -> None:
        """Measures the setting at each of SHARES for which there is no result; draw: seed of the proxy set."""
        key = {**asdict(setting), "draw": draw, "images": self.val_images}
        if setting.proxy > len(self.images):
            return
        for share in SHARES:
            if not self.results.rows("rows", **key, share=share):
                model = cut(self.prepared(replace(setting, cut="attn"), draw), setting.cut, share)
                self.results.add("rows", {**key, "share": share, **self.scores(self.logits(model))})


def cut(model: VisionTransformer, what: str, share: float) -> VisionTransformer:
    """A copy that keeps a share of the dims. To cut only q and k, or only v, the other dims are set to zero instead."""
    if what in ("qk", "v"):
        return zero_dims(copy.deepcopy(model), **{what: share})
    kinds = ("attn", "mlp") if what == "all" else (what,)
    full = full_widths(model).items()
    return extract(model, {key: int(width * share) if key.endswith(kinds) else width for key, width in full})


def measured(results: dict[str, Any], part: str, images: int) -> dict[str, list[list[dict[str, Any]]]]:
    """Label of each setting that has results -> for each of SHARES, its rows, one per draw."""
    found = {}
    for label, setting in PARTS[part].items():
        own = [row for row in results["rows"] if {**row, **asdict(setting), "images": images} == row]
        if own:
            found[label] = [[row for row in own if row["share"] == share] for share in SHARES]
    return found


def markdown(results: dict[str, Any]) -> str:
    """One table per part and number of val/ images: mean top-1 (with its range if there are several draws) and KL."""
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
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = add_study_arguments(parser)
    group.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help="(default: all)")
    group.add_argument("--settings", nargs="+", metavar="NAME", help="labels of the settings to measure (default: all)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    study = Study(args, init_processes(args), args.output_dir / f"truncation_{args.name}.json")
    for draw in progress_bar(args.draws, "draws"):
        for part in args.parts:
            for label, setting in PARTS[part].items():
                if not args.settings or label in args.settings:
                    study.measure(setting, 0 if setting.criterion == "magnitude" else draw)  # has no seed
    study.results.log()
    print(markdown(study.results.content))
    pictures(study.results.content, study.results.path.stem, args)
    print(json.dumps({"file": study.results.path.name, "rows": len(study.results.rows("rows"))}))


def pictures(results: dict[str, Any], stem: str, args: argparse.Namespace) -> None:
    """Draws one picture per part, from the results on the largest number of val/ images."""
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
