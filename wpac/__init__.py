"""Contraction: statistics, the transforms that keep the function, compensation, refitting, sizes without training."""

from .transform import contract

__all__ = ["contract"]
