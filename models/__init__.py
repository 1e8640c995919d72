"""timm's transformers as super-networks: run at any widths, cut, counted, saved."""

from .backbone import create_backbone
from .elastic import make_elastic, set_widths
from .extraction import extract
from .folder import load_subnetwork, save_subnetwork
from .loading import load_backbone
from .macs import count_macs, count_params

__all__ = [
    "count_macs",
    "count_params",
    "create_backbone",
    "extract",
    "load_backbone",
    "load_subnetwork",
    "make_elastic",
    "save_subnetwork",
    "set_widths",
]
