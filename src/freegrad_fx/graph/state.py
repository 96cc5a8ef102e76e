"""Module state other than parameters and buffers: tensors in Python objects, and plain Python values."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.modules import CHILDREN

__all__ = ["ATTRIBUTES_OF_EVERY_MODULE", "collect_tensors", "is_python_state", "tensors_in"]


ATTRIBUTES_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
"""The instance attributes that every `nn.Module` has."""


def tensors_in(value: Any) -> dict[int, Tensor]:
    """The tensors in a value, keyed by `id`.

    Containers, closures and default arguments of functions, and modules are searched recursively.
    """
    found: dict[int, Tensor] = {}
    collect_tensors(value, found, set())
    return found


def collect_tensors(value: Any, found: dict[int, Any], seen: set[int]) -> None:
    """Add the tensors in a value to `found`, keyed by `id`.

    Args:
        value: See `tensors_in`.
        found: The result; it is extended.
        seen: The `id` of each object that has been searched already; it is extended.
    """
    if isinstance(value, Tensor):
        found[id(value)] = value
        return
    items: Iterable[Any] = ()
    if isinstance(value, dict):
        items = value.values()
    elif isinstance(value, list | tuple | set):
        items = value
    elif isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if c != _EMPTY]
        items = (*cells, value.__defaults__, value.__kwdefaults__)
    elif isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule):
        # a module that is not registered, for example one in a list
        items = [v for m in value.modules() for k, v in m.__dict__.items() if k != CHILDREN]
    else:
        return
    if id(value) not in seen:  # objects can refer to each other in a cycle
        seen.add(id(value))
        for item in items:
            collect_tensors(item, found, seen)


_EMPTY = types.CellType()


def is_python_state(value: Any) -> bool:
    """Whether a value is None, a number, a str, bytes, or a built-in container of only such values."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind in (list, tuple, set, frozenset):
        return all(map(is_python_state, value))
    return kind is dict and all(map(is_python_state, [*value, *value.values()]))


_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
