"""FreeGrad's rules."""

from .basic import centralize, clip_norm, heaviside, identity, noise, rectangular, scale, triangular
from .jamming import full_jam, positive_jam, rectangular_jam

__all__ = [
    "centralize",
    "clip_norm",
    "full_jam",
    "heaviside",
    "identity",
    "noise",
    "positive_jam",
    "rectangular",
    "rectangular_jam",
    "scale",
    "triangular",
]
