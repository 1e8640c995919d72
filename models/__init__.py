"""timm's transformers as super-networks: run at any widths, cut, counted, saved, opened."""

from typing import Any

from .backbone import create_backbone
from .elastic import make_elastic, set_widths
from .extraction import extract
from .folder import load_subnetwork, save_subnetwork
from .loading import load_backbone
from .macs import count_macs, count_params

__all__ = [
    "Network",
    "count_macs",
    "count_params",
    "create_backbone",
    "extract",
    "load",
    "load_backbone",
    "load_subnetwork",
    "make_elastic",
    "save_subnetwork",
    "set_widths",
]


def __getattr__(name: str) -> Any:
    """load and Network, when they are asked for: they know mask tables and compensation, and those know models."""
    if name in ("load", "Network"):
        from . import network

        return getattr(network, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
