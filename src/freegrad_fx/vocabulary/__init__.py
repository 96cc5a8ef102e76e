"""The vocabulary of operations: a canonical name for each, and all the ways to call it that occur in graphs.

`activations` holds the table, `op` defines its lines, `recognition` looks nodes up in it, and `quantizers` defines the
functions that this package adds. Independent of rules, sites and capture.
"""

from .activations import FORWARDS, GROUPS, OPS
from .op import Op, Spelling
from .quantizers import binarize, heaviside, ternarize
from .recognition import recognise

__all__ = [
    "FORWARDS",
    "GROUPS",
    "OPS",
    "Op",
    "Spelling",
    "binarize",
    "heaviside",
    "recognise",
    "ternarize",
]
