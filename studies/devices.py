"""Mask tables made for a device against those made for MACs, at equal measured time.

    python -m studies.devices --name vit_small_cifar10 --checkpoint output/best --data-set cifar10 --data-path cifar10 \
        --batch-size 1

At each of three times, which are shares of the whole network's: the size of the table made for the time, and of the
sizes of the table made for MACs the one that takes as long when they are measured in alternation. Both are cut from the
same weights, contracted by the method best, and compared with the whole network on the images of val/, without labels:
KL divergence (nats), or 1 - mean cosine for an encoder. Writes docs/results/devices_NAME.json, and skips what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import supernet
from arguments import Parser, add_amp, add_cost_of, add_data_set, decimal, positive, share
from benchmarks.common import CLOCKS, describe_machine
from datasets import eval_loader, open_images, proxy_set
from fidelity import Evaluator
from models.backbone import full_widths
from models.extraction import extract
from models.macs import count_macs
from piad.mask_table import MaskTable
from studies.common import RESULTS, Results, facts_of
from supernet.device import DeviceProfile
from supernet.profiling import measure_profile
from supernet.runtimes import RUNTIMES
from supernet.timing import dtype_in_words, time_networks
from utils import init_processes, run_program, say, seed_everything

NEAR = [round(0.8 + 0.05 * step, 2) for step in range(9)]
EVALUATED = 64  # images per batch in the evaluation, whatever the batch that is timed
LOSSES = {"logits": "KL, nats", "features": "1 - cosine of the features", "tokens": "1 - cosine of the tokens"}


class Study:
    """The two tables of a network, its times and its fidelity."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args = args
        self.network = supernet.load(args.checkpoint)
        self.model = self.network.model.to(device)
        self.full = full_widths(self.model)
        conditions = {"runtime": args.runtime, "dtype": dtype_in_words(self.model, args.amp)}
        conditions["batch_size"] = args.batch_size
        self.profile = (
            self._given_profile(conditions)
            if args.cost_of
            else measure_profile(self.model, self.network.name, **self.timing())
        )
        self.tables: dict[str, MaskTable] = {}
        for made_for, profile in (("time", self.profile), ("MACs", None)):
            self.network.retable(profile, 1.0)  # both reach any time
            self.tables[made_for] = self.network.table
        val = open_images(args.data_set, args.data_path, "val", args.index, 0)
        val = proxy_set(val, args.val_images, 0) if args.val_images else val
        batches = eval_loader(val, self.network.preprocessing, batch_size=EVALUATED, workers=0)
        self.evaluator = Evaluator(self.network.target, batches, device, labels=False, whole=self.model, amp=args.amp)
        facts = facts_of(self.network) | {"machine": describe_machine(device), "loss": LOSSES[self.network.target]}
        self.results = Results(args.output_dir / f"devices_{args.name}.json", **facts)
        self.key = conditions | {"clock": args.clock, "images": len(val)}

    def _given_profile(self, conditions: dict[str, Any]) -> DeviceProfile:
        profile = self.network.profile(self.args.cost_of)
        profile.check(**conditions)
        return profile

    def timing(self) -> dict[str, Any]:
        """How networks are timed."""
        args = self.args
        kind = {"batch_size": args.batch_size, "amp": args.amp, "runtime": args.runtime, "repeats": args.repeats}
        return kind | {"now": CLOCKS[args.clock]}

    def measure(self, part: float) -> None:
        """Adds the rows of a share of the whole network's time, unless they are there: one for each table."""
        if self.results.rows("rows", **self.key, share=part):
            return
        wanted = part * self.profile.of(self.full)
        own = self.nearest("time", wanted)
        near = sorted({self.nearest("MACs", wanted * factor) for factor in self.args.near})
        sizes = {("time", own), *(("MACs", code) for code in near)}
        networks = {size: self.tables[size[0]].widths(size[1]) for size in sizes} | {"whole": self.full}
        found = time_networks(self.model, networks, **self.timing())
        seconds = {size: statistics.median(times) for size, times in found.items()}
        rival = min(near, key=lambda code: abs(seconds["MACs", code] - seconds["time", own]))
        for made_for, code in (("time", own), ("MACs", rival)):
            widths = self.tables[made_for].widths(code)
            self.results.add(
                "rows",
                {
                    **self.key,
                    "share": part,
                    "made_for": made_for,
                    "op_code": code,
                    "macs_share": count_macs(self.model, widths) / count_macs(self.model),
                    "bypassed": sum(not width for width in widths.values()),
                    "predicted_ms": 1e3 * self.profile.of(widths),
                    "measured_ms": 1e3 * seconds[made_for, code],
                    "predicted_share": self.profile.of(widths) / self.profile.of(self.full),
                    "measured_share": seconds[made_for, code] / seconds["whole"],
                    "loss": self.loss(widths),
                },
            )

    def nearest(self, made_for: str, seconds: float) -> int:
        """The op code of a table whose predicted time is nearest."""
        times = [self.profile.of(widths) for widths in self.tables[made_for].rows]
        return min(range(len(times)), key=lambda code: abs(times[code] - seconds))

    def expect(self, part: float) -> None:
        """Adds how much less the table for time should lose at a share of the time, unless that is there.

        Both tables are made from the losses of the dims; this compares their sums at equal predicted times.
        """
        if self.results.rows("expected", **self.key, share=part):
            return
        wanted = part * self.profile.of(self.full)
        lost = {}
        for made_for, table in self.tables.items():
            widths = table.widths(self.nearest(made_for, wanted))
            lost[made_for] = sum(loss[widths[key] :].sum() for key, loss in self.network.dim_losses.items())
        self.results.add("expected", {**self.key, "share": part, "loss_ratio": float(lost["time"] / lost["MACs"])})

    def loss(self, widths: dict[str, int]) -> float:
        """How far the sub-network is from the whole network, see LOSSES."""
        found = self.evaluator(extract(self.model, widths))
        target = self.network.target
        return found["kl"] if target == "logits" else 1 - found[f"{target.removesuffix('s')}_cosine"]


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/RESULTS.md: for each time, the two sizes side by side.

    In brackets, the time that the profile predicts, as a share of the whole network's, against the measured one. Then
    the ratio of the losses, table for time to table for MACs, that is expected at equal predicted times.
    """
    loss = results["loss"]
    half = f"MACs | bypassed | ms (share: measured, predicted) | {loss}"
    lines = [f"| runtime, batch | table for time: {half} | table for MACs: {half} |", "|---" * 9 + "|"]
    for own, rival in zip(results["rows"][::2], results["rows"][1::2], strict=True):
        cells = [f"{own['runtime']}, {own['batch_size']}"]
        for row in (own, rival):
            shares = f"{row['measured_share']:.3f}, {row['predicted_share']:.3f}"
            cells += [f"{row['macs_share']:.1%}", str(row["bypassed"])]
            cells += [f"{row['measured_ms']:.3g} ({shares})", f"{row['loss']:.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    expected: dict[str, dict[str, str]] = {}
    for row in results.get("expected", []):
        kind = f"{row['runtime']}, {row['batch_size']}"
        expected.setdefault(kind, {})[f"{row['share']:g} of the time"] = f"{row['loss_ratio']:.2f}"
    if expected:
        heads = list(next(iter(expected.values())))
        lines += ["", f"| expected ratio of the losses | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        lines += [f"| {kind} | {' | '.join(found.values())} |" for kind, found in expected.items()]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("study")
    group.add_argument("--name", required=True, help="of the model and data, used in file names")
    group.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="of reparam.py --method best")
    add_data_set(group, default="folder")
    group.add_argument("--val-images", type=positive, metavar="N", help="images of val/ to use (default: all)")
    group.add_argument("--batch-size", type=positive, default=1, metavar="N", help="that is timed (default: 1)")
    add_amp(group)
    group.add_argument("--runtime", choices=RUNTIMES, default="eager", help="what runs the networks (default: eager)")
    add_cost_of(group)
    group.add_argument("--shares", type=share, nargs="+", default=[0.75, 0.5, 0.25], help="of the whole network's time")
    group.add_argument(
        "--near",
        type=decimal,
        nargs="+",
        default=NEAR,
        metavar="X",
        help="predicted times of the sizes to compare with, relative to the wanted one; all are in memory at once "
        "(default: 0.8 to 1.2 in steps of 0.05)",
    )
    group.add_argument("--repeats", type=positive, default=15, metavar="N", help="timed rounds (default: 15)")
    group.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: CPU time, for a shared machine, one thread"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto: CUDA if there is one")
    group.add_argument("--output-dir", type=Path, default=RESULTS, metavar="DIR", help="where results go")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = init_processes(args)
    seed_everything(0)
    study = Study(args, device)
    for part in args.shares:
        study.expect(part)
        study.measure(part)
    study.results.log()
    say(markdown(study.results.content))
    rows = study.results.rows("rows", **study.key)
    ratios = [own["loss"] / rival["loss"] for own, rival in zip(rows[::2], rows[1::2], strict=True)]
    # The speed of a shared machine changes; a share is of the whole network's time in the same rounds.
    errors = {
        f"error_of_{unit}": [row[f"predicted_{unit}"] / row[f"measured_{unit}"] - 1 for row in rows]
        for unit in ("ms", "share")
    }
    print(json.dumps({"file": study.results.path.name, "loss_ratios": ratios, **errors}))


if __name__ == "__main__":
    run_program(main)
