"""Progressive importance-aware dropout: importance, dropout list, mask table, sampling."""

from .latency import Latencies
from .mask_table import MaskTable
from .progressive import ProgressiveDropout
from .super_network import load_super_network

__all__ = ["Latencies", "MaskTable", "ProgressiveDropout", "load_super_network"]
