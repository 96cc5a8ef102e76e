"""`torch.export`, which is imported when it is needed: it brings sympy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

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
    "traced_in_full",
]

_EXPORT = "capture by torch.export"


def export(root: Any, args: Any, kwargs: Any, dynamic_shapes: Any) -> ExportedProgram:
    """`torch.export.export` without Dynamo."""
    import torch.export

    return torch.export.export(root, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


def dynamic_where_possible() -> Any:
    """The size of a dimension that may change where the model allows it."""
    from torch.export import Dim

    return Dim.AUTO


def constants_lifted_by(
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> AbstractContextManager[None]:
    """Replace the pass of export that makes constants of tensors which no module has registered.

    Args:
        make: Given the pass, returns what takes its place; both take the graph module first.
    """
    module = lookup("torch._export.passes.lift_constants_pass", _EXPORT)
    return replaced(module, "lift_constants_pass", make)


def guards_written_by(
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> AbstractContextManager[None]:
    """Replace what export makes code of guards with.

    Args:
        make: Given the usual function, returns what takes its place; both take the guards, as Python expressions, and
            the places of the inputs that these name.
    """
    module = lookup("torch.export._unlift", _EXPORT)
    return replaced(module, "_convert_guards_code_to_fn", make)


def guard_names() -> dict[str, Any]:
    """What the expressions of guards refer to."""
    names = lookup(
        "torch.fx.experimental.symbolic_shapes.SYMPY_INTERP", "checking an exported model's inputs"
    )
    return dict(names)


def is_fake(value: Any) -> bool:
    """Whether a value is a stand-in for a tensor, which export runs a model on."""
    return isinstance(value, lookup("torch._subclasses.fake_tensor.FakeTensor", _EXPORT))


@uses_private_names("compiling an exported model")
def traced_in_full(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let Dynamo look into a function that it would skip."""
    import torch._dynamo

    traced: Callable[..., Any] = torch._dynamo.dont_skip_tracing(function)
    return traced
