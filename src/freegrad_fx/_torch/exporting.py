"""`torch.export`, which is imported when it is needed, because it imports sympy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from .releases import lookup, uses_private_names
from .replacing import replaced

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = [
    "constants_lifted_by",
    "dynamic_where_possible",
    "export",
    "guard_names",
    "guards_written_by",
    "is_fake",
    "is_symbolic",
    "traced_in_full",
]

_EXPORT = "capture by torch.export"


def export(root: Any, args: Any, kwargs: Any, dynamic_shapes: Any) -> ExportedProgram:
    """`torch.export.export` without Dynamo."""
    import torch.export

    return torch.export.export(root, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


def dynamic_where_possible() -> Any:
    """The size of a dimension that is dynamic where the model allows it."""
    from torch.export import Dim

    return Dim.AUTO


def constants_lifted_by(
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> AbstractContextManager[None]:
    """Replace the pass of export that makes unregistered tensors constants.

    Args:
        make: Returns the replacement, given the pass. Both take the graph module as the first argument.
    """
    module = lookup("torch._export.passes.lift_constants_pass", _EXPORT)
    return replaced(module, "lift_constants_pass", make)


def guards_written_by(
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> AbstractContextManager[None]:
    """Replace the function with which export generates the code of guards.

    Args:
        make: Returns the replacement, given the function. Both take the guards, as Python expressions, and the paths of
            the inputs that occur in them.
    """
    module = lookup("torch.export._unlift", _EXPORT)
    return replaced(module, "_convert_guards_code_to_fn", make)


def guard_names() -> dict[str, Any]:
    """The names that the expressions of guards refer to."""
    names = lookup(
        "torch.fx.experimental.symbolic_shapes.SYMPY_INTERP", "checking an exported model's inputs"
    )
    return dict(names)


def is_fake(value: Any) -> bool:
    """Whether a value is a fake tensor, with which export runs a model."""
    return isinstance(value, lookup("torch._subclasses.fake_tensor.FakeTensor", _EXPORT))


def is_symbolic(value: Any) -> bool:
    """Whether a value is a fake tensor, its functional wrapper, or a symbolic number of an export."""
    functional = lookup("torch._subclasses.functional_tensor.FunctionalTensor", _EXPORT)
    return is_fake(value) or isinstance(
        value, (functional, torch.SymInt, torch.SymFloat, torch.SymBool)
    )


@uses_private_names("compiling an exported model")
def traced_in_full(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make Dynamo trace into a function that it would skip."""
    import torch._dynamo

    traced: Callable[..., Any] = torch._dynamo.dont_skip_tracing(function)
    return traced
