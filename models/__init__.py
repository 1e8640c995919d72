"""timm's transformers as super-networks: run at any widths, cut, counted, saved, opened."""

from typing import Any

from .extraction import extract
from .macs import count_macs

__all__ = ["Network", "count_macs", "extract", "load"]


def __getattr__(name: str) -> Any:
    """load and Network, when they are asked for: they know mask tables and compensation, and those know models."""
    if name in ("load", "Network"):
        from . import network

        return getattr(network, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
