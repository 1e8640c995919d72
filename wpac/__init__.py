"""WPAC: statistics, the function-preserving contraction, compensation, refitting, and allocation without training."""

from .transform import contract

__all__ = ["contract"]
