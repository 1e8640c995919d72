"""Contraction: statistics, the transforms that keep the function, compensation, refitting, sizes without training."""

from .allocation import dim_errors
from .compensation import compensate, load_compensation, save_compensation
from .refit import refit
from .statistics import collect_statistics
from .transform import contract

__all__ = [
    "collect_statistics",
    "compensate",
    "contract",
    "dim_errors",
    "load_compensation",
    "refit",
    "save_compensation",
]
