"""Functions and classes of the user's in a graph, which names them by text."""

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
    """The text by which a graph names a class or function of the user's: ``module:qualified name``.

    One that cannot be imported (it was made inside a function, or is an object that can be called) is known in this
    process alone; a second one of the same name gets a number.
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
    """Call ``apply`` of the `torch.autograd.Function` that `function` names (see `function_key`).

    Raises:
        RuntimeError: The class is not known in this process and cannot be imported.
    """
    if has_torch_function(args):
        return handle_torch_function(apply_function, args, function, *args, **kwargs)
    # Dynamo calls the `apply` of the base class in any case
    if not is_compiling() and _wraps_apply(function):
        return base_apply(function_of(function))(*args, **kwargs)
    return function_of(function).apply(*args, **kwargs)


def _wraps_apply(function: str) -> bool:
    """Whether a Function has code of its own around `apply`: a trace has gone through that already."""
    return overrides_apply(function_of(function))


def apply_forward(x: Tensor, function: str, /, *before: Any, **parameters: Any) -> Tensor:
    """Call the function of the user's that `function` names (see `function_key`), in the place of a site's own forward.

    Args:
        x: The tensor.
        function: The name of the function.
        *before: What it is given in front of `x`.
        **parameters: What it is given by keyword.

    Raises:
        RuntimeError: It is not known in this process and cannot be imported.
        TypeError: It returned something else than a tensor of the shape of `x`.
        RuleError: It changed `x` in place.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(apply_forward, (x,), x, function, *before, **parameters)
    counts = not is_compiling() and not x.is_inference()
    before_call = version(x) if counts else 0
    result = function_of(function)(*before, x, **parameters)
    if counts and version(x) != before_call:
        raise RuleError(
            f"the forward {function!r} changes its argument in place, which is the model's own tensor. Make it a pure "
            f"function: x.sign(), not x.sign_()."
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
    """The class or function of a key.

    Raises:
        RuntimeError: The class is not known in this process and cannot be imported.
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
            f"the model calls {key!r}, which cannot be imported here ({error}). "
            f"Define it at the top level of a module, so that a saved model finds it."
        ) from error
