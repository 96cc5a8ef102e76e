"""Forwards that are decorated: the decorator gets the arguments as it gets them in a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["call_of", "is_decorated"]


def is_decorated(forward: Callable[..., Any]) -> bool:
    """Whether a function wraps another one (`functools.wraps`), whose signature it shows."""
    return inspect.unwrap(forward) is not forward


def call_of(forward: Callable[..., Any], specialised: Mapping[str, Any]) -> Callable[..., Any]:
    """A function that calls a decorated forward, given the values of the arguments that it shows.

    FX would give the values to the wrapper by position, in place of its own ``*args`` and ``**kwargs``. An argument
    that is specialised to its default is left out, as in a call: the wrapper may ask whether it was given.

    Args:
        forward: The decorated forward of a class.
        specialised: The values of the arguments that are constants.

    Returns:
        A function of the module and the values, in the order of FX: named arguments, ``*args``, ``**kwargs``.
    """
    shown = list(inspect.signature(forward).parameters.values())[1:]
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    in_order = [p for p in shown if p.kind not in several] + [p for p in shown if p.kind in several]

    def call(module: Any, *values: Any) -> Any:
        args: list[Any] = [module]
        keywords: dict[str, Any] = {}
        omitted = False
        for parameter, value in zip(in_order, values, strict=True):
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += value
            elif parameter.kind is parameter.VAR_KEYWORD:
                keywords.update(value)
            elif specialised.get(parameter.name, parameter) is parameter.default:
                omitted = True
            elif omitted or parameter.kind is parameter.KEYWORD_ONLY:
                keywords[parameter.name] = value
            else:
                args.append(value)
        return forward(*args, **keywords)

    return call
