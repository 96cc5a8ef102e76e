"""The backward rules: what a rule is (`rule`), and the built-in ones, a file per family."""

from .attribution import guided
from .gradient import (
    centralize,
    clip_norm,
    clip_value,
    d_linear,
    d_relu,
    noise,
    rectangular,
    reverse,
    scale,
    triangular,
)
from .jamming import full_jam, positive_jam, rectangular_jam
from .rule import Composition, Rule, RuleLike, available, compose, get, register
from .straight_through import clipped_straight_through, straight_through
from .surrogate import arctan, fast_sigmoid

__all__ = [
    "Composition",
    "Rule",
    "RuleLike",
    "arctan",
    "available",
    "centralize",
    "clip_norm",
    "clip_value",
    "clipped_straight_through",
    "compose",
    "d_linear",
    "d_relu",
    "fast_sigmoid",
    "full_jam",
    "get",
    "guided",
    "noise",
    "positive_jam",
    "rectangular",
    "rectangular_jam",
    "register",
    "reverse",
    "scale",
    "straight_through",
    "triangular",
]
