"""The input of a step that a model computes as a comparison: the difference of the two sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

__all__ = ["difference", "input_of_step"]


def difference(larger: Any, smaller: Any) -> Tensor:
    """Return ``larger − smaller`` in floating point numbers; autograd records the subtraction.

    Args:
        larger: A side of a comparison: a tensor or a number. One of the two is a tensor.
        smaller: The other side.
    """
    if has_torch_function_variadic(larger, smaller):
        return handle_torch_function(difference, (larger, smaller), larger, smaller)
    return _float(larger) - _float(smaller)  # type: ignore[no-any-return]


def _float(side: Any) -> Any:
    if isinstance(side, Tensor) and not side.is_floating_point():
        return side.to(torch.get_default_dtype())
    return side


def input_of_step(difference: Tensor, value: Tensor) -> Tensor:
    """Return the difference of the sides of a comparison in the dtype and on the device of the step.

    Args:
        difference: The difference.
        value: The step. If it is not of floating point numbers, it has no gradient, and is returned itself.
    """
    if has_torch_function_variadic(difference, value):
        return handle_torch_function(input_of_step, (difference, value), difference, value)
    return difference.to(value) if value.is_floating_point() else value
