"""Makes index.html of an evaluated super-network: one file, to be opened offline, with a slider over its sizes."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

from arguments import Parser
from files import read_json, shown, write_text
from supernet.amounts import format_amount
from utils import UserError, run_program, say

from .measures import MEASURES, curves_of

ROOT = Path(__file__).resolve().parent.parent
GENERATOR = '<meta name="generator" content="page.py">'  # marks a page that this program wrote
# What the page needs of frontier.json.
FACTS = {"title": str, "weights": str, "averaged_weights": bool, "grade": str, "images": int, "device": str,
         "batch_size": int, "arguments": list, "full_widths": dict, "sizes": list}  # fmt: skip
NUMBERS = ("op_code", "macs_linear", "params", "images_per_second")


def main() -> None:
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("files")
    group.add_argument(
        "folder", type=Path, metavar="DIR", help="output folder of main.py --eval, whose frontier.json is read"
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: DIR/index.html)")
    args = parser.parse_args()
    output = args.output or args.folder / "index.html"
    if output.is_file() and GENERATOR not in output.read_text(errors="replace"):
        raise UserError(f"{output} exists and is not a page of page.py: give another --output")
    write_text(output, page_of(read_report(args.folder / "frontier.json"), args.folder))
    say(f"written: {output}")


def read_report(path: Path) -> dict[str, Any]:
    """Reads frontier.json. Raises UserError that names the key where something is missing or wrong."""
    report = read_json(path)
    if not isinstance(report, dict) or not isinstance(report.get("sizes"), list) or not report["sizes"]:
        raise UserError(f"{path} has no sizes: it is not a report of main.py --eval")
    for key, kind in FACTS.items():
        if type(report.get(key)) is not kind:
            raise _no_report(path, key, report.get(key))
    for key, width in report["full_widths"].items():
        if type(width) is not int or width < 1:
            raise _no_report(path, f"full_widths.{key}", width)
    names = numbers_of(report["sizes"][0]) if isinstance(report["sizes"][0], dict) else NUMBERS
    for index, size in enumerate(report["sizes"]):
        size = size if isinstance(size, dict) else {}
        widths = size.get("widths")
        if not isinstance(widths, dict) or widths.keys() != report["full_widths"].keys():
            raise _no_report(path, f"sizes.{index}.widths", widths)
        numbers = {name: size.get(name) for name in names} | {f"widths.{key}": width for key, width in widths.items()}
        for name, value in numbers.items():
            low = -1 if name in MEASURES and MEASURES[name].unit == "cosine" else 0
            if type(value) not in (int, float) or not math.isfinite(value) or value < low:
                raise _no_report(path, f"sizes.{index}.{name}", value)
        if not size["images_per_second"] or not size["macs_linear"]:
            raise _no_report(path, f"sizes.{index}.images_per_second or macs_linear", 0)
    return report


def numbers_of(size: dict[str, Any]) -> list[str]:
    """The keys of the numbers that the page shows of a size, those that were measured of the network last.

    Without any of these, top1 is missing.
    """
    measures = [*curves_of(size)] or ["top1"]
    return [*NUMBERS, *measures, *[key for key in (f"baseline_{measures[0]}",) if key in size]]


def _no_report(path: Path, key: str, value: Any) -> UserError:
    return UserError(
        f"{path}: {shown(key)} is {shown(value)}: give the output folder of main.py --eval of a "
        "super-network; that of an older version has to be evaluated again"
    )


def page_of(report: dict[str, Any], folder: Path) -> str:
    """The page: page.html with the report in it as data."""
    sizes = sorted(report["sizes"], key=lambda size: size["macs_linear"])
    largest, measures = sizes[-1]["macs_linear"], curves_of(sizes[0])
    main, first = next(iter(measures.items()))
    baseline = f"baseline_{main}"
    kind = "averaged (EMA)" if report["averaged_weights"] else "raw"
    data = {
        "facts": f"{report['weights']}, {kind} weights, sub-networks {report['grade']}; {report['images']} images",
        "measured": f"{report['batch_size']} at a time, {report['device']}",
        "quarters": [format_amount(largest * quarter / 4) if quarter else "0" for quarter in range(5)],
        "full_widths": report["full_widths"],
        "measures": [
            {"key": key, "name": measure.name, "label": measure.label, "unit": measure.unit, "suffix": measure.suffix}
            for key, measure in measures.items()
        ],
        "sizes": [
            {name: size[name] for name in (*numbers_of(size), "widths")}
            | {"texts": {key: measure.text(size[key]) for key, measure in measures.items()}}
            | {"baseline_text": first.text(size[baseline]) if baseline in size else ""}
            | {"macs_text": format_amount(size["macs_linear"]), "params_text": format_amount(size["params"])}
            | {"command": command_of(report["arguments"], size["op_code"], folder)}
            for size in sizes
        ],
    }
    # Escaped, "<" cannot end the script element; JSON reads it as the same text.
    filled = {"data": json.dumps(data).replace("<", "\\u003c"), "title": html.escape(report["title"])}
    template = (ROOT / "report" / "page.html").read_text()
    return re.sub(r"\{\{(data|title)\}\}", lambda found: filled[found[1]], template)


def command_of(arguments: list[str], op_code: int, folder: Path) -> str:
    """The command that writes the sub-network of an op code to FOLDER/extracted/op_<code>."""
    words = ["python", "main.py", "--eval", *(_from_here(str(word)) for word in arguments)]
    words += ["--op-code", str(op_code), "--write-sub-networks", "--output-dir", _from_here(str(folder / "extracted"))]
    return shlex.join(words)


def _from_here(word: str) -> str:
    """A path into this repository relative to its root; any other word unchanged."""
    path = Path(word)
    return str(path.relative_to(ROOT)) if path.is_absolute() and path.is_relative_to(ROOT) else word


if __name__ == "__main__":
    run_program(main)
