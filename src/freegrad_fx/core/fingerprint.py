"""A hash of what a formula computes, for formulas whose own code determines it. The same in every process."""

from __future__ import annotations

import builtins
import dis
import hashlib
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["fingerprint"]

# The versions of torch and of Python determine what these compute
_LIBRARIES = ("math", "torch", "torch.linalg", "torch.nn", "torch.nn.functional", "torch.special")
_BUILTINS = {
    *("abs", "bool", "float", "int", "isinstance", "len", "max", "min", "pow", "range", "round"),
    *("sum", "tuple", "zip"),
}


class _UnknownError(Exception):
    """The code refers to a name whose value can change."""


def fingerprint(*functions: Callable[..., Any] | None) -> str | None:
    """Return a hash of the code of functions, or None if something else can change what they compute.

    The code determines what a function computes if it refers only to modules of torch, to math and to some builtins.
    A global variable, or another function, can get another value at any time.

    Args:
        *functions: Functions, which are hashed together. None is skipped.
    """
    try:
        parts = [part for f in functions if f is not None for part in _of_function(f)]
    except _UnknownError:
        return None
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _of_function(function: Any) -> Iterator[str]:
    if type(function) is not types.FunctionType or function.__closure__:
        raise _UnknownError
    yield f"{function.__defaults__!r} {function.__kwdefaults__!r}"
    for code in _with_inner(function.__code__):
        yield from _of_code(code)
        yield from _of_globals(code, function.__globals__)


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


def _of_code(code: types.CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars} {code.co_flags}"
    yield f"{code.co_argcount} {code.co_kwonlyargcount} {code.co_exceptiontable.hex()}"
    for constant in code.co_consts:
        if not isinstance(constant, types.CodeType):
            yield f"{type(constant).__name__} {constant!r}"


def _of_globals(code: types.CodeType, names: dict[str, Any]) -> Iterator[str]:
    """The library functions that code looks up; raise `_UnknownError` for any other name."""
    looked_up: Any = None  # a module, whose attribute is read next
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if looked_up is not None:
            if instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                raise _UnknownError
            found = getattr(looked_up, name, None)
            yield f"{looked_up.__name__} {name}"
            looked_up = found if _is_library(found) else None
            if looked_up is None and not _is_of_library(found):
                raise _UnknownError
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if not _is_of_library(getattr(torch.Tensor, name, _UnknownError)):
                raise _UnknownError
        elif instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            known = names.get(name, getattr(builtins, name, None))
            if _is_library(known):
                looked_up = known
            elif name not in _BUILTINS or known is not getattr(builtins, name):
                raise _UnknownError
        elif instruction.opname.startswith(("IMPORT", "STORE_GLOBAL", "STORE_NAME")):
            raise _UnknownError


def _is_library(value: Any) -> bool:
    known = type(value) is types.ModuleType and value.__name__ in _LIBRARIES
    return known and sys.modules.get(value.__name__) is value


def _is_of_library(value: Any) -> bool:
    """Whether an attribute of a library module or of a tensor is defined by the library itself."""
    if isinstance(value, property | types.GetSetDescriptorType | types.MethodDescriptorType):
        return True
    home = str(getattr(value, "__module__", None) or "torch").partition(".")[0]
    known = value in (math.pi, math.e, math.inf, math.tau) if type(value) is float else False
    return known or type(value) is torch.dtype or (callable(value) and home in ("math", "torch"))
