"""Rules that act on gradients which are not scaled, where a loss is scaled: g/S → rule → ·S."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import RuleError
from .contract import LOSS_SCALE
from .declaration import Declaration
from .parameter import Parameter

__all__ = ["UNSCALED", "follow_scale", "follows_scale", "with_scale", "without_scale"]

UNSCALED = "unscaled:"
"""What the names and the tokens of such rules begin with."""

_followed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def follow_scale(scale: Tensor) -> None:
    """Note that a tensor is the scale of the gradients now, and no copy of it."""
    _followed[scale] = True


def follows_scale(scale: Tensor) -> bool:
    """Whether a tensor is the scale of the gradients now, and no copy of it."""
    return scale in _followed


def without_scale(name: str) -> str:
    """The name or the token of the rule that acts on gradients which are not scaled; ``""`` for that of other rules."""
    return name[len(UNSCALED) :] if name.startswith(UNSCALED) else ""


@functools.cache
def with_scale(declaration: Declaration) -> Declaration:
    """The declaration of the rule with a parameter for the scale of the gradients, which the formula does not see.

    A gradient that has overflowed makes the whole result NaN, so that the scaler finds it.
    """
    of_op, of_site = declaration.of_op, declaration.of_site
    scale = Parameter(LOSS_SCALE, Tensor)

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        return _around(function, declaration)

    return replace(
        declaration,
        name=UNSCALED + declaration.name,
        function=around(declaration.function),
        parameters={**declaration.parameters, LOSS_SCALE: scale},
        gate=declaration.gate and around(declaration.gate),
        fast=None,
        lean=None,
        learns={n: f and around(f) for n, f in declaration.learns.items()},
        token=declaration.token and UNSCALED + declaration.token,
        of_op=of_op and _without(of_op),
        of_site=of_site and _without(of_site),
    )


def _around(function: Callable[..., Any], declaration: Declaration) -> Callable[..., Any]:
    @functools.wraps(function)
    def unscaled(grad: Tensor, *inputs: Any, **arguments: Any) -> Any:
        scale: Tensor = arguments.pop(LOSS_SCALE)
        if grad.dtype == torch.float16:
            if declaration.operation:
                raise RuleError(
                    f"rule {declaration.name!r} uses `f`, which computes in float16, where gradients that are not "
                    f"scaled underflow. Use torch.bfloat16, which needs no scaler; or give unscaled() the other "
                    f"entries of the table only."
                )
            # g/S would underflow, and a formula can need its operands in one dtype
            grad = grad.float()
            inputs = tuple(map(_wide, inputs))
            arguments = {name: _wide(value) for name, value in arguments.items()}
        scale = scale.to(grad.device)
        found = function(grad * scale.reciprocal(), *inputs, **arguments)
        factor = scale + (grad * 0).sum()
        if isinstance(found, Mapping):
            return {name: _scaled(value, factor) for name, value in found.items()}
        return _scaled(found, factor)

    return unscaled


def _scaled(found: Any, factor: Tensor) -> Any:
    if callable(found):  # what a formula computes only if it is needed
        return lambda: _scaled(found(), factor)
    return found * factor if isinstance(found, Tensor) else found


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


def _without(function: Callable[..., Mapping[str, Any]]) -> Callable[..., Mapping[str, Any]]:
    @functools.wraps(function)
    def computed(place: Any, **parameters: Any) -> Mapping[str, Any]:
        parameters.pop(LOSS_SCALE, None)
        return function(place, **parameters)

    return computed
