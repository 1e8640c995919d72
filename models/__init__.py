"""timm's transformers as super-networks: run at any widths, cut, counted, saved, opened."""

from .extraction import extract
from .macs import count_macs

__all__ = ["count_macs", "extract"]
