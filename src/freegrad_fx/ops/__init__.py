"""The functions that a rewritten graph calls: `stop_gradient` before an operation, `decoupled` after it::

    stop = stop_gradient(x)
    y    = relu(stop)                                      # the model's own operation, unchanged
    out  = decoupled(y, x, rule="rectangular", a=-1.0, b=1.0)

A parameter is decoupled in the same way, without an operation in between; `call_with` then calls a module with the
decoupled parameter. `apply_function` calls a user's `torch.autograd.Function`. `apply_forward` calls a function that
replaces a forward. `run_pre_hooks`, `call_without_hooks` and `run_hooks` are the parts of the call of a module with
hooks: a rule is around the second. `enter_call`, `forward_of` and `leave_call` do the same where the forward of the
module is in the graph. `difference` and `input_of_step` compute the input of a step that the model writes as a
comparison. All are plain functions that dispatch through ``__torch_function__``. A symbolic tracer therefore records
each as one node, so that a rewritten graph can be pickled, traced again and compiled.
"""

from .calls import call_with
from .checks import (
    require_frozen,
    require_metadata,
    require_open,
    require_result,
    require_specialised,
    require_tensor,
    require_unwritten,
    warn_if_native,
    write_count,
)
from .comparisons import difference, input_of_step
from .functions import apply_forward, apply_function, function_key, function_of
from .gradients import decoupled, kept, stop_gradient, written_back
from .hooked import (
    call_without_hooks,
    enter_call,
    forward_of,
    leave_call,
    run_hooks,
    run_pre_hooks,
)
from .joint import gathered, scattered
from .merging import merged_parameters

__all__ = [
    "apply_forward",
    "apply_function",
    "call_with",
    "call_without_hooks",
    "decoupled",
    "difference",
    "enter_call",
    "forward_of",
    "function_key",
    "function_of",
    "gathered",
    "input_of_step",
    "kept",
    "leave_call",
    "merged_parameters",
    "require_frozen",
    "require_metadata",
    "require_open",
    "require_result",
    "require_specialised",
    "require_tensor",
    "require_unwritten",
    "run_hooks",
    "run_pre_hooks",
    "scattered",
    "stop_gradient",
    "warn_if_native",
    "write_count",
    "written_back",
]


def __dir__() -> list[str]:
    return __all__


# Generated code and saved graphs refer to each function by this module, whichever submodule defines it
for _name in __all__:
    globals()[_name].__module__ = __name__
