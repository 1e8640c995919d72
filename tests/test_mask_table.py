"""The mask table: its file format, and every way in which a file can be wrong."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piad.mask_table import MAX_OP_CODES, MaskTable
from utils import UserError

ROWS = [
    {"0.attn": 16, "0.mlp": 64, "1.attn": 16, "1.mlp": 64},
    {"0.attn": 16, "0.mlp": 62, "1.attn": 16, "1.mlp": 64},
    {"0.attn": 16, "0.mlp": 62, "1.attn": 0, "1.mlp": 64},
]
FULL = ROWS[0]


@st.composite
def tables(draw):
    """Valid tables: up to three blocks, widths that fall or stay, with and without meta."""
    keys = [f"{block}.{kind}" for block in range(draw(st.integers(1, 3))) for kind in ("attn", "mlp")]
    rows = [{key: draw(st.integers(0, 3072)) for key in keys}]
    for _ in range(draw(st.integers(0, 6))):
        rows.append({key: draw(st.integers(0, width)) for key, width in rows[-1].items()})
    meta = draw(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(), st.none()), max_size=3))
    return MaskTable(rows, meta)


def columns() -> dict:
    return MaskTable(ROWS).to_json()


# ---------------------------------------------------------------------------------------------------------------------
# What a table is


@settings(max_examples=100)
@given(tables())
def test_round_trip_through_json(table):
    text = json.dumps(table.to_json())
    assert MaskTable.from_json(json.loads(text)) == table
    for code in range(len(table)):
        assert table.widths(code) == table.rows[code]
    assert table.widths(-1) == table.rows[-1]
    table.check(table.rows[0], "this model")


def test_round_trip_through_a_file(tmp_path):
    path = tmp_path / "output" / "mask_table.json"
    table = MaskTable(ROWS, {"model": "vit_tiny", "macs": [3, 2, 1]})
    table.save(path)
    assert MaskTable.load(path) == table
    assert [file.name for file in path.parent.iterdir()] == ["mask_table.json"]


def test_the_authors_format_to_the_letter(tmp_path):
    table = MaskTable(
        [{"0.attn": 64, "0.mlp": 3072}, {"0.attn": 64, "0.mlp": 2976}, {"0.attn": 56, "0.mlp": 2976}],
    )
    theirs = (
        '{"0.attn": {"0": 64, "1": 64, "2": 56, "-1": 56}, "0.mlp": {"0": 3072, "1": 2976, "2": 2976, "-1": 2976}}\n'
    )
    path = tmp_path / "mask_table.json"
    table.save(path)
    assert path.read_text() == theirs
    path.write_text(theirs)
    assert MaskTable.load(path) == table
    assert "meta" not in table.to_json()
    assert MaskTable(table.rows, {"model": "deit"}).to_json() == table.to_json() | {"meta": {"model": "deit"}}


def test_codes_may_stand_in_any_order():
    table = {key: dict(sorted(column.items(), reverse=True)) for key, column in columns().items()}
    assert MaskTable.from_json(dict(reversed(table.items()))).rows == ROWS


def test_the_smallest_code_may_be_left_out_or_be_smaller_still():
    """-1 repeats the last code; a table whose -1 is another network keeps it, as one code more."""
    short = {key: {code: width for code, width in column.items() if code != "-1"} for key, column in columns().items()}
    assert MaskTable.from_json(short).rows == ROWS
    smaller = columns()
    smaller["0.mlp"]["-1"] = 2
    assert MaskTable.from_json(smaller).rows == [*ROWS, ROWS[-1] | {"0.mlp": 2}]


def test_equality_and_size():
    assert len(MaskTable(ROWS)) == 3
    assert MaskTable(ROWS) == MaskTable(copy.deepcopy(ROWS))
    assert MaskTable(ROWS) != MaskTable(ROWS[:2])
    assert MaskTable(ROWS) != MaskTable(ROWS, {"model": "x"})
    assert MaskTable(ROWS) != ROWS


def test_widths_are_a_copy():
    table = MaskTable(copy.deepcopy(ROWS))
    table.widths(-1)["0.attn"] = 1
    table.widths(0)["0.attn"] = 1
    assert table.rows == ROWS


@pytest.mark.parametrize("op_code", [3, -2, 100])
def test_an_op_code_that_is_not_in_the_table(op_code):
    with pytest.raises(UserError, match=rf"op code {op_code} is not in the mask table, which has 0\.\.2 and -1"):
        MaskTable(ROWS).widths(op_code)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong is named


def spoilt(spoil) -> dict:
    table = columns()
    return spoil(table) or table


def put(*path_and_value):
    """A change of one entry of the table: put("0.attn", "1", value)."""
    *path, last, value = path_and_value

    def change(table):
        for key in path:
            table = table[key]
        table[last] = value

    return change


def drop(*path):
    def change(table):
        for key in path[:-1]:
            table = table[key]
        del table[path[-1]]

    return change


MALFORMED = {
    "not an object": (lambda table: [table], "expected an object of modules, found a list"),
    "empty": (lambda table: table.clear(), "mask table is empty"),
    "nothing but meta": (lambda table: {"meta": {"model": "x"}}, "mask table is empty"),
    "meta is a list": (put("meta", [1]), "meta is a list, not an object"),
    "meta is null": (put("meta", None), "meta is a NoneType, not an object"),
    "key without a kind": (put("0", {}), "'0' is not a module"),
    "key of another kind": (put("0.conv", {"0": 1}), "'0.conv' is not a module"),
    "key without a block": (put(".attn", {"0": 1}), "'.attn' is not a module"),
    "key of a negative block": (put("-1.attn", {"0": 1}), "'-1.attn' is not a module"),
    "key with more after it": (put("0.attn.qkv", {"0": 1}), "'0.attn.qkv' is not a module"),
    "key in other digits": (put("\u0661.attn", {"0": 1}), "'\u0661.attn' is not a module"),
    "module is a list": (put("1.attn", [16, 16, 0]), "1.attn is not an object of op codes"),
    "module is null": (put("1.attn", None), "1.attn is not an object of op codes"),
    "module without codes": (put("1.attn", {}), "1.attn is not an object of op codes"),
    "code is no number": (put("1.attn", "full", 16), "1.attn has op code 'full', which is not a whole number"),
    "code is a fraction": (put("1.attn", "1.0", 16), "1.attn has op code '1.0', which is not a whole number"),
    "code with a leading zero": (put("1.attn", "01", 16), "1.attn has op code '01', which is not a whole number"),
    "code below -1": (put("1.attn", "-2", 16), "1.attn has op code '-2', which is not a whole number"),
    "code in other digits": (put("1.attn", "\u0661", 16), "1.attn has op code '\u0661', which is not a whole number"),
    "code of endless digits": (put("1.attn", "9" * 5000, 16), "1.attn has op code '9999"),
    "width is text": (put("0.mlp", "1", "62"), "0.mlp has width '62' at op code 1, which is not a whole number"),
    "width is a fraction": (put("0.mlp", "1", 62.0), "0.mlp has width 62.0 at op code 1, which is not a whole number"),
    "width is true": (put("0.mlp", "1", True), "0.mlp has width True at op code 1, which is not a whole number"),
    "width is null": (put("0.mlp", "1", None), "0.mlp has width None at op code 1, which is not a whole number"),
    "width below 0": (put("1.attn", "2", -1), "1.attn has width -1 at op code 2, below 0"),
    "width grows": (put("0.mlp", "2", 63), "0.mlp grows from 62 to 63 at op code 2"),
    "width grows at -1": (put("1.attn", "-1", 3), "1.attn grows from 0 to 3"),
    "code missing in one module": (drop("1.mlp", "1"), "1.mlp does not have the same op codes .*op code 1"),
    "code too many in one module": (put("1.mlp", "3", 1), "1.mlp does not have the same op codes .*op code 3"),
    "-1 missing in one module": (drop("0.mlp", "-1"), "0.mlp does not have the same op codes .*op code -1"),
    "code missing in every module": (
        lambda table: [column.pop("1") for column in table.values()] and None,
        "op code 1 is missing",
    ),
    "code 0 missing in every module": (
        lambda table: [column.pop("0") for column in table.values()] and None,
        "op code 0 is missing",
    ),
    "nothing but -1": (
        lambda table: {key: {"-1": column["-1"]} for key, column in table.items()},
        "op code 0 is missing",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_table_is_refused_with_the_key_that_is_wrong(case, tmp_path):
    spoil, message = MALFORMED[case]
    with pytest.raises(UserError, match=message):
        MaskTable.from_json(spoilt(spoil))
    path = tmp_path / "mask_table.json"
    path.write_text(json.dumps(spoilt(spoil)))
    with pytest.raises(UserError, match=f"mask_table.json: .*{message}"):
        MaskTable.load(path)


def test_too_many_op_codes_are_refused():
    column = {str(code): 1 for code in range(MAX_OP_CODES + 1)}
    with pytest.raises(UserError, match=f"0.attn has {MAX_OP_CODES + 1} op codes, more than {MAX_OP_CODES}"):
        MaskTable.from_json({"0.attn": column})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ('{"0.attn": {"0": 16', "not valid JSON"),
        ('{"0.attn": {"0": NaN}}', "0.attn has width nan|not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"0.attn": {"0": 16}, "0.attn": {"0": 8}}', "'0.attn' appears twice"),
        ('{"0.attn": {"0": 16, "0": 8}}', "'0' appears twice"),
    ],
    ids=["empty", "cut short", "NaN", "endless", "module twice", "op code twice"],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    path = tmp_path / "mask_table.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"mask_table.json.*({message})"):
        MaskTable.load(path)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "mask_table.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"mask_table.json is not valid JSON"):
        MaskTable.load(path)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "mask_table.json", tmp_path):
        with pytest.raises(UserError, match=f"mask table {path} does not exist"):
            MaskTable.load(path)


def test_rows_that_do_not_go_together():
    with pytest.raises(UserError, match=r"module 1.mlp is not in every op code \(op code 1\)"):
        MaskTable([FULL, {key: 0 for key in FULL if key != "1.mlp"}])
    with pytest.raises(UserError, match="mask table is empty"):
        MaskTable([])
    with pytest.raises(UserError, match=r"0\.attn has width -4 at op code 0, below 0"):
        MaskTable([FULL | {"0.attn": -4}])


@pytest.mark.parametrize(
    ("full", "message"),
    [
        (FULL | {"2.attn": 16, "2.mlp": 64}, "covers 2 blocks, deit has 3: 2.attn is missing from the table"),
        ({key: FULL[key] for key in ("0.attn", "0.mlp")}, "covers 2 blocks, deit has 1: 1.attn is not in the model"),
        (FULL | {"1.mlp": 128}, "1.mlp has width 64 at op code 0, deit has 128 there"),
        (FULL | {"0.attn": 8}, "0.attn has width 16 at op code 0, deit has 8 there"),
    ],
)
def test_a_table_of_another_model_is_refused(full, message):
    MaskTable(ROWS).check(FULL, "deit")
    with pytest.raises(UserError, match=f"{message}.*; give the table of this model"):
        MaskTable(ROWS).check(full, "deit")
