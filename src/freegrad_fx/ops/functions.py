"""User functions and classes in graphs, which refer to them by a text key."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from functools import reduce
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from .._torch.dynamo import is_compiling
from .._torch.functions import base_apply, overrides_apply
from .._torch.tensors import version
from ..errors import RuleError

__all__ = ["apply_forward", "apply_function", "function_key", "function_of"]


_functions: dict[str, Callable[..., Any]] = {}


def function_key(function: Callable[..., Any]) -> str:
    """Return the key of a user's class or function, ``module:qualified name``, by which graphs refer to it.

    An object that cannot be imported, such as a nested function or a callable instance, can be found only in this
    process. If several objects have the same name, ``#2`` and so on is appended.
    """
    bound = isinstance(getattr(function, "__func__", None), types.FunctionType)
    named = hasattr(function, "__qualname__") and not bound
    kind = function if named else type(function)
    base = f"{kind.__module__}:{kind.__qualname__}{'' if named else '()'}"
    key, number = base, 1
    while _functions.setdefault(key, function) is not function:
        number += 1
        key = f"{base}#{number}"
    return key


def apply_function(function: str, *args: Any, **kwargs: Any) -> Any:
    """Call ``apply`` of a `torch.autograd.Function`.

    Args:
        function: The key of the class; see `function_key`.
        *args: Positional arguments.
        **kwargs: Keyword arguments.

    Raises:
        RuntimeError: The class cannot be found in this process and cannot be imported.
    """
    if has_torch_function(args):
        return handle_torch_function(apply_function, args, function, *args, **kwargs)
    # Dynamo always calls the `apply` of the base class
    if not is_compiling() and _wraps_apply(function):
        return base_apply(function_of(function))(*args, **kwargs)
    return function_of(function).apply(*args, **kwargs)


def _wraps_apply(function: str) -> bool:
    """Whether a Function overrides `apply`. The capture has traced through the override already."""
    return overrides_apply(function_of(function))


def apply_forward(x: Tensor, function: str, /, *before: Any, **parameters: Any) -> Tensor:
    """Call a user's function that replaces the forward of a site.

    Formula: ``function(*before, x, **parameters)``.

    Args:
        x: The input of the site.
        function: The key of the function; see `function_key`.
        *before: Positional arguments before `x`.
        **parameters: Keyword arguments.

    Raises:
        RuntimeError: The function cannot be found in this process and cannot be imported.
        TypeError: The function did not return a tensor of the shape of `x`.
        RuleError: The function changed `x` in place.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(apply_forward, (x,), x, function, *before, **parameters)
    counts = not is_compiling() and not x.is_inference()
    before_call = version(x) if counts else 0
    result = function_of(function)(*before, x, **parameters)
    if counts and version(x) != before_call:
        raise RuleError(
            f"the forward {function!r} changes its argument, a tensor of the model, in place. Make it a pure "
            f"function, for example with x.sign() instead of x.sign_()."
        )
    if not isinstance(result, Tensor) or result.shape != x.shape:
        got = (
            f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        )
        raise TypeError(
            f"the forward {function!r} has to return a tensor of the shape of its input, {tuple(x.shape)}; it "
            f"returned {got}"
        )
    return result


def function_of(key: str) -> Any:
    """Return the class or function of a key; see `function_key`.

    Raises:
        RuntimeError: It cannot be found in this process and cannot be imported.
    """
    if key not in _functions:
        _functions[key] = _import_function(key)
    return _functions[key]


def _import_function(key: str) -> Any:
    module, _, qualname = key.partition(":")
    try:
        return reduce(getattr, qualname.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"the model calls {key!r}, which cannot be imported ({error}). "
            f"Define it at the top level of an importable module, so that a saved model can find it."
        ) from error
