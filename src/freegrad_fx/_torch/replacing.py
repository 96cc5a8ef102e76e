"""Replacements of attributes of PyTorch and Python.

`replaced` makes temporary replacements for one thread: the attribute holds a function that looks up the calling thread,
and other threads get the original. Replacements can be nested, can end in any order, and end when an error is raised.
`replace_for_good` makes permanent replacements in all threads.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Make", "Replacement", "all_replaced", "replace_for_good", "replaced", "replacements"]


@dataclass(eq=False)
class Replacement:
    """An active replacement.

    Attributes:
        owner: The module or class whose attribute is replaced.
        name: The name of the attribute.
        value: The replacement.
        thread: The thread for which it is active; None for a permanent replacement in all threads.
        asks: Whether it asks itself for the thread that calls it.
        make: Made it from the value before.
    """

    owner: Any
    name: str
    value: Any
    thread: int | None
    asks: bool = False
    make: Any = None


_ABSENT: Any = object()


@dataclass(eq=False)
class _Slot:
    """An attribute that is replaced."""

    owner: Any
    name: str
    raw: Any = _ABSENT  # the value in the owner itself, not in its bases
    original: Any = None
    placed: Any = _ABSENT  # the value in the owner since it is replaced
    dispatches: bool = (
        False  # whether the attribute holds a function that looks up the calling thread
    )
    entries: tuple[Replacement, ...] = ()  # never changed in place, because other threads read it

    def place(self, value: Any) -> None:
        """Put a value into the owner."""
        setattr(self.owner, self.name, value)
        self.placed = value

    def is_placed(self) -> bool:
        """Whether the owner still has the value; else the program has put another one there, which it keeps."""
        return vars(self.owner).get(self.name, _ABSENT) is self.placed

    def now(self) -> Any:
        """The value for the calling thread."""
        thread = threading.get_ident()
        for entry in reversed(self.entries):
            if entry.thread == thread:
                return entry.value
        return self.original


_slots: dict[tuple[int, str], _Slot] = {}
_for_good: list[Replacement] = []
_lock = threading.Lock()


def replacements() -> tuple[Replacement, ...]:
    """The active replacements of all threads."""
    with _lock:
        return (*_for_good, *(entry for slot in _slots.values() for entry in slot.entries))


def replace_for_good(owner: Any, name: str, value: Any) -> None:
    """Replace an attribute for the rest of the process, in all threads."""
    with _lock:
        setattr(owner, name, value)
        _for_good.append(Replacement(owner, name, value, None))


Make: TypeAlias = Callable[[Any], Any]
"""Returns a replacement, given the value for this thread so far."""


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Make, *, asks_for_thread: bool = False) -> Iterator[None]:
    """Replace an attribute while the block runs, for the thread that runs it.

    Args:
        owner: A module, a class, or an object with attributes of its own.
        name: The name of a function in it, or of an attribute of its instances, which is replaced by a property.
        make: Returns the replacement, given the value for this thread so far: a function, which is called with one
            frame between its caller and itself, or a property.
        asks_for_thread: Whether the replacement itself passes calls of other threads on to the original. It is then
            called without a frame in between, which is faster.
    """
    with _lock:
        entry = _begin(owner, name, make, asks_for_thread)
    try:
        yield
    finally:
        with _lock:
            _end(entry)


@contextlib.contextmanager
def all_replaced(wanted: Iterable[tuple[Any, str, Make]]) -> Iterator[None]:
    """`replaced` for many attributes at once, each an owner, a name and a ``make``, which takes less time."""
    entries: list[Replacement] = []
    try:
        with _lock:
            for owner, name, make in wanted:
                entries.append(_begin(owner, name, make, False))
        yield
    finally:
        with _lock:
            for entry in reversed(entries):
                _end(entry)


def _begin(owner: Any, name: str, make: Make, asks_for_thread: bool) -> Replacement:
    key = (id(owner), name)
    slot = _slots.get(key)
    if slot is None:
        slot = _Slot(owner, name, vars(owner).get(name, _ABSENT), getattr(owner, name, None))
    dispatches = slot.dispatches or not asks_for_thread
    before = slot.now() if dispatches else getattr(owner, name)
    entry = Replacement(owner, name, make(before), threading.get_ident(), asks_for_thread, make)
    if not dispatches:
        slot.place(entry.value)
    elif not slot.dispatches:
        slot.place(_dispatcher(slot, entry.value))
    slot.dispatches = dispatches
    _slots[key] = slot
    slot.entries = (*slot.entries, entry)
    return entry


def _end(entry: Replacement) -> None:
    owner, name = entry.owner, entry.name
    slot = _slots[id(owner), name]
    innermost = slot.entries[-1] is entry
    slot.entries = tuple(other for other in slot.entries if other is not entry)
    if not slot.entries:
        del _slots[id(owner), name]
        if not slot.is_placed():
            return
        if slot.raw is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, slot.raw)
        return
    last = slot.entries[-1]
    if all(other.asks and other.thread == last.thread for other in slot.entries):
        slot.dispatches = False
    if not slot.dispatches:
        if not innermost:
            _remake(slot)
        if slot.is_placed():
            slot.place(last.value)


def _remake(slot: _Slot) -> None:
    """Make the replacements again, each around the one before: one that has ended is no longer among them."""
    before = slot.original
    for entry in slot.entries:
        entry.value = entry.make(before)
        bind = getattr(entry.value, "__get__", None)
        before = bind(None, slot.owner) if bind and inspect.isclass(slot.owner) else entry.value


def _dispatcher(slot: _Slot, value: Any) -> Any:
    """The value of an attribute while it is replaced."""
    if isinstance(value, property):
        return property(*_accessors(slot))
    if inspect.isclass(slot.owner) and isinstance(
        inspect.getattr_static(slot.owner, slot.name, None), staticmethod | classmethod
    ):
        return staticmethod(_Static(slot))
    thread_of_now = threading.get_ident

    def call(*args: Any, **kwargs: Any) -> Any:
        # The usual case needs no further call, because isinstance() is one of the replaced functions
        entries = slot.entries
        if entries and entries[-1].thread == thread_of_now():
            return entries[-1].value(*args, **kwargs)
        return slot.now()(*args, **kwargs)

    with contextlib.suppress(AttributeError, TypeError):
        functools.update_wrapper(call, slot.original)
    return call


class _Static:
    """Replaces a static method, and has the code attributes of the method, by which PyTorch binds keywords."""

    def __init__(self, slot: _Slot) -> None:
        functools.update_wrapper(self, slot.original)
        self._slot = slot
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            if hasattr(slot.original, name):
                setattr(self, name, getattr(slot.original, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._slot.now()(*args, **kwargs)


def _is_data_descriptor(value: Any) -> bool:
    return inspect.isdatadescriptor(value)


def _accessors(slot: _Slot) -> tuple[Callable[[Any], Any], Callable[[Any, Any], None]]:
    """Functions that read and write an attribute in the ``__dict__`` of instances."""

    def read(instance: Any) -> Any:
        found: Any = slot.now()
        if _is_data_descriptor(found):  # a property, or an attribute that is written in C
            return found.__get__(instance, type(instance))
        try:
            return instance.__dict__[slot.name]
        except KeyError:
            raise AttributeError(slot.name) from None

    def write(instance: Any, value: Any) -> None:
        original: Any = slot.original
        if _is_data_descriptor(original):
            original.__set__(instance, value)
        else:
            instance.__dict__[slot.name] = value

    return read, write
