"""What a captured and rewritten graph calls: `stop_gradient` in front of an operation, `decoupled` behind it.

    stop = stop_gradient(x)
    y    = relu(stop)                                      # the user's own operation, unchanged
    out  = decoupled(y, x, rule="rectangular", a=-1.0, b=1.0)

A parameter is decoupled in the same way, with no operation in between, and `call_with` calls a module with the result
in its place. `apply_function` stands for a call of a `torch.autograd.Function` of the user's own, `apply_forward` for
one of a function that replaces a forward. All are plain functions that dispatch through ``__torch_function__``: a
symbolic tracer keeps each as one node, which is why a rewritten graph survives pickling, a second trace and
`torch.compile`.
"""

from .calls import call_with
from .checks import require_frozen, require_open, require_specialised, require_tensor
from .functions import apply_forward, apply_function, function_key, function_of
from .gradients import decoupled, kept, stop_gradient

__all__ = [
    "apply_forward",
    "apply_function",
    "call_with",
    "decoupled",
    "function_key",
    "function_of",
    "kept",
    "require_frozen",
    "require_open",
    "require_specialised",
    "require_tensor",
    "stop_gradient",
]

# The code of a graph, and graphs that were saved, name each function by this module, wherever it stands in it
for _name in __all__:
    globals()[_name].__module__ = __name__
