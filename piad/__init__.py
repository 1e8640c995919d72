"""Progressive importance-aware dropout: importance, dropout list, mask table, sampling."""

from .mask_table import MaskTable
from .progressive import ProgressiveDropout
from .selection import largest_within
from .super_network import load_super_network

__all__ = ["MaskTable", "ProgressiveDropout", "largest_within", "load_super_network"]
