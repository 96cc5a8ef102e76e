"""The vocabulary of operations: one canonical name each, and every spelling that reaches a graph.

`activations` is the table, `recognition` the question that it answers, `op` what a line is, `quantizers` the functions
that this package adds. Knows no rules, no sites, and not how a graph was captured.
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
