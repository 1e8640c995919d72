"""timm's transformers: which are supported, running them at any widths, cutting them, counting their MACs."""

from .extraction import extract
from .macs import count_macs

__all__ = ["count_macs", "extract"]
