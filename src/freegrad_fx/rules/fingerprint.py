"""What a formula computes, as a text that is the same in every process, where its own code tells all of it."""

from __future__ import annotations

import builtins
import dis
import hashlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["fingerprint"]

_LIBRARIES = ("torch", "math")  # what they compute is known by the versions of torch and of Python
_BUILTINS = frozenset(
    [
        "abs",
        "bool",
        "float",
        "int",
        "isinstance",
        "len",
        "max",
        "min",
        "pow",
        "range",
        "round",
        "sum",
        "tuple",
        "zip",
    ]
)


class _UnknownError(Exception):
    """The code refers to something that may become something else."""


def fingerprint(*functions: Callable[..., Any] | None) -> str | None:
    """A number that differs where what functions compute does; None where their code does not tell it alone.

    It does where it refers to nothing but torch, math and some builtins: a variable or a function outside of it may be
    given another value at any time.
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
        for name in _globals(code):
            known = function.__globals__.get(name, getattr(builtins, name, None))
            if not (_of_library(known) or (name in _BUILTINS and known is getattr(builtins, name))):
                raise _UnknownError
            yield f"{name} {getattr(known, '__module__', '')} {getattr(known, '__name__', '')}"


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


def _of_code(code: types.CodeType) -> Iterator[str]:
    if "ops" in code.co_names:  # torch.ops may hold operators of anybody's
        raise _UnknownError
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars} {code.co_flags}"
    yield f"{code.co_argcount} {code.co_kwonlyargcount} {code.co_exceptiontable.hex()}"
    for constant in code.co_consts:
        if not isinstance(constant, types.CodeType):
            yield f"{type(constant).__name__} {constant!r}"


def _globals(code: types.CodeType) -> Iterator[str]:
    """The names that code looks up outside of itself."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
        elif instruction.opname.startswith(("IMPORT", "STORE_GLOBAL", "STORE_NAME")):
            raise _UnknownError


def _of_library(value: Any) -> bool:
    """Whether something is a module of a library, or what its name stands for in one."""
    if isinstance(value, types.ModuleType):
        name, found = value.__name__, sys.modules.get(value.__name__)
    else:
        name = str(getattr(value, "__module__", ""))
        found = getattr(sys.modules.get(name), str(getattr(value, "__name__", "")), None)
    return found is value and name.partition(".")[0] in _LIBRARIES
