"""The Python state that the modules of a model hold: what their attributes refer to, and what these objects contain.

A graph does not repeat a change of it, so that code which changes it cannot be part of a graph.
"""

from __future__ import annotations

import collections
import functools
import itertools
import pickle
import random
import sys
import types
from collections.abc import Callable, Container, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._torch.modules import CHILDREN, children_of
from ..graph.state import ATTRIBUTES_OF_EVERY_MODULE, is_python_state

__all__ = ["Attribute", "PythonState", "is_changed", "refill"]

Attribute: TypeAlias = tuple[str, str]
"""The path of a module, and the name of an attribute of it."""

_CONTAINERS = (dict, list, set, collections.deque)
_DEPTH = 6
_MOST_SEARCHED = 256
_ABSENT: Any = object()
_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_Read: TypeAlias = Callable[[Any], Any]
_Write: TypeAlias = Callable[[Any, Any], Any]
_NOT_SEARCHED = (
    type,
    Tensor,
    torch.jit.ScriptModule,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
)


class PythonState:
    """The Python state of a model when the object is created.

    Args:
        root: The model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = {
            path: (module, dict(module.__dict__), dict(children_of(module)))
            for path, module in root.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)
        }
        self._parts: dict[Any, tuple[set[Attribute], _Part]] = {}
        registered = {id(module) for module in root.modules()}
        walked: dict[int, list[_Part]] = {}  # many modules can hold the same configuration
        for path, (_, attributes, _) in self._modules.items():
            for name, value in attributes.items():
                kind = type(value)
                if kind in _ATOMS or name in ATTRIBUTES_OF_EVERY_MODULE:
                    continue
                if kind is tuple and all(type(item) in _ATOMS for item in value):
                    continue
                if id(value) not in walked:
                    walked[id(value)] = list(_parts_of(value, _DEPTH, set(registered)))
                for part in walked[id(value)]:
                    self._parts.setdefault(part.key, (set(), part))[0].add((path, name))

    def changed(
        self, is_traced: Callable[[Any], bool], assigned: Container[Attribute] = ()
    ) -> dict[Attribute, str]:
        """Restore what was changed.

        Args:
            is_traced: Whether a value is traced. An attribute or container that has got one is left as it is.
            assigned: Attributes to ignore.

        Returns:
            For each attribute whose value or contents changed, the change as text. If several modules hold what was
            changed, the path is that of the module that all of them are in.
        """
        found: dict[Attribute, str] = {}
        for holders, part in self._parts.values():
            if part.restored(is_traced) and not all(place in assigned for place in holders):
                for name in sorted({name for _, name in holders}):
                    path = _common([path for path, _ in holders]) if part.write else ""
                    found[path, name] = (
                        f"its forward changes the contents of the attribute {name!r}"
                    )
        for path, (module, before, children) in self._modules.items():
            now = module.__dict__
            for name in list({**before, **now}):
                if name in ATTRIBUTES_OF_EVERY_MODULE or (path, name) in assigned:
                    continue
                old, new = before.get(name, _ABSENT), now.get(name, _ABSENT)
                if not is_changed(old, new) or _has_traced(new, is_traced):
                    continue
                what = "sets" if old is _ABSENT else "deletes" if new is _ABSENT else "changes"
                found[path, name] = f"its forward {what} the attribute {name!r}"
                if old is _ABSENT:
                    del now[name]
                else:
                    now[name] = old
            if children_of(module) != children:
                found[path, CHILDREN] = "its forward changes its submodules"
                refill(children_of(module), children)
        return found


class _Part:
    """A container, or the state of another object, with a copy of its contents.

    Args:
        value: The object.
        read: Returns a copy of its contents.
        write: Sets the contents; None if that is not possible.
        is_attribute: Whether it is an attribute of a module, or in a plain container that is one.
    """

    def __init__(
        self, value: Any, read: _Read, write: _Write | None, is_attribute: bool = False
    ) -> None:
        self.value, self.before, self.read, self.write = value, read(value), read, write
        self.key = (id(value), read)
        self.is_attribute = is_attribute

    def restored(self, is_traced: Callable[[Any], bool]) -> bool:
        """Whether the contents have changed; they are restored."""
        now = self.read(self.value)
        if not _contents_changed(self.before, now):
            return False
        if self.is_attribute and _has_traced(now, is_traced):
            return False  # listed as lost
        if self.write is not None:
            self.write(self.value, self.before)
        return True


def refill(container: Any, before: Any) -> None:
    """Give a container the contents of a copy."""
    container.clear()
    if isinstance(container, dict | set):
        container.update(before)
    else:
        container.extend(before)


def is_changed(old: Any, new: Any) -> bool:
    """Whether a value was replaced by another one. Equal numbers, texts and containers of them are the same."""
    if old is new or type(old) is not type(new):
        return old is not new
    if type(old) in (list, tuple):
        return len(old) != len(new) or any(map(is_changed, old, new))
    if type(old) is dict:
        return list(old) != list(new) or any(map(is_changed, old.values(), new.values()))
    same = is_python_state(old) and is_python_state(new) and old == new
    return not (same or (type(old) is float and old != old and new != new))


def _parts_of(value: Any, depth: int, seen: set[int], is_attribute: bool = True) -> Iterator[_Part]:
    """The containers and the other changeable objects in a value."""
    kind: Any = type(value)
    if depth < 0 or kind in _ATOMS or isinstance(value, _NOT_SEARCHED) or id(value) in seen:
        return
    seen.add(id(value))
    items: list[Any] = []
    if isinstance(value, _CONTAINERS):
        yield _Part(value, _copied, refill, is_attribute)
        items += _items(value)
    elif isinstance(value, tuple):
        items += value
    else:
        is_attribute = False
        if kind in _STATES:
            yield _Part(value, *_STATES[kind])
        elif kind.__module__.startswith("numpy.random"):
            yield _Part(value, _state_of_numpy, _set_state_of_numpy)
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict:
        yield _Part(attributes, _copied, refill)
        items += attributes.values()
    if _slots(kind):
        yield _Part(value, _read_slots, _write_slots)
        items += _read_slots(value).values()
    for item in items if len(items) <= _MOST_SEARCHED else ():
        yield from _parts_of(item, depth - 1, seen, is_attribute)


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value)


def _items(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value)


def _state_of_numpy(value: Any) -> bytes:
    # A RandomState has the state of an old generator, a Generator has that of its bit generator
    get_state = getattr(value, "get_state", None)
    return pickle.dumps(get_state() if get_state else value.bit_generator.state)


def _set_state_of_numpy(value: Any, before: bytes) -> None:
    if hasattr(value, "set_state"):
        value.set_state(pickle.loads(before))
    else:
        value.bit_generator.state = pickle.loads(before)


# Iterators cannot be set back
_STATES: dict[type[Any], tuple[_Read, _Write | None]] = {
    random.Random: (random.Random.getstate, random.Random.setstate),
    torch.Generator: (
        lambda generator: generator.get_state().tolist(),
        lambda generator, before: generator.set_state(torch.tensor(before, dtype=torch.uint8)),
    ),
    itertools.count: (repr, None),
    **{
        type(iter(kind())): (lambda iterator: iterator.__length_hint__(), None)
        for kind in (list, tuple, dict, set)
    },
}


@functools.lru_cache(maxsize=4096)
def _slots(kind: Any) -> tuple[str, ...]:
    """The slots of a class that neither Python nor PyTorch defines."""
    found: list[str] = []
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if package not in sys.stdlib_module_names and package != "torch":
            names = vars(base).get("__slots__", ())
            found += [names] if isinstance(names, str) else names
    return tuple(name for name in found if not name.startswith("__"))


def _read_slots(value: Any) -> dict[str, Any]:
    kind: Any = type(value)
    slots = _slots(kind)
    return {n: v for n in slots if (v := getattr(value, n, _ABSENT)) is not _ABSENT}


def _write_slots(value: Any, before: dict[str, Any]) -> None:
    for name, old in before.items():
        object.__setattr__(value, name, old)


def _contents_changed(before: Any, now: Any) -> bool:
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = zip((*before.items(),), (*now.items(),), strict=False)
        return len(before) != len(now) or any(
            is_changed(a, b) or is_changed(x, y) for (a, x), (b, y) in pairs
        )
    if isinstance(before, list) and isinstance(now, list):
        return len(before) != len(now) or any(map(is_changed, before, now))
    return bool(before != now)


def _has_traced(value: Any, is_traced: Callable[[Any], bool], depth: int = 3) -> bool:
    if is_traced(value):
        return True
    if depth < 0 or not isinstance(value, (*_CONTAINERS, tuple)):
        return False
    return any(_has_traced(item, is_traced, depth - 1) for item in _items(value))


def _common(paths: list[str]) -> str:
    """The path of the innermost module that contains all modules with some paths."""
    if "" in paths:
        return ""
    parts = zip(*(path.split(".") for path in paths), strict=False)
    same = itertools.takewhile(lambda names: len(set(names)) == 1, parts)
    return ".".join(names[0] for names in same)
