"""Amounts as people type and read them: MACs, bytes, seconds."""

from __future__ import annotations

UNITS = {
    "amount": {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9},
    "bytes": {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30},
    "seconds": {"S": 1.0, "MS": 1e-3, "US": 1e-6},
}


def parse_amount(text: str, kind: str = "amount") -> float:
    """ "2.4G" -> 2.4e9; kind "bytes": "40MB" -> 4e7 ("MiB" is 2**20); kind "seconds": "5ms" -> 5e-3.

    Bytes and seconds need a unit. Raises ValueError for anything else.
    """
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(number) :].strip().upper()
    if unit not in UNITS[kind]:
        raise ValueError(f"{text} has not one of the units {', '.join(UNITS[kind])}")
    value = float(number) * UNITS[kind][unit]
    if not 0 < value < float("inf"):
        raise ValueError(f"{text} is not a positive amount")
    return value


def format_amount(value: float, unit: str = "") -> str:
    """2.4e9 -> "2.4G", three digits; with a unit, such as B, "2.4 GB"."""
    space = " " if unit else ""
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= factor * (1 - 5e-4):  # what would round to 1,000 of the next prefix down
            return f"{value / factor:.3g}{space}{prefix}{unit}"
    return f"{value:.3g}{space}{unit}"


def format_seconds(value: float) -> str:
    """5e-3 -> "5 ms", three digits."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def format_sizes(sizes: dict[str, float]) -> str:
    """macs, params, memory (bytes) and, where it is known, latency (seconds), in words."""
    words = [f"{format_amount(sizes['macs'])} MACs", f"{format_amount(sizes['params'])} parameters"]
    words.append(format_amount(sizes["memory"], "B"))
    return ", ".join(words + ([format_seconds(sizes["latency"])] if "latency" in sizes else []))
