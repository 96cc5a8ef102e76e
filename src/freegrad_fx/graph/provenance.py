"""Where a node of a graph comes from: the module that owns it and the line of the user's code.

Written while a graph is captured, read when sites are named. Plain text only, so that it survives pickling.
"""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType

import torch
from torch import fx

__all__ = ["META", "Origin", "caller", "innermost", "is_users", "is_users_file", "origin"]

META = "freegrad_fx"
"""The key of this package's entry in ``node.meta``."""

_OURS = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    "<",
)
_MODULES = os.path.join(os.path.dirname(torch.__file__), "nn") + os.sep


@dataclass(frozen=True)
class Origin:
    """Where a node comes from.

    Attributes:
        owner: The dotted path of the innermost module that made it; ``""`` for the root.
        source: ``file:line`` of the user's code; ``""`` where it is not known.
        owner_type: The class of that module, where the graph does not come with the modules.
        parameter: Of an input that is a parameter of the model: its dotted names, the first canonical.
        call: How many sites of the same op and owner come before it, where the graph is a part of the program alone.
    """

    owner: str = ""
    source: str = ""
    owner_type: type | None = None
    parameter: tuple[str, ...] = ()
    call: int | None = None


def origin(node: fx.Node) -> Origin:
    """The origin written on a node; an empty one where there is none."""
    found = node.meta.get(META)
    return found if isinstance(found, Origin) else Origin()


def is_users(code: CodeType) -> bool:
    """Whether code is neither PyTorch's nor this package's."""
    return is_users_file(code.co_filename)


# Cached by name: code objects that differ only in their file compare equal
@functools.lru_cache(maxsize=4096)
def is_users_file(name: str) -> bool:
    """Whether a file is neither PyTorch's nor this package's."""
    return not name.startswith(_OURS)


def caller() -> str:
    """``file:line`` of the innermost frame that is neither PyTorch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""


def innermost(traceback: TracebackType | None) -> str:
    """``file:line`` of the innermost frame of a traceback that is the user's; of PyTorch's modules if none is."""
    users, modules = "", ""
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if is_users(code):
            users = f"{code.co_filename}:{traceback.tb_lineno}"
        elif code.co_filename.startswith(_MODULES):
            modules = f"{code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return users or modules
