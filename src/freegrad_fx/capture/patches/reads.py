"""Reads of the attributes of modules while a model is traced, also by `hasattr`, `getattr` and `vars`."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch import nn

from ..._torch.replacing import replaced
from ...graph.provenance import is_users
from ...graph.state import ATTRIBUTES_OF_EVERY_MODULE
from ..python_state import Attribute

__all__ = ["collected_reads", "noted_reads", "reader"]

_OF_EVERY_MODULE = (ATTRIBUTES_OF_EVERY_MODULE | frozenset(dir(nn.Module))) - {"__dict__"}


def noted_reads(
    note: Callable[[nn.Module, str], None],
) -> contextlib.AbstractContextManager[None]:
    """Call `note` for each attribute that is read, also by `hasattr`, `getattr` and `vars`.

    Attributes that every module has are left out. The ``__dict__``, and names that are not in it, are noted only where
    user code asks for them.
    """
    thread = threading.get_ident()

    def noting(get: Callable[[nn.Module, str], Any]) -> Callable[[nn.Module, str], Any]:
        def read(module: nn.Module, name: str) -> Any:
            if name in _OF_EVERY_MODULE:
                return get(module, name)
            there = name != "__dict__" and name in get(module, "__dict__")
            if (there or is_users(sys._getframe(1).f_code)) and threading.get_ident() == thread:
                note(module, name)
            return get(module, name)

        return read

    return replaced(nn.Module, "__getattribute__", noting, asks_for_thread=True)


def reader(frame: FrameType) -> FrameType:
    """The frame that reads an attribute, given the innermost one, which can be that of `noted_reads`."""
    back = frame.f_back
    return back if frame.f_code.co_filename == __file__ and back is not None else frame


@contextlib.contextmanager
def collected_reads(root: nn.Module) -> Iterator[dict[Attribute, None]]:
    """Collect the attributes of the modules of a model that are read."""
    found: dict[Attribute, None] = {}
    # torch.export can call a module by an object that has the dict of the module
    paths = {id(module.__dict__): path for path, module in root.named_modules()}

    def note(module: nn.Module, name: str) -> None:
        path = paths.get(id(object.__getattribute__(module, "__dict__")))
        if path is not None:
            found[path, name] = None

    with noted_reads(note):
        yield found
