"""nn.Module → graphs.

- `copying`: the copy of the model that is captured
- `symbolic`: capture by symbolic tracing, with the `tracer`, its `proxies` and `patches`
- `export`: capture by `torch.export`, from example inputs
- `captured`: the module that runs the graphs
- `result`: the result of a capture

Nothing in this package knows rules or sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import CaptureError
from .captured import CapturedModule
from .copying import check_model, structural_copy
from .export import capture_by_export
from .result import Capture
from .symbolic import capture_symbolically

__all__ = ["Capture", "capture", "check_model", "structural_copy"]


def capture(
    model: nn.Module,
    leaf_types: Sequence[type[Any]] = (),
    concrete_args: Mapping[str, Any] | None = None,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Capture:
    """Capture a model as graphs that compute what the model computes, in train and in eval mode.

    Args:
        model: The model. It is not changed.
        leaf_types: Module classes to keep as one opaque call. Classes of other kinds are ignored.
        concrete_args: Values to which arguments of the forward are specialised; `torch.fx.PH` keeps an argument open.
        example_inputs: Positional or keyword arguments of the forward. If given, the model is captured by
            `torch.export`.
        dynamic_shapes: As for `torch.export.export`. Default: the first dimension of every tensor is dynamic where the
            model allows it.

    Raises:
        TypeError: `model` is not an `nn.Module`, or another argument is not of the type above.
        CaptureError: The model cannot be copied or captured. The message gives the place and the reason.
    """
    check_model(model)
    if wrong := [t for t in leaf_types if not isinstance(t, type)]:
        raise TypeError(
            f"leaf_modules must be a list of module classes, such as [MyBlock], got {wrong[0]!r}"
        )
    if concrete_args is not None and not isinstance(concrete_args, Mapping):
        raise TypeError(
            f"concrete_args must be a dict from argument names to values, such as {{'mask': None}}, got "
            f"{type(concrete_args).__name__}"
        )
    root = structural_copy(model)
    if isinstance(root, CapturedModule):
        if example_inputs is not None or concrete_args:
            raise CaptureError(
                "the model is already transformed, and its graphs are reused: example_inputs and concrete_args can "
                "only be given for the original model."
            )
        return Capture(root, type(model).__name__, root.variants)
    if dynamic_shapes is not None and example_inputs is None:
        raise TypeError(
            "dynamic_shapes describes the dimensions of example_inputs: give example_inputs too"
        )
    if example_inputs is not None:
        _refuse_with_examples(leaf_types, concrete_args)
        return capture_by_export(model, root, example_inputs, dynamic_shapes)
    leaves = tuple(t for t in leaf_types if issubclass(t, nn.Module))
    return capture_symbolically(model, root, leaves, concrete_args or {})


def _refuse_with_examples(leaf_types: Sequence[type[Any]], concrete_args: Any) -> None:
    """Raise `CaptureError` for arguments that cannot be combined with example inputs."""
    if leaf_types:
        names = ", ".join(t.__name__ for t in leaf_types)
        raise CaptureError(
            f"torch.export traces into every module, so a module cannot be kept as one opaque call or selected by its "
            f"class ({names}). Select ops instead; or omit "
            f"example_inputs, or use freegrad_fx.compile(model, rules), which both accept classes."
        )
    if concrete_args:
        raise CaptureError(
            "concrete_args is for symbolic tracing only; with example_inputs, the arguments have the values of the "
            "examples. Remove one of the two."
        )
