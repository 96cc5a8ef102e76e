"""The vocabulary of operations: a canonical name for each, and all the ways to call it that occur in graphs.

`activations` holds the table, `op` defines its lines, `recognition` looks nodes up in it, `quantizers` defines the
functions that this package adds, and `forwards` binds parameters. Independent of rules, sites and capture.
"""

from .activations import FORWARDS, GROUPS, OPS
from .forwards import BoundForward, forward
from .learnt import clip_quantize, jump, step_quantize
from .op import Op, Spelling
from .quantizers import binarize, dorefa, heaviside, jump_relu, quantize, sample_one_hot, ternarize
from .recognition import recognise

__all__ = [
    "FORWARDS",
    "GROUPS",
    "OPS",
    "BoundForward",
    "Op",
    "Spelling",
    "binarize",
    "clip_quantize",
    "dorefa",
    "forward",
    "heaviside",
    "jump",
    "jump_relu",
    "quantize",
    "recognise",
    "sample_one_hot",
    "step_quantize",
    "ternarize",
]


def __dir__() -> list[str]:
    return __all__
