"""The fidelity of sizes, as an evaluation or an export found it and left it beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from piad.mask_table import MaskTable

REPORTS = ("frontier.json", "index.json")
SIGNS = {"kl": -1, "token_cosine": 1, "feature_cosine": 1}  # measure -> 1 where more is better; the first one counts


def known_fidelity(source: Path | None, stamp: str | None, averaged: bool, table: MaskTable, grade: str) -> list[float]:
    """The fidelity of every op code, more is better, interpolated between the sizes of a report beside `source`.

    source, stamp, averaged: the file of the weights, their stamp, and whether they are averaged ones.  [] where there
    is no frontier.json or index.json of these weights with at least two sizes of this table and this grade.
    """
    for name in REPORTS if source and stamp else ():
        report = _read(source.with_name(name))
        same = (report.get("stamp"), report.get("averaged_weights")) == (stamp, averaged)
        if same and Path(str(report.get("weights"))).name == source.name:
            sizes = report.get("sizes")
            rows = sizes if isinstance(sizes, list) else []
            known = dict(found for row in rows if (found := _score(row, table, grade)))
            if len(known) > 1:
                codes = sorted(known)
                return np.interp(range(len(table)), codes, [known[code] for code in codes]).tolist()
    return []


def _read(path: Path) -> dict[str, Any]:
    """The content of a report. {} if the file is missing or damaged, since a report is optional."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _score(row: Any, table: MaskTable, grade: str) -> tuple[int, float] | None:
    """The op code and the fidelity of a row; None if it is not a size of this table and grade, or has no fidelity."""
    if not isinstance(row, dict):
        return None
    code, grouped = row.get("op_code"), row.get("fidelity")
    measures = row | grouped if isinstance(grouped, dict) else row
    if type(code) is not int or not 0 <= code < len(table) or row.get("widths") != table.widths(code):
        return None
    if row.get("grade") != grade:
        return None
    found = [sign * measures[key] for key, sign in SIGNS.items() if type(measures.get(key)) in (int, float)]
    return (code, found[0]) if found else None
