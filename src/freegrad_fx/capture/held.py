"""What a model holds: the contents of its modules, containers and helper objects, to compare and to restore."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import exporting
from .._torch.modules import BUFFERS, CHILDREN, PARAMETERS, derived
from .._torch.tensors import version
from .outside import is_library
from .python_state import refill

__all__ = ["MISSING", "Change", "Held"]

MISSING: Any = object()
"""Stands for an entry that a container does not have."""

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (dict, list, set, collections.deque)
_NOT_SEARCHED = (type, FunctionType, MethodType, ModuleType, Tensor, *_NUMBERS)


@dataclass(frozen=True)
class Change:
    """A change of an entry in something that a model holds.

    Attributes:
        path: The path of the module through which the entry is reached.
        name: The attribute of the module through which it is reached.
        module: The module, if the entry is an attribute of it, or a buffer, parameter or submodule.
        before: The value before; `MISSING` if the entry did not exist.
        after: The value after; `MISSING` if the entry does not exist any more.
    """

    path: str
    name: str
    module: nn.Module | None
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path or 'the root'}: the attribute {self.name!r}"


@dataclass(frozen=True)
class _Holder:
    path: str
    name: str
    module: nn.Module | None
    value: Any
    before: Any


class Held:
    """What a model holds when the object is created.

    The modules are searched, and the containers and objects that their attributes refer to, but not objects whose
    class is PyTorch's, NumPy's or Python's own.

    Args:
        root: The model.
        tensors: Whether in-place changes of tensors are noted and undone too. Parameters and buffers are left out.
        besides: Attributes that are not where a module has them: the path of the module, the name and the value.
    """

    def __init__(
        self, root: nn.Module, tensors: bool = False, besides: Iterable[tuple[str, str, Any]] = ()
    ) -> None:
        self._seen: set[int] = set()
        self._holders: list[_Holder] = []
        self._arrays: list[tuple[str, str, Any, Any]] = []
        self._tensors: dict[int, tuple[str, str, Tensor, Any, Tensor]] = {}
        self._leaves: dict[int, tuple[str, str, Tensor, bool, Any]] = {}
        self._clones = tensors
        for path, module in root.named_modules():
            self._add_module(module, path)
        for path, name, value in besides:
            self._add(value, path, name)

    def changes(self) -> list[Change]:
        """What differs now."""
        found: list[Change] = []
        for holder in self._holders:
            found += (c for c in _compared(holder) if not derived(c.module, c.name))
        for path, name, array, before in self._arrays:
            if array.tobytes() != before.tobytes():
                found.append(Change(path, name, None, before, array))
        for path, name, tensor, number, _ in self._tensors.values():
            if version(tensor) != number:
                found.append(Change(path, name, None, tensor, tensor))
        for path, name, tensor, requires_grad, grad in self._leaves.values():
            if tensor.is_leaf and (
                tensor.requires_grad != requires_grad or tensor.grad is not grad
            ):
                found.append(Change(path, name, None, tensor, tensor))
        return found

    def restore(self) -> None:
        """Restore the contents."""
        for holder in self._holders:
            if _compared(holder):
                _fill(holder.value, holder.before)
        for _, _, array, before in self._arrays:
            if array.tobytes() != before.tobytes():
                array[...] = before
        for _, _, tensor, number, before in self._tensors.values():
            if version(tensor) != number:
                with torch.no_grad():
                    tensor.copy_(before)

    # -- the search

    def _add_module(self, module: nn.Module, path: str) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self._hold(module.__dict__, path, "", module)
        for name, value in module.__dict__.items():
            if name in _TABLES and type(value) in (dict, collections.OrderedDict):
                self._seen.add(id(value))
                self._hold(value, path, "", module)
                for key, tensor in value.items():
                    if isinstance(tensor, Tensor) and tensor.is_leaf:
                        grad = tensor.grad
                        self._leaves[id(tensor)] = (path, key, tensor, tensor.requires_grad, grad)
            else:
                self._add(value, path, name)

    def _add(self, value: Any, path: str, name: str) -> None:
        kind = type(value)
        if isinstance(value, Tensor):
            # A copy would be recorded while a model is exported
            if self._clones and not exporting.is_symbolic(value) and not value.is_inference():
                copied = value.detach().clone()
                self._tensors.setdefault(id(value), (path, name, value, version(value), copied))
            return
        if issubclass(kind, _NOT_SEARCHED) or id(value) in self._seen:
            return
        if isinstance(value, nn.Module):  # one that is not registered
            if not isinstance(value, torch.jit.ScriptModule):
                self._add_module(value, f"{path}.{name}" if path else name)
            return
        if isinstance(value, tuple):
            for item in value:
                self._add(item, path, name)
        elif isinstance(value, _CONTAINERS):
            self._seen.add(id(value))
            self._hold(value, path, name)
            for item in list(value.values() if isinstance(value, dict) else value):
                self._add(item, path, name)
        elif _is_array(value):
            self._seen.add(id(value))
            self._arrays.append((path, name, value, value.copy()))
        elif not is_library(kind.__module__) and (attributes := _attributes(value)):
            self._seen.add(id(value))
            self._hold(value, path, name)
            for item in attributes.values():
                self._add(item, path, name)

    def _hold(self, value: Any, path: str, name: str, module: nn.Module | None = None) -> None:
        self._holders.append(_Holder(path, name, module, value, _contents(value)))


_TABLES = (PARAMETERS, BUFFERS, CHILDREN)


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, in its ``__dict__`` and its slots."""
    found = {
        name: getattr(value, name)
        for kind in type(value).__mro__
        for name in (vars(kind).get("__slots__") or ())
        if not name.startswith("__") and hasattr(value, name)
    }
    return {**found, **getattr(value, "__dict__", {})}


def _contents(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, _CONTAINERS) else _attributes(value)


def _compared(holder: _Holder) -> list[Change]:
    before, after = holder.before, _contents(holder.value)
    if isinstance(before, dict):
        keys = dict.fromkeys([*before, *after])
        changed = [k for k in keys if _differ(before.get(k, MISSING), after.get(k, MISSING))]
        return [
            Change(
                holder.path,
                holder.name or str(key),
                holder.module,
                before.get(key, MISSING),
                after.get(key, MISSING),
            )
            for key in changed
        ]
    if isinstance(holder.value, set):
        equal = set(before) == set(after)
    else:
        equal = len(before) == len(after) and not any(map(_differ, before, after))
    return [] if equal else [Change(holder.path, holder.name, None, before, after)]


def _differ(before: Any, after: Any) -> bool:
    """Whether two values differ; equal numbers, texts and plain containers do not."""
    if before is after:
        return False
    if type(before) is not type(after):
        return True
    if type(before) in _NUMBERS:
        return bool(before != after and (before == before or after == after))
    if isinstance(before, tuple | list):
        return len(before) != len(after) or any(map(_differ, before, after))
    if type(before) in (dict, collections.OrderedDict):
        return list(before) != list(after) or any(map(_differ, before.values(), after.values()))
    if type(before) in (set, frozenset):
        return bool(before != after)
    return True


def _fill(value: Any, before: Any) -> None:
    """Give a container or an object its former contents."""
    if isinstance(value, _CONTAINERS):
        refill(value, before)
    else:
        for name in _attributes(value).keys() - before.keys():
            object.__delattr__(value, name)
        for name, old in before.items():
            object.__setattr__(value, name, old)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray and value.dtype != object
