"""How near sub-networks of an encoder without a head come to it, and what a frozen head makes of them.

    python -m studies.encoders --name encoder --photos DIR --checkpoint FILE --head FILE ...

Contracts the encoder by --method best on the first --fit photos of --photos, sorted by name, and makes sub-networks of
every grade on the same photos. Measures on the --report photos after them: how far the contracted encoder is from the
encoder as it was; cosines of the features (the class token, or what the model pools) and of the patch tokens with those
of the whole encoder; and with --head, a saliency head on the patch tokens, which is not trained, the IoU of the maps
(at 0.5, all pixels together). Writes docs/results/encoders_NAME.json after each measurement and skips measurements that
are already there; draws the maps of four photos, as the last of --steps gives them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import supernet
from arguments import Parser, add_model, add_preprocessing, count, data_overrides, positive
from benchmarks.common import describe_machine
from image_folders import image_files
from models.backbone import Backbone, full_widths
from models.extraction import extract
from models.macs import count_macs
from models.targets import from_tokens, output_of
from studies.common import RESULTS, Results, facts_of
from studies.plots import plot_maps
from studies.two_widths import extract_parted, parted
from supernet.contraction import contract_network
from utils import init_processes, run_program
from wpac.refit import refit

BATCH = 20
SCORES = {"features": "features", "patch": "patch", "iou": "IoU"}  # and their names in tables
MILD = {"attn": 0.8, "mlp": 0.65}  # shares of the dims, for comparison with published figures
SHOWN = slice(0, 48, 12)  # photos of the picture


class SaliencyHead(nn.Sequential):
    """Patch tokens (B, N, D) to a map in 0..1, (B, height, width)."""

    def __init__(self, weights: dict[str, Tensor], size: tuple[int, int]):
        super().__init__()
        channels = [*(len(weights[f"upconv{i}.weight"]) for i in (1, 2, 3)), weights["upconv3.weight"].shape[1]]
        for i, (before, after) in enumerate(itertools.pairwise(channels), 1):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(after))
            self.add_module(f"relu{i}", nn.ReLU())
        self.final_conv = nn.Conv2d(channels[-1], 1, kernel_size=1)
        self.size = size
        self.load_state_dict({key: v.float() if v.is_floating_point() else v for key, v in weights.items()})
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, N, D), of a square of patches."""
        side = round(tokens.shape[1] ** 0.5)
        x = super().forward(tokens.mT.unflatten(2, (side, side)))
        return F.interpolate(x, self.size, mode="bilinear", align_corners=False)[:, 0].sigmoid()


class Study:
    """The encoder, the photos and the head. `fitted` and `others`: (photos, C, height, width)."""

    def __init__(self, args: argparse.Namespace, path: Path):
        """path: of the results."""
        more = {"model_kwargs": args.model_kwargs, "preprocessing": data_overrides(args)}
        if args.checkpoint:
            self.network = supernet.load(args.checkpoint, name=args.model, plain_weights=True, **more)
        else:
            self.network = supernet.create(args.model, **more)
        files = image_files(args.photos)[: args.fit + args.report]
        photos = torch.stack([self.network.read(Image.open(file)) for file in files])
        self.fitted, self.others = photos[: args.fit], photos[args.fit :]
        self.head = SaliencyHead(load_file(args.head), photos.shape[-2:]) if args.head else None
        self.whole = self.tokens(self.network.model)
        self.maps = self.maps_of(self.whole)
        self.network.target = args.target
        facts = facts_of(self.network) | {"target": args.target, "machine": describe_machine(torch.device("cpu"), None)}
        self.results = Results(path, **facts)

    @torch.inference_mode()
    def tokens(self, model: Backbone) -> Tensor:
        """All tokens after the last norm of the photos to report on, (photos, N, D)."""
        return torch.cat([output_of(model, images, "tokens") for images in self.others.split(BATCH)])

    @torch.inference_mode()
    def maps_of(self, tokens: Tensor) -> Tensor | None:
        """Their saliency maps, (photos, height, width), if there is a head."""
        if self.head is None:
            return None
        first = self.network.model.num_prefix_tokens
        return torch.cat([self.head(part[:, first:]) for part in tokens.split(BATCH)])

    @torch.inference_mode()
    def scores(self, small: Backbone) -> tuple[dict[str, float], Tensor | None]:
        """What is reported of a sub-network, and its maps."""
        tokens = self.tokens(small)
        features = F.cosine_similarity(*(from_tokens(self.network.model, x, "features") for x in (tokens, self.whole)))
        patches = F.cosine_similarity(tokens, self.whole, dim=-1)[:, self.network.model.num_prefix_tokens :]
        scores, maps = {"features": features.mean().item(), "patch": patches.mean().item()}, self.maps_of(tokens)
        if maps is not None:
            found, expected = maps > 0.5, self.maps > 0.5
            scores["iou"] = ((found & expected).sum() / (found | expected).sum()).item()
        return scores, maps

    def widths(self, size: str) -> dict[str, int]:
        """The widths of "mild", or of a share of the MACs by the mask table of the contracted network."""
        if size == "mild":
            full = full_widths(self.network.model)
            return {key: int(width * MILD[key.split(".")[1]]) for key, width in full.items()}
        return self.network.table.widths(self.network.select(max_macs=float(size) * self.network.macs()))

    def measure(self, size: str, widths: dict[str, int], steps: int | None) -> Tensor | None:
        """Measures a size, compensated (steps None), or refitted; returns its maps if it was not measured before."""
        key = {"size": size, "steps": steps, "fit": len(self.fitted), "report": len(self.others)}
        if self.results.rows("rows", **key):
            return None
        model = self.network.model
        small, start = extract(model, widths), time.perf_counter()
        if steps is not None:
            refit(model, small, self.fitted.split(BATCH), self.network.target, steps)
        seconds = time.perf_counter() - start
        scores, maps = self.scores(small)
        share = count_macs(model, widths) / count_macs(model)
        self.results.add("rows", {**key, "macs_share": share, **scores, "seconds": seconds})
        return maps

    def measure_part(self, size: str, part: str) -> None:
        """Measures, compensated, what is left of the encoder if a size cuts only this part of it.

        part: "attn", "mlp", or the first and the last of some blocks, such as "0-3".
        """
        model, key = self.network.model, {"size": size, "part": part}
        if self.results.rows("parts", **key):
            return
        widths = {name: width for name, width in self.widths(size).items() if _is_in(name, part)}
        widths = full_widths(model) | widths
        share = count_macs(model, widths) / count_macs(model)
        self.results.add("parts", {**key, "macs_share": share, **self.scores(extract(model, widths))[0]})

    def measure_two_widths(self, size: str, share: float) -> None:
        """Measures a size, compensated, whose q and k have `share` times its width and v as much more or less."""
        model, key = self.network.model, {"size": size, "share": share}
        if not self.results.rows("two_widths", **key):
            small = extract_parted(model, *parted(self.widths(size), share, full_widths(model)))
            self.results.add("two_widths", key | self.scores(small)[0])

    def measure_trained(self, trained: supernet.Network, size: str) -> None:
        """Measures a size, a share of the MACs, of a super-network that was trained from this encoder."""
        if not self.results.rows("trained", size=size):
            code = trained.select(max_macs=float(size) * trained.macs())
            share, scores = trained.macs(code) / trained.macs(), self.scores(trained.cut(code))[0]
            self.results.add("trained", {"size": size, "macs_share": share, **scores})


def _is_in(module: str, part: str) -> bool:
    """Whether a module, such as "3.attn", belongs to a part of measure_part()."""
    block, kind = module.split(".")
    if "-" not in part:
        return kind == part
    first, last = map(int, part.split("-"))
    return first <= int(block) <= last


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/RESULTS.md: cosines of the features and of the patch tokens, and IoU."""
    kinds = [None, *sorted({row["steps"] for row in results["rows"]} - {None})]
    rows = sorted(results["rows"], key=lambda row: (-row["macs_share"], kinds.index(row["steps"])))
    found = [[f"{row['macs_share']:.2f}", _grade(row["steps"]), *_scores(row), f"{row['seconds']:.0f}"] for row in rows]
    tables = [_table(["MACs", "sub-network", *_names(rows), "seconds"], found)]
    if rows := results.get("parts", []):
        found = [[row["size"], row["part"], f"{row['macs_share']:.2f}", *_scores(row)] for row in rows]
        tables.append(_table(["size", "cut in", "MACs", *_names(rows)], found))
    if rows := results.get("two_widths", []):
        found = [[row["size"], f"{row['share']:g}", *_scores(row)] for row in rows]
        tables.append(_table(["size", "width of q and k, times", *_names(rows)], found))
    if rows := results.get("trained", []):
        found = [[f"{row['macs_share']:.2f}", *_scores(row)] for row in rows]
        tables.append(_table(["MACs, trained", *_names(rows)], found))
    return "\n\n".join(tables)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """The scores that rows have, as a table names them; there is no IoU without a head."""
    return [name for key, name in SCORES.items() if key in rows[0]]


def _scores(row: dict[str, Any]) -> list[str]:
    return [f"{row[key]:.3f}" for key in SCORES if key in row]


def _grade(steps: int | None) -> str:
    return "compensated" if steps is None else f"refitted, {steps} steps" if steps else "refitted, least squares"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)])


def add_encoder_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the flags of a study on an encoder and photos; returns their group."""
    group = parser.add_argument_group("study")
    group.add_argument("--name", required=True, help="of the encoder, used in file names")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights (default: random ones)")
    group.add_argument("--photos", type=Path, required=True, metavar="DIR", help="folder of photos")
    group.add_argument("--head", type=Path, metavar="FILE", help="weights of a saliency head on the patch tokens")
    group.add_argument("--fit", type=positive, default=500, metavar="N", help="photos to fit on (default: %(default)s)")
    group.add_argument("--report", type=positive, default=100, metavar="N", help="photos after them to report on")
    group.add_argument("--target", choices=("features", "tokens"), default="tokens", help="of all steps")
    group.add_argument("--output-dir", type=Path, default=RESULTS, metavar="DIR", help="where results go")
    add_model(group)
    add_preprocessing(group)
    parser.set_defaults(device="cpu")
    return group


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = add_encoder_arguments(parser)
    group.add_argument("--steps", type=count, nargs="+", default=[0, 400], help="of refitting; 0 = least squares")
    group.add_argument("--qk", type=float, nargs="*", default=[], help="also this times the width for q and k alone")
    group.add_argument("--parts", nargs="*", default=[], help="also cut only attn, mlp, or blocks such as 0-3")
    group.add_argument("--trained", type=Path, metavar="DIR", help="also a super-network that was trained from it")
    group.add_argument("--sizes", nargs="+", default=["0.5", "0.25", "mild"], help="shares of the MACs, or mild")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    init_processes(args)
    study = Study(args, args.output_dir / f"encoders_{args.name}.json")
    batches = [(images, torch.zeros(len(images), dtype=torch.long)) for images in study.fitted.split(BATCH)]
    contraction = contract_network(study.network, batches, method="best", dropout_ratio=0.95)
    study.results.content["largest_change"] = contraction.difference  # of the target, relative to its largest value
    for size, part in itertools.product(args.sizes, args.parts):
        study.measure_part(size, part)
    for size, share in itertools.product([size for size in args.sizes if size != "mild"], args.qk):
        study.measure_two_widths(size, share)
    if args.trained:
        trained = supernet.load(args.trained, use_ema=True)
        for size in ("1", *(size for size in args.sizes if size != "mild")):
            study.measure_trained(trained, size)
    shown = {"whole": study.maps}
    for steps in (None, *args.steps):
        for size in args.sizes:
            maps = study.measure(size, study.widths(size), steps)
            if steps == args.steps[-1] and size in ("0.5", "0.25") and maps is not None:
                shown[f"{size} of the MACs"] = maps
    study.results.log()
    rows = study.results.rows("rows")
    print(markdown(study.results.content))
    if len(shown) == 3:  # the whole encoder and both sizes, measured in this run
        mean, std = (torch.tensor(study.network.preprocessing[key])[:, None, None] for key in ("mean", "std"))
        photos = study.others[SHOWN] * std + mean
        named = {name: maps[SHOWN] for name, maps in shown.items()}
        plot_maps(photos, named, study.results.path.with_suffix(".png"))
    print(json.dumps({"file": study.results.path.name, "rows": len(rows)}))


if __name__ == "__main__":
    run_program(main)
