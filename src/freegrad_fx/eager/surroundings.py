"""What the code of a module reads besides its arguments and its own attributes: values of its class and its file.

A graph of the code holds such values as constants, so that it is for these values only.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn

from ..graph.provenance import is_users

__all__ = ["is_constant", "is_known", "values_read", "without_decorators"]

_CONSTANTS = (int, float, str, type(None), torch.dtype, torch.device)

_FIXED = frozenset({"torch", "math", "builtins", "operator", "_operator", "typing"})
"""Packages whose functions return the same for the same arguments, but for the questions that a capture records."""

_IMPLICIT = ("__init__", "__new__", "__call__", "__getattr__", "__getattribute__")
"""Methods that code calls without their names."""

_Place: TypeAlias = tuple[Any, str, Any]
"""What holds a value, the name of the value in it, and the value when the place was found."""

_places: dict[Any, tuple[_Place, ...]] = {}


def is_constant(value: Any) -> bool:
    """Whether a graph can hold a value as a constant."""
    return isinstance(value, _CONSTANTS) or (
        isinstance(value, tuple) and all(map(is_constant, value))
    )


def is_known(value: Any) -> bool:
    """Whether all that code can read from a value is a constant, or among what `values_read` returns."""
    if isinstance(value, _CONSTANTS):
        return True
    if isinstance(value, tuple):
        return all(map(is_known, value))
    return (
        isinstance(value, type | ModuleType)
        or _is_fixed(value)
        or any(True for _ in _functions_in(value))
    )


def values_read(kind: type[nn.Module], forward: Callable[..., Any]) -> dict[str, Any]:
    """The values that the code of a class reads now, by name, except for what belongs to PyTorch and Python.

    Args:
        kind: The class.
        forward: Its forward, which can be replaced in the class at present.
    """
    key = kind, forward
    if key not in _places:
        _places[key] = tuple(_found(kind, forward))
    now = [(name, _value(holder, name), before) for holder, name, before in _places[key]]
    for _, value, before in now:
        if value is not before and not (is_constant(value) and is_constant(before)):
            _places[key] = tuple(_found(kind, forward))  # another function reads other values
            now = [(name, value, value) for _, name, value in _places[key]]
            break
    return {f"{number} {name}": value for number, (name, value, _) in enumerate(now)}


def _value(holder: Any, name: str) -> Any:
    """What code gets that reads a name from a dict, from a variable of an enclosing function, or from an object."""
    if isinstance(holder, dict):
        return holder.get(name)
    if isinstance(holder, CellType):
        try:
            return holder.cell_contents
        except ValueError:  # it has no value yet
            return None
    if isinstance(holder, FunctionType):
        return getattr(holder, name)
    static = inspect.getattr_static(holder, name, None)
    made = isinstance(static, property | classmethod | staticmethod | functools.cached_property)
    return static if made else without_decorators(getattr(holder, name, None))


def without_decorators(value: Any) -> Any:
    """A function without the decorators of PyTorch and the replacements of this package; other values as they are."""
    while isinstance(value, FunctionType) and not is_users(value.__code__):
        behind = getattr(value, "__wrapped__", None)
        if behind is None:
            break
        value = behind
    return value


def _found(kind: type[nn.Module], forward: Callable[..., Any]) -> Iterator[_Place]:
    """The places from which a forward reads, and all that it calls by a name."""
    names: set[str] = set()
    objects: dict[int, Any] = {id(kind): kind}
    waiting: list[Any] = [forward]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or _is_fixed(value):
            continue
        seen.add(id(value))
        if isinstance(value, tuple):
            waiting += value
        places: list[tuple[Any, str]] = []
        if isinstance(value, type | ModuleType) and id(value) not in objects:
            objects[id(value)] = value
            places += _attributes([value], {*names, *_IMPLICIT})
        for function in _functions_in(value):
            new = {*_names_in(function.__code__)} - names
            names |= new
            places += [*_read_by(function), *_attributes(objects.values(), new)]
        for holder, name in places:
            found = _value(holder, name)
            waiting.append(found)
            if not (isinstance(found, ModuleType) and _is_fixed(found)):
                yield holder, name, found


def _functions_in(value: Any) -> Iterator[FunctionType]:
    """The user's functions in a value: a function, also behind a decorator, or a method or a property of a class."""
    behind = ("fget", "__func__", "__wrapped__")
    attribute = value.func if isinstance(value, functools.cached_property) else None
    for one in (value, attribute, *(getattr(value, name, None) for name in behind)):
        if isinstance(one, FunctionType) and is_users(one.__code__):
            yield one


def _read_by(function: FunctionType) -> Iterator[tuple[Any, str]]:
    """The global variables, variables of enclosing functions, and defaults that a function reads."""
    for name in _globals_in(function.__code__):
        if name in function.__globals__:  # else it is a builtin
            yield function.__globals__, name
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    yield from ((cell, name) for name, cell in cells)
    yield function, "__defaults__"
    yield from ((function.__kwdefaults__, name) for name in function.__kwdefaults__ or ())


def _attributes(objects: Iterable[Any], names: Iterable[str]) -> Iterator[tuple[Any, str]]:
    """The attributes with some names that classes and modules have, without those that classes have from PyTorch."""
    for one in objects:
        holders = one.__mro__ if isinstance(one, type) else (one,)
        for name in names:
            owners = [holder for holder in holders if name in vars(holder)]
            if owners and not _is_fixed(owners[0]):
                yield one, name
            # super() reads from the others
            yield from ((owner, name) for owner in owners[1:] if not _is_fixed(owner))


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes_in(constant)


def _names_in(code: CodeType) -> Iterator[str]:
    """The names of attributes that code can read, also by `getattr` with a text."""
    for one in _codes_in(code):
        yield from one.co_names
        yield from (text for text in one.co_consts if isinstance(text, str) and text.isidentifier())


def _globals_in(code: CodeType) -> Iterable[str]:
    instructions = (step for one in _codes_in(code) for step in dis.get_instructions(one))
    return dict.fromkeys(step.argval for step in instructions if step.opname == "LOAD_GLOBAL")


def _is_fixed(value: Any) -> bool:
    """Whether a module, class or function belongs to PyTorch or Python, and returns what its arguments determine."""
    if isinstance(value, ModuleType):
        name: Any = value.__name__
    elif callable(value) and not isinstance(value, nn.Module):
        owner = getattr(value, "__self__", None)  # the module of a function in C
        name = getattr(value, "__module__", None) or getattr(owner, "__name__", None)
    else:
        return False
    behind = getattr(value, "__wrapped__", None)  # a decorator of PyTorch can hold the user's code
    return behind is None and str(name).partition(".")[0] in _FIXED
