"""Progressive importance-aware dropout: importance, dropout list, mask table, sampling."""

from .mask_table import MaskTable

__all__ = ["MaskTable"]
