"""What the forward of a model can reach outside of the model: no traced value may be left there by a capture.

A forward can store a tensor in a global, a closure, a class or a cache. While a model is captured this tensor is a
proxy or a fake tensor, which the original model would then use at its next call.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.fx.proxy import Proxy

from .._torch.replacing import replaced
from ..errors import CaptureError
from ..graph.provenance import is_users
from ..graph.state import is_python_state
from .inventory import compared_by_identity
from .python_state import is_changed, refill

__all__ = ["CACHE", "Outside", "is_library", "is_proxy", "keeps_state", "refuse_own_modules"]

IsTraced = Callable[[Any], bool]

CACHE: Any = type(functools.lru_cache(maxsize=1)(lambda: None))
"""The type of a function with a `functools` cache."""

_BOUND = (staticmethod, classmethod)
_MISSING: Any = object()
_CONTAINERS = (dict, list, set, collections.deque)
_DEPTH = 4


class Outside:
    """What the code of a model's classes can reach, with the contents when the object is created.

    Args:
        model: The model.
        root: Its copy, which is captured. Only functions that are defined outside of PyTorch are followed, through the
            globals that their code names, their closures, default arguments and attributes.

    Attributes:
        own_modules: Where the code finds modules of `model`, for which the capture has copies.
        asks_identity: Whether one of these functions may call `id`.
        compares_identity: Whether one of these functions contains `is`, with something other than None. Python does not
            ask a proxy for the result.
        compares_variables: Whether one of them compares with `is` what is not a constant.
    """

    def __init__(self, model: nn.Module, root: nn.Module) -> None:
        self.compares_identity = self.compares_variables = self.asks_identity = False
        self.own_modules: list[str] = []
        modules, originals = [*root.modules()], [*model.modules()]
        self._originals = dict(zip(map(id, modules), originals, strict=False))
        self._own = {*map(id, originals)} - self._originals.keys()
        self._caches: dict[int, tuple[str, Any]] = {}
        self._containers: dict[int, tuple[str, Any, Any]] = {}
        self._globals: dict[tuple[int, str], tuple[str, dict[str, Any], Any]] = {}
        self._cells: dict[int, tuple[str, CellType, Any]] = {}
        self._classes: dict[type[Any], dict[str, Any]] = {}
        # Other packages than the model's count calls and keep memos; a change there is no state of the model
        kinds = dict.fromkeys(map(type, modules))
        self._packages = {kind.__module__.partition(".")[0] for kind in kinds}
        self._foreign: set[int] = set()
        self._in_foreign_code = False
        self._seen: set[int] = {id(value) for m in modules for value in (m, m.__dict__)}
        for kind in kinds:
            self._add_class(kind)

    def restore(self, is_traced: IsTraced) -> list[str]:
        """Restore what contains traced values, and empty the caches of functions that do.

        Returns:
            The names of what was restored. Caches are not listed: a cache may forget a result at any time.
        """
        found: list[str] = []
        for _, cache in self._caches.values():
            if _contains(gc.get_referents(cache), is_traced):
                cache.cache_clear()
        for (_, key), (name, space, before) in self._globals.items():
            if (now := space.get(key)) is not before and _contains(now, is_traced):
                found.append(f"the global {name}")
                _set_or_delete(space, key, before)
        for name, cell, before in self._cells.values():
            now = _contents(cell)
            if now is not before and _contains(now, is_traced):
                found.append(name)
                if before is _MISSING:
                    del cell.cell_contents
                else:
                    cell.cell_contents = before
        for kind, before in self._classes.items():
            for key, now in list(vars(kind).items()):
                old = before.get(key, _MISSING)
                if now is not old and _contains(now, is_traced):
                    found.append(f"the class attribute {kind.__name__}.{key}")
                    _set_or_delete_attribute(kind, key, old)
        for name, container, before in self._containers.values():
            if _contains(container, is_traced, 2) and not _contains(before, is_traced, 2):
                found.append(name)
                refill(container, before)
        return list(dict.fromkeys(found))

    def left(self, is_traced: IsTraced) -> list[str]:
        """Restore what a forward stored or changed outside of the model, and say what it did, as clauses."""
        return [
            *(f"stores a tensor in {where}" for where in self.restore(is_traced)),
            *(f"changes {where}" for where in self.changed()),
        ]

    def changed(self) -> list[str]:
        """Restore the numbers, texts and containers of them that were changed, and name them."""
        found: list[str] = []
        for (_, key), (name, space, before) in self._globals.items():
            foreign = name.partition(".")[0] not in self._packages
            if not foreign and _differs(before, space.get(key, _MISSING)):
                found.append(f"the global {name}")
                _set_or_delete(space, key, before)
        for name, cell, before in self._cells.values():
            if id(cell) not in self._foreign and _differs(before, _contents(cell)):
                found.append(name)
                cell.cell_contents = before
        for kind, attributes in self._classes.items():
            if kind.__module__.partition(".")[0] not in self._packages:
                continue
            now = dict(vars(kind))
            for key in {**attributes, **now}:
                old = attributes.get(key, _MISSING)
                if not key.startswith("__") and _differs(old, now.get(key, _MISSING)):
                    found.append(f"the class attribute {kind.__name__}.{key}")
                    _set_or_delete_attribute(kind, key, old)
        for name, container, before in self._containers.values():
            foreign = id(container) in self._foreign
            if not foreign and _entries_differ(before, _copied(container)):
                found.append(name)
                refill(container, before)
        return list(dict.fromkeys(found))

    def put_back(self) -> None:
        """Restore everything that can be reached, except caches, to what it was when the object was created."""
        for (_, key), (_, space, before) in self._globals.items():
            if space.get(key, _MISSING) is not before:
                _set_or_delete(space, key, before)
        for _, cell, before in self._cells.values():
            if before is not _MISSING and _contents(cell) is not before:
                cell.cell_contents = before
        for kind, attributes in self._classes.items():
            for key, now in list(vars(kind).items()):
                old = attributes.get(key, _MISSING)
                if now is not old and not key.startswith("__"):
                    _set_or_delete_attribute(kind, key, old)
        for _, container, before in self._containers.values():
            # A class of its own can do more than to store
            if type(container) in _CONTAINERS and not _same_items(container, before):
                refill(container, before)

    @contextlib.contextmanager
    def swapped(self, functions: Mapping[int, Any]) -> Iterator[None]:
        """Put other functions in the place of some, where the code holds one by a name of its own.

        Args:
            functions: The new functions, by the `id` of the function that each replaces.
        """
        undo: list[Callable[[], None]] = []
        try:
            for (_, key), (_, space, value) in self._globals.items():
                if id(value) in functions:
                    space[key] = functions[id(value)]
                    undo.append(functools.partial(space.__setitem__, key, value))
            for _, cell, value in self._cells.values():
                if id(value) in functions:
                    cell.cell_contents = functions[id(value)]
                    undo.append(functools.partial(setattr, cell, "cell_contents", value))
            for kind, attributes in self._classes.items():
                for key, value in attributes.items():
                    if type(value) is staticmethod and id(value.__func__) in functions:
                        setattr(kind, key, staticmethod(functions[id(value.__func__)]))
                        undo.append(functools.partial(setattr, kind, key, value))
            yield
        finally:
            for put_back in undo:
                put_back()

    @contextlib.contextmanager
    def uncached(self) -> Iterator[None]:
        """Let the functions with a `functools` cache compute every result anew while the block runs.

        A result of an earlier call would be a constant of the graph, and one of the trace would be used afterwards.
        Other threads compute anew too, which takes them time but changes nothing.
        """
        undo: list[Callable[[], None]] = []
        try:
            for (_, key), (_, space, value) in self._globals.items():
                if type(value) is CACHE:
                    space[key] = _uncached(value)
                    undo.append(functools.partial(space.__setitem__, key, value))
            for kind, attributes in self._classes.items():
                for key, value in attributes.items():
                    bare = value.__func__ if type(value) in _BOUND else value
                    if type(bare) is CACHE:
                        new = _uncached(bare)
                        setattr(kind, key, type(value)(new) if value is not bare else new)
                        undo.append(functools.partial(setattr, kind, key, value))
            yield
        finally:
            for put_back in undo:
                put_back()

    @contextlib.contextmanager
    def identities(self) -> Iterator[None]:
        """Give a module of the copy the `id` that the model's own module has, while the block runs."""

        def answering(ask: Callable[[Any], int]) -> Callable[[Any], int]:
            def answer(value: Any) -> int:
                identity = ask(value)
                if identity in self._originals and is_users(sys._getframe(2).f_code):
                    return ask(self._originals[identity])
                return identity

            return answer

        with (
            replaced(builtins, "id", answering) if self.asks_identity else contextlib.nullcontext()
        ):
            yield

    # -- what can be reached

    def _add_class(self, kind: type[Any]) -> None:
        for base in kind.__mro__:
            if base in self._classes or is_library(base.__module__):
                continue
            self._classes[base] = dict(vars(base))
            for name, value in self._classes[base].items():
                if not name.startswith("__") or name == "__call__":
                    self._add(value, f"the class attribute {base.__name__}.{name}", _DEPTH)

    def _add(self, value: Any, name: str, depth: int) -> None:
        kind = type(value)
        if kind in _PLAIN or depth < 0 or id(value) in self._seen:
            return
        if id(value) in self._own:
            self.own_modules.append(name)
            return
        if kind in (*_BOUND, MethodType):
            self._add(value.__func__, name, depth)
        elif kind is property:
            self._add(value.fget, name, depth)
        elif kind is FunctionType:
            self._seen.add(id(value))
            if is_users(value.__code__):
                outer = self._in_foreign_code
                package = (value.__module__ or "").partition(".")[0]
                self._in_foreign_code = package not in self._packages
                self._add_function(value)
                self._in_foreign_code = outer
        elif kind is CACHE:
            self._seen.add(id(value))
            self._caches[id(value)] = (name, value)
            self._add(value.__wrapped__, name, depth)
        elif kind is functools.partial:
            self._seen.add(id(value))
            for part in (value.func, *value.args, *value.keywords.values()):
                self._add(part, name, depth - 1)
        elif isinstance(value, _CONTAINERS):
            self._add_container(value, name, depth)
        elif isinstance(value, tuple):
            for item in value:
                self._add(item, name, depth - 1)
        elif isinstance(value, type):
            if not is_library(value.__module__) and not issubclass(value, nn.Module):
                self._add_class(value)
        elif not isinstance(value, ModuleType | Tensor) and not is_library(kind.__module__):
            attributes = getattr(value, "__dict__", None)
            if type(attributes) is dict:
                self._seen.add(id(value))
                self._add_container(attributes, f"an attribute of {name}", depth)
                self._add_class(kind)

    def _add_container(self, value: Any, name: str, depth: int) -> None:
        self._seen.add(id(value))
        if self._in_foreign_code:
            self._foreign.add(id(value))
        copied = _copied(value)
        self._containers[id(value)] = (name, value, copied)
        if isinstance(value, dict) and not self._own.isdisjoint(map(id, copied)):
            self.own_modules.append(name)
        if len(copied) <= _MOST_SEARCHED:
            for item in copied.values() if isinstance(value, dict) else copied:
                self._add(item, name, depth - 1)

    def _add_function(self, function: FunctionType) -> None:
        compared = compared_by_identity(function.__code__)
        self.compares_identity |= not compared <= {None}
        self.compares_variables |= ... in compared
        if not is_library(module := function.__module__ or ""):
            self._add_globals(function.__globals__, module, _names(function.__code__), _DEPTH)
        where = f"of the function {function.__qualname__}"
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            if name != "__class__" and id(cell) not in self._cells:
                contents = _contents(cell)
                if self._in_foreign_code:
                    self._foreign.add(id(cell))
                self._cells[id(cell)] = (f"the variable {name!r} {where}", cell, contents)
                self._add(contents, f"the variable {name!r} {where}", _DEPTH)
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        self._add(defaults, f"a default argument {where}", _DEPTH)
        # The dict of a function is made when it is asked for, and stays
        self._add_container(function.__dict__, f"an attribute {where}", _DEPTH)

    def _add_globals(
        self, space: dict[str, Any], module: str, names: frozenset[str], depth: int
    ) -> None:
        for name in names:
            value = space.get(name, _MISSING)
            self.asks_identity |= name == "id" and value is _MISSING
            if (id(space), name) in self._globals:
                continue
            if isinstance(value, ModuleType):
                if depth and not is_library(value.__name__):
                    self._add_globals(vars(value), value.__name__, names, depth - 1)
                continue
            self._globals[id(space), name] = (f"{module}.{name}", space, value)
            self._add(value, f"the global {module}.{name}", _DEPTH)


def is_proxy(value: Any) -> bool:
    """Whether a value is a proxy. `isinstance`, which a trace replaces, would ask a proxy for its class."""
    return issubclass(type(value), Proxy)


def refuse_own_modules(kind: type[nn.Module], outside: Outside) -> None:
    """Raise `CaptureError` if the code of a model finds the model's own modules outside of the model."""
    if outside.own_modules:
        raise CaptureError(
            f"{kind.__name__} cannot be captured: its code finds a module of the model in {outside.own_modules[0]}. A "
            f"capture runs a copy of the model, which has other modules. Call the model in a block, `with "
            f"freegrad_fx.use(rules, model=model):`, or compile it with freegrad_fx.compile(model, rules): both run "
            f"the model itself. Or find the module in the model."
        )


def keeps_state(kind: type[nn.Module], what: str) -> str:
    """The message of the error for a model whose forward keeps state where a graph cannot, as a clause says."""
    return (
        f"{kind.__name__} cannot be captured: its forward {what}, which a graph would not repeat at each call. Compile "
        f"the model with freegrad_fx.compile(model, rules), which accepts any program; or keep the state in a buffer "
        f"of the model."
    )


_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, object, ModuleType})
_MOST_SEARCHED = 256


def is_library(module: str) -> bool:
    """Whether a module belongs to Python, PyTorch or this package."""
    package = module.partition(".")[0]
    return package in _LIBRARIES or package in sys.stdlib_module_names


_LIBRARIES = ("torch", "numpy", __name__.partition(".")[0])


def _uncached(cache: Any) -> Any:
    return functools.lru_cache(maxsize=0)(cache.__wrapped__)


@functools.lru_cache(maxsize=4096)
def _names_of(key: int, code: CodeType) -> frozenset[str]:
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(code.co_names).union(*map(_names, inner))


def _names(code: CodeType) -> frozenset[str]:
    """The global names and attribute names in a function and the functions that it defines."""
    return _names_of(id(code), code)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return _MISSING


def _copied(value: Any) -> Any:
    """The entries of a container, without those that a subclass of dict computes, or imports, when it is asked."""
    if not isinstance(value, dict):
        return list(value)
    ordered = isinstance(value, collections.OrderedDict)
    kind = collections.OrderedDict if ordered else dict
    return dict(kind.items(value))


def _differs(old: Any, new: Any) -> bool:
    """Whether one of two values is a number or the like, and the other one is missing or another one."""
    plain = [value is _MISSING or is_python_state(value) for value in (old, new)]
    return all(plain) and is_changed(old, new)


def _entries_differ(before: Any, now: Any) -> bool:
    if isinstance(before, dict):
        return any(
            _differs(before.get(k, _MISSING), now.get(k, _MISSING)) for k in {**before, **now}
        )
    return _differs(*([item for item in items if is_python_state(item)] for items in (before, now)))


def _same_items(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        return all(container.get(key, _MISSING) is value for key, value in before.items())
    return all(a is b for a, b in zip(container, before, strict=True))


def _set_or_delete(space: dict[str, Any], key: str, value: Any) -> None:
    if value is _MISSING:
        space.pop(key, None)
    else:
        space[key] = value


def _set_or_delete_attribute(kind: type[Any], key: str, value: Any) -> None:
    if value is _MISSING:
        delattr(kind, key)
    else:
        setattr(kind, key, value)


def _contains(value: Any, is_traced: IsTraced, depth: int = 3) -> bool:
    """Whether a value is traced, or is a plain container with a traced value."""
    if type(value) in _PLAIN:
        return False
    if is_traced(value):
        return True
    if depth <= 0 or not isinstance(value, (*_CONTAINERS, tuple)):
        return False
    if isinstance(value, dict):
        entries = _copied(value)
        items = (*entries, *entries.values())
    else:
        items = (*value,)
    return any(_contains(item, is_traced, depth - 1) for item in items)
