"""Lets generated code call the functions around operations in C++, if the extension is in use."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..backward.fused import Operation, fused
from ..backward.node import direct
from .gradients import decoupled, stop_gradient

__all__ = ["called_directly", "site_function"]


def called_directly(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A generated forward that calls the functions around operations in C++, in code that runs and is not traced.

    Args:
        forward: A function that calls the functions of this package by names in its globals. Returned unchanged if it
            calls none of them, or the extension is not in use.
    """
    names = getattr(forward, "__globals__", {})
    called = [name for name, value in names.items() if value is stop_gradient or value is decoupled]
    if not called or not isinstance(forward, types.FunctionType):
        return forward
    functions = direct(stop_gradient, decoupled)
    if functions is None:
        return forward
    stop, around = functions
    replaced = {name: stop if names[name] is stop_gradient else around for name in called}
    made = types.FunctionType(
        forward.__code__,
        {**names, **replaced},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def site_function(
    operation: Operation, keywords: Mapping[str, Any]
) -> Callable[[Tensor], Any] | None:
    """A function of ``x`` that gives ``decoupled(operation(stop_gradient(x)), x, **keywords)``; see `fused`."""
    return fused(operation, keywords, stop_gradient, decoupled)
