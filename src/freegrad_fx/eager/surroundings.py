"""What the code of a module reads besides its arguments and its own attributes: values of its class and its file.

A graph of the code holds such values as constants, so that it is for these values only.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from ..graph.provenance import is_users

__all__ = ["PLAIN", "values_read"]

PLAIN = (int, float, str, type(None), torch.dtype)
"""Types of values that a graph can hold as constants."""

_Place = tuple[Mapping[str, Any], str]

_places: dict[Any, tuple[_Place, ...]] = {}


def values_read(kind: type[nn.Module], forward: Callable[..., Any]) -> dict[str, Any]:
    """The values that the code of a class reads now, by name, without modules, classes and functions of libraries.

    Args:
        kind: The class.
        forward: Its forward, which can be replaced in the class at present.
    """
    if (kind, forward) not in _places:
        _places[kind, forward] = tuple(_found(kind, forward))
    found: dict[str, Any] = {}
    for number, (mapping, name) in enumerate(_places[kind, forward]):
        value = mapping.get(name)
        if _is_own(value) or not (callable(value) or isinstance(value, types.ModuleType)):
            found[f"{number} {name}"] = value
    return found


def _is_own(value: Any) -> bool:
    return isinstance(value, FunctionType) and is_users(value.__code__)


def _found(kind: type[nn.Module], forward: Callable[..., Any]) -> Iterator[_Place]:
    waiting: list[Any] = [forward]
    seen: set[int] = set()
    while waiting:
        function = waiting.pop()
        function = getattr(function, "fget", getattr(function, "__func__", function))
        if id(function) in seen or not isinstance(function, FunctionType) or not _is_own(function):
            continue
        seen.add(id(function))
        places = [(function.__globals__, name) for name in _globals_in(function.__code__)]
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        places += [(_Cell(cell), name) for name, cell in cells]
        for mapping, name in places:
            if name in mapping:  # else it is a builtin
                yield mapping, name
                waiting.append(mapping.get(name))
        # What it takes from the module can be a method or a property
        for name in function.__code__.co_names:
            value = inspect.getattr_static(kind, name, _MISSING)
            waiting.append(value)
            if isinstance(value, PLAIN):
                yield _OfClass(kind), name


_MISSING = object()


class _OfClass(dict[str, Any]):
    """The attributes of a class."""

    def __init__(self, kind: type[Any]) -> None:
        super().__init__()
        self._kind = kind

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self._kind, name, default)


class _Cell(dict[str, Any]):
    """A variable of an enclosing function, by any name."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self._cell = cell

    def __contains__(self, name: object) -> bool:
        return True

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:  # it has no value yet
            return default


def _globals_in(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_in(constant)
