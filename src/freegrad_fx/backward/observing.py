"""Who observes the gradients that the rules of this thread give, such as a `GradientMonitor`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor

__all__ = ["Observer", "observed_by", "observers_of_now", "thread_observers"]

Observer: TypeAlias = Callable[[str, Tensor], None]
"""Called in the backward with the name of a site, and the gradient that its rules give the input of the operation."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.observers: dict[int, Observer] = {}


_thread = _Thread()

# Has an entry as soon as anybody has observed: until then, nobody has to look at a thread
_used: list[bool] = []


def thread_observers() -> tuple[list[bool], object]:
    """What says whether anybody observes, for code in C++ that asks at every site.

    Returns:
        A list that is empty until anybody observes, and the state of the thread, whose ``observers`` are those of now.
    """
    return _used, _thread


def observers_of_now() -> tuple[Observer, ...]:
    """The observers of the sites whose forward runs now."""
    observers = _thread.observers
    return tuple(observers.values()) if observers else ()


@contextmanager
def observed_by(owner: object, observer: Observer) -> Iterator[None]:
    """A context whose sites are observed: in eager code, outside of `torch.func`.

    Args:
        owner: Whose observer it is. Another one of the same owner around this one is not called.
        observer: The observer.
    """
    if not _used:
        _used.append(True)
    before = _thread.observers
    _thread.observers = {**before, id(owner): observer}
    try:
        yield
    finally:
        _thread.observers = before
