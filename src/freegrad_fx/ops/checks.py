"""What a graph checks at each call: that what its capture took for granted holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from ..errors import CaptureError

__all__ = ["require_frozen", "require_open", "require_specialised", "require_tensor"]


def require_specialised(value: Any, captured: Any, name: str, remedy: str = "") -> None:
    """Raise `CaptureError` unless an argument has the value that the graph was captured for.

    Args:
        value: The argument of this call.
        captured: The value at the time of the capture; ``...`` stands for one that no graph can hold.
        name: The argument's name.
        remedy: What the caller can do, where it is not what symbolic tracing needs.
    """
    if has_torch_function((value,)):
        handle_torch_function(require_specialised, (value,), value, captured, name, remedy)
    elif not (value is captured or (type(value) is type(captured) and value == captured)):
        was = "the default of " + name if captured is ... else f"{name}={captured!r}"
        remedy = remedy or (
            f"Transform the model for the value you need: transform(model, rules, concrete_args={{{name!r}: ...}}); "
            f"for an argument that is a tensor at each call, concrete_args={{{name!r}: torch.fx.PH}}."
        )
        raise CaptureError(
            f"the graph was captured for {was} and is called with another value. {remedy}"
        )


def require_open(value: Any, name: str) -> None:
    """Raise `CaptureError` if an open argument is None or a bool, which a forward may have asked for with ``is``.

    Args:
        value: The argument of this call.
        name: The argument's name.
    """
    if has_torch_function((value,)):
        handle_torch_function(require_open, (value,), value, name)
    elif value is None or isinstance(value, bool):
        raise CaptureError(
            f"the forward asks with `is` what an argument is, and the graph was captured for a value of {name!r} "
            f"that is neither None nor a bool; it is {value} now. Transform the model for that: "
            f"transform(model, rules, concrete_args={{{name!r}: {value}}})."
        )


def require_tensor(value: Any, where: str) -> None:
    """Raise `CaptureError` unless a value is a tensor, which the capture took it for when the forward asked.

    Args:
        value: The value.
        where: ``file:line`` of the question.
    """
    if has_torch_function((value,)):
        handle_torch_function(require_tensor, (value,), value, where)
    elif not isinstance(value, Tensor):
        raise CaptureError(
            f"the forward asks at {where} for the type of a value; the graph was captured for a tensor, and it is "
            f"{type(value).__name__} now. Transform the model with example_inputs=(...) of that kind."
        )


def require_frozen(parameter: Tensor, name: str) -> None:
    """Raise `RuntimeError` if a parameter learns that was frozen when its rule was planned.

    Args:
        parameter: The parameter.
        name: Its dotted name.
    """
    if has_torch_function_unary(parameter):
        handle_torch_function(require_frozen, (parameter,), parameter, name)
    elif parameter.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"the parameter {name!r} was frozen (requires_grad=False) when the model was transformed, and learns now: "
            f"its rule would not act. Transform the original model again, with the parameter unfrozen; the tensors "
            f"stay the same."
        )
