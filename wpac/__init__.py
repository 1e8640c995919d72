"""Weighted PCA for attention contraction: statistics, and the transform that keeps the function."""

from .statistics import collect_statistics
from .transform import contract

__all__ = ["collect_statistics", "contract"]
