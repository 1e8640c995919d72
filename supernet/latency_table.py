"""Latencies that were measured elsewhere, such as on a phone: measure.csv, written by an export and filled in there."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from files import shown, write_text
from piad.mask_table import MaskTable
from utils import UserError, say

MEASURE = "measure.csv"
COLUMNS = ("file", "op_code", "macs_linear", "batch_size", "milliseconds")


def write_measure(path: Path, files: list[tuple[str, int, int]], batch_size: int = 1) -> None:
    """Writes a row per file, with its op code, its MACs and the batch size, whose milliseconds are to be filled in."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *((*file, batch_size, "") for file in files)])
    write_text(path, text.getvalue())


def is_filled_in(path: Path) -> bool:
    """Whether there is a file with milliseconds in one of its rows, or one that cannot be read."""
    try:
        return any((row.get("milliseconds") or "").strip() for row in _rows(path))
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError, csv.Error):
        return True


class LatencyTable:
    """Seconds per batch of every op code, interpolated between the rows of a measure.csv.

    It can be used in place of latency.Latencies.

    seconds: op code -> seconds.  batch_size: 1 where the file does not say it.  where: the batch and the file, in
    words.  key: what the figures are latencies of.
    """

    def __init__(self, path: Path, table: MaskTable, macs: Callable[[int], int]):
        """macs: of an op code of `table`.

        Raises UserError for a file that is not such a table: rows that are missing, empty or no numbers, an op code
        that `table` does not have, MACs of another network or mask table, the whole network or the smallest left out,
        or times that grow from the former to the latter. Prints a line where a smaller size is slower than a larger
        one.
        """
        rows, self.batch_size = _read(path, len(table), macs)
        images = "1 image" if self.batch_size == 1 else f"{self.batch_size} images"
        self.where = f"{images}, as {path} says"
        self.key: dict[str, Any] = {"table": str(path), "batch_size": self.batch_size}
        last = len(table) - 1
        missing = sorted({0, last} - rows.keys())
        if missing:
            raise UserError(
                f"{path} has no row for op code {missing[0]}, the {'smallest' if missing[0] else 'largest'} size: the "
                "others are interpolated between rows, so add it"
            )
        if last and rows[last] >= rows[0]:
            raise UserError(
                f"{path}: the times grow: op code {last}, the smallest size, takes {rows[last]:g} ms, op code 0, the "
                f"largest, {rows[0]:g} ms: does each time stand in the row of its file?"
            )
        codes = list(rows)
        for larger, smaller in itertools.pairwise(codes):
            if rows[smaller] > rows[larger]:
                say(
                    f"{path}: op code {smaller}, {rows[smaller]:g} ms, is slower than the larger op code {larger}, "
                    f"{rows[larger]:g} ms: measure both again if that is a surprise"
                )
        found = np.interp(range(len(table)), codes, list(rows.values())) / 1e3
        self.seconds: dict[int, float] = dict(enumerate(found.tolist()))

    def of(self, op_code: int) -> float:
        """The seconds of an op code."""
        return self.seconds[op_code]


def _read(path: Path, sizes: int, macs: Callable[[int], int]) -> tuple[dict[int, float], int]:
    """Op code, ascending -> milliseconds, and the batch size. Raises UserError for what is not such a table.

    sizes: number of op codes.  macs: of an op code; a file that was written by hand may not say them.
    """
    try:
        lines = _rows(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"--latency-table {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    if not lines or not {"op_code", "milliseconds"} <= lines[0].keys():
        raise UserError(f"{path} holds no latencies: it needs the columns op_code and milliseconds, and rows of sizes")
    found: dict[int, float] = {}
    batches = {(row.get("batch_size") or "1").strip() for row in lines}
    if len(batches) > 1 or not re.fullmatch(r"[1-9]\d{0,6}", next(iter(batches)), re.ASCII):
        raise UserError(
            f"{path}: batch_size is {shown(', '.join(sorted(batches)))}, not the same number of images in all rows: "
            "keep the rows of one batch size"
        )
    for number, row in enumerate(lines, 2):
        code, time = ((row[name] or "").strip() for name in ("op_code", "milliseconds"))
        if not re.fullmatch(r"\d{1,7}", code, re.ASCII) or int(code) >= sizes:
            raise UserError(
                f"{path}, line {number}: op_code {shown(repr(code))} is not of this network: its op codes are 0 to "
                f"{sizes - 1}"
            )
        said = (row.get("macs_linear") or "").strip()
        if said and said != str(macs(int(code))):
            raise UserError(
                f"{path}, line {number}: op code {code} has {shown(said)} MACs there and {macs(int(code))} here: the "
                "times are of another network or mask table; export and measure the sizes of this one"
            )
        if int(code) in found:
            raise UserError(f"{path}, line {number}: op code {code} has two rows: keep those of one kind of file")
        if not time:
            raise UserError(f"{path}, line {number}: milliseconds is empty: fill it in, or remove the line")
        found[int(code)] = _milliseconds(time, f"{path}, line {number}")
    return dict(sorted(found.items())), int(batches.pop())


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))


def _milliseconds(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UserError(f"{where}: milliseconds {shown(repr(text))} is not a number above 0")
    return value
