"""The mask table, op code -> widths: plain data, stored as mask_table.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from files import read_json, shown, write_text
from utils import UserError

MASK_TABLE = "mask_table.json"  # its name beside the weights of a super-network
SMALLEST = -1  # the op code of the smallest network, however many op codes there are
# Far above any network and any list of units: a file that claims more is refused before it is expanded.
MAX_OP_CODES, MAX_MODULES = 100_000, 10_000


class MaskTable:
    """Widths by op code: row 0 is the whole network, and no width grows from one row to the next.

    Widths: module key, such as "3.attn" or "3.mlp" -> dims per head, or hidden units; 0 where the branch is bypassed.
    """

    def __init__(self, rows: list[dict[str, int]], meta: dict[str, Any] | None = None):
        """rows: the widths of op codes 0, 1, ...; meta: plain values stored under the key "meta" of the file.

        Raises UserError for an empty table, rows with different modules, or a width that is negative or grows.
        """
        if not rows or not rows[0]:
            raise UserError("mask table is empty")
        for code, row in enumerate(rows):
            before = rows[max(code - 1, 0)]
            if row.keys() != rows[0].keys():
                key = sorted(row.keys() ^ rows[0].keys())[0]
                raise UserError(f"mask table: module {key} is not in every op code (op code {code})")
            for key, width in row.items():
                if width < 0:
                    raise UserError(f"mask table: {key} has width {width} at op code {code}, below 0")
                if width > before[key]:
                    raise UserError(f"mask table: {key} grows from {before[key]} to {width} at op code {code}")
        self.rows = rows
        self.meta = meta or {}

    def __len__(self) -> int:
        """The number of op codes, counting 0."""
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskTable) and self.rows == other.rows and self.meta == other.meta

    __hash__ = None

    def widths(self, op_code: int) -> dict[str, int]:
        """The widths of an op code; -1 is the smallest network. Raises UserError if the table has no such code."""
        if not (op_code == SMALLEST or 0 <= op_code < len(self)):
            raise UserError(f"op code {op_code} is not in the mask table, which has 0..{len(self) - 1} and -1")
        return dict(self.rows[op_code])

    def check(self, full: dict[str, int], model_name: str) -> None:
        """Raises UserError unless op code 0 of the table has these full widths, those of the model."""
        if self.rows[0].keys() != full.keys():
            there, here = (len({key.split(".")[0] for key in keys}) for keys in (self.rows[0], full))
            key = sorted(self.rows[0].keys() ^ full.keys())[0]
            where = "missing from the table" if key in full else "not in the model"
            raise UserError(
                f"mask table covers {there} blocks, {model_name} has {here}: {key} is {where}; "
                "give the table of this model"
            )
        for key, width in full.items():
            if self.rows[0][key] != width:
                raise UserError(
                    f"mask table: {key} has width {self.rows[0][key]} at op code 0, {model_name} has {width} there; "
                    "give the table of this model"
                )

    def to_json(self) -> dict[str, Any]:
        """{"0.attn": {"0": 64, ..., "-1": 8}, ..., "meta": {...}}: the authors' format with one more key."""
        table: dict[str, Any] = {
            key: {**{str(code): row[key] for code, row in enumerate(self.rows)}, str(SMALLEST): self.rows[-1][key]}
            for key in self.rows[0]
        }
        return table | ({"meta": self.meta} if self.meta else {})

    @classmethod
    def from_json(cls, table: Any) -> MaskTable:
        """The inverse of to_json(), strict. Raises UserError that names the key that is wrong."""
        if not isinstance(table, dict):
            raise UserError(f"mask table: expected an object of modules, found a {type(table).__name__}")
        meta = table.get("meta", {})
        if not isinstance(meta, dict):
            raise UserError(f"mask table: meta is a {type(meta).__name__}, not an object")
        if len(table) > MAX_MODULES:
            raise UserError(f"mask table: {len(table)} modules, more than {MAX_MODULES}")
        columns = {key: _column(key, value) for key, value in table.items() if key != "meta"}
        codes: set[int] = set()
        for key, column in columns.items():
            codes = codes or set(column)
            if set(column) != codes:
                odd = sorted(set(column) ^ codes)[0]
                raise UserError(
                    f"mask table: {key} does not have the same op codes as the other modules (op code {odd})"
                )
        last = max(len(codes - {SMALLEST}) - 1, 0)
        if codes and codes - {SMALLEST} != set(range(last + 1)):
            missing = min(set(range(last + 1)) - codes)
            raise UserError(f"mask table: op code {missing} is missing")
        rows = [{key: column[code] for key, column in columns.items()} for code in range(last + 1)]
        # Normally -1 repeats the last row. A smaller network there becomes an op code of its own.
        if SMALLEST in codes:
            smallest = {key: column[SMALLEST] for key, column in columns.items()}
            if rows[-1:] != [smallest]:
                rows.append(smallest)
        return cls(rows, meta)

    def save(self, path: Path) -> None:
        """Writes mask_table.json; the file is complete or not there at all."""
        write_text(path, json.dumps(self.to_json()) + "\n")

    @classmethod
    def load(cls, path: Path) -> MaskTable:
        """Reads mask_table.json. Raises UserError naming the file and what is wrong in it."""
        if not Path(path).is_file():
            raise UserError(f"mask table {path} does not exist")
        try:
            return cls.from_json(read_json(path))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def _column(key: str, column: Any) -> dict[int, int]:
    """The entry of one module, op code -> width, both as whole numbers."""
    block, _, kind = str(key).partition(".")
    if not (block.isdecimal() and block.isascii() and kind in ("attn", "mlp")):
        raise UserError(f'mask table: {shown(repr(key))} is not a module; keys are like "3.attn" and "3.mlp"')
    if not isinstance(column, dict) or not column:
        raise UserError(f"mask table: {key} is not an object of op codes")
    if len(column) > MAX_OP_CODES:
        raise UserError(f"mask table: {key} has {len(column)} op codes, more than {MAX_OP_CODES}")
    codes = {}
    for code, width in column.items():
        if not isinstance(code, str) or not re.fullmatch(r"0|[1-9]\d{0,6}|-1", code, re.ASCII):
            raise UserError(f"mask table: {key} has op code {shown(repr(code))}, which is not a whole number")
        if type(width) is not int:
            raise UserError(
                f"mask table: {key} has width {shown(repr(width))} at op code {code}, which is not a whole number"
            )
        codes[int(code)] = width
    return codes
