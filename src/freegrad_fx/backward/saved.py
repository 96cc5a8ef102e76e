"""Packs what the native node of a call has saved for its backward. Independent of rules and graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .._torch.dispatch import dispatch_modes, function_transforms_active
from .._torch.tensors import saving, saving_hooks
from ..core.contract import Packs

__all__ = ["is_counted", "pack_saved", "packing_counted"]


class _Thread(threading.local):
    def __init__(self) -> None:
        self.counter: tuple[Callable[[Any], Tensor], Callable[[Any], None]] | None = None


_thread = _Thread()


@contextmanager
def packing_counted(
    unpack: Callable[[Any], Tensor], counter: Callable[[Any], None]
) -> Iterator[None]:
    """A context in which nothing is packed: what would be kept is passed to a counter.

    The counter has set hooks for saved tensors, which exclude others.

    Args:
        unpack: Its hook. It has unpacked the tensor in question before the counter is called.
        counter: The counter.
    """
    before, _thread.counter = _thread.counter, (unpack, counter)
    try:
        yield
    finally:
        _thread.counter = before


def is_counted() -> bool:
    """Whether what is saved now is counted, by hooks that save an alias of each tensor in its place."""
    return _counter_of_now() is not None


def _counter_of_now() -> Callable[[Any], None] | None:
    """The counter whose hooks are the innermost ones; None if there is none."""
    hooks = saving_hooks()
    if hooks is None or _thread.counter is None:
        return None
    unpack, counter = _thread.counter
    return counter if unpack == hooks[1] else None


def pack_saved(y: Tensor, x: Tensor, packs: Packs) -> None:
    """Pack the tensors that the node of `y` has saved.

    They stay as they are where others look at them: under hooks for saved tensors, as a checkpoint sets them, under
    dispatch modes and in transforms of `torch.func`.

    Args:
        y: The output of an operation.
        x: Its input. If both have one node, the operation has returned its input, and saved nothing.
        packs: How to pack, and how to unpack.
    """
    node = y.grad_fn
    if node is None or node is x.grad_fn or dispatch_modes() or function_transforms_active():
        return
    counter = _counter_of_now()
    if counter is None and saving_hooks() is not None:
        return  # to look at a tensor could run a checkpoint again
    pack, unpack = packs
    for tensor, register_hooks in saving(node):
        packed = pack(tensor)
        if packed is NotImplemented:
            continue
        if counter is not None:
            counter(packed)
        else:
            register_hooks(_returning(packed), unpack)


def _returning(packed: Any) -> Callable[[Tensor], Any]:
    return lambda tensor: packed
