"""A super-network with everything that is known about it: opened, cut, saved, made."""

from .network import Network, load

__all__ = ["Network", "load"]
