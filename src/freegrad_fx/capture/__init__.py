"""nn.Module → Graph.

`copying` makes the copy that is captured; `symbolic` traces it; `export` has `torch.export` do it, from example
inputs; `result` is what comes out. Nothing here knows rules or sites.
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
    """Capture a model as graphs that mean what it means, in train and in eval mode.

    Args:
        model: The model. It is not changed.
        leaf_types: Module classes to keep whole; other classes among them are passed over.
        concrete_args: Values for which arguments of the forward are specialised; `torch.fx.PH` keeps one open.
        example_inputs: Arguments, or keyword arguments, of the forward: the model is captured by `torch.export`.
        dynamic_shapes: What `torch.export.export` takes; by default the first dimension of every tensor may change.

    Raises:
        TypeError: `model` is no `nn.Module`.
        CaptureError: The model cannot be copied or traced; the message says where and why.
    """
    check_model(model)
    if wrong := [t for t in leaf_types if not isinstance(t, type)]:
        raise TypeError(
            f"leaf_modules is a list of module classes, got {wrong[0]!r}: leaf_modules=[MyBlock]"
        )
    if concrete_args is not None and not isinstance(concrete_args, Mapping):
        raise TypeError("concrete_args is a dict from names of arguments to values: {'mask': None}")
    root = structural_copy(model)
    if isinstance(root, CapturedModule):
        if example_inputs is not None or concrete_args:
            raise CaptureError(
                "the model is transformed already, and its graphs are kept as they are: example_inputs and "
                "concrete_args are for the original model."
            )
        return Capture(root, type(model).__name__, root.variants)
    if dynamic_shapes is not None and example_inputs is None:
        raise TypeError(
            "dynamic_shapes says which dimensions of example_inputs may change: give both"
        )
    if example_inputs is not None:
        _refuse_with_examples(leaf_types, concrete_args)
        return capture_by_export(model, root, example_inputs, dynamic_shapes)
    leaves = tuple(t for t in leaf_types if issubclass(t, nn.Module))
    return capture_symbolically(model, root, leaves, concrete_args or {})


def _refuse_with_examples(leaf_types: Sequence[type[Any]], concrete_args: Any) -> None:
    if leaf_types:
        names = ", ".join(t.__name__ for t in leaf_types)
        raise CaptureError(
            f"torch.export opens every module, so none can be kept whole or selected by its class ({names}). Name "
            f"ops instead, or transform without example_inputs."
        )
    if concrete_args:
        raise CaptureError(
            "with example_inputs the arguments have the values that the examples have; concrete_args is for symbolic "
            "tracing alone."
        )
