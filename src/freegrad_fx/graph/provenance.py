"""Provenance of graph nodes: the owning module and the line of user code.

Capture writes it to ``node.meta``; site discovery reads it. It holds only plain data, so that it can be pickled.
"""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType

import torch
from torch import fx

__all__ = [
    "META",
    "Origin",
    "caller",
    "innermost",
    "is_library_code",
    "is_users",
    "is_users_file",
    "origin",
]

META = "freegrad_fx"
"""The key of this package's entry in ``node.meta``."""

_OURS = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    # Not every name in brackets: "<stdin>", "<string>" and "<python-input-0>" are the user's
    "<eval_with_key>",  # torch.fx
    "<frozen ",  # Python's own modules
)
# What calls the command line is no code of the user's
_COMMANDS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "cli") + os.sep
_MODULES = os.path.join(os.path.dirname(torch.__file__), "nn") + os.sep


@dataclass(frozen=True)
class Origin:
    """The provenance of a node.

    Attributes:
        owner: The dotted path of the innermost module whose forward created the node; ``""`` for the root.
        source: ``file:line`` of the user code; ``""`` if it is not known.
        owner_type: The class of the owner, if the graph comes without the modules; else None.
        parameter: For a graph input that is a parameter of the model: its dotted names, the canonical name first.
        calls: For each op of a site at the node, the number of sites with the same op and owner that come before it, if
            the graph is only a part of the program; else None.
        function: The name of the autograd.Function whose forward made the node, and whose backward is its own;
            ``""`` for other nodes.
    """

    owner: str = ""
    source: str = ""
    owner_type: type | None = None
    parameter: tuple[str, ...] = ()
    calls: tuple[tuple[str, int], ...] | None = None
    function: str = ""

    def call(self, op: str, otherwise: int) -> int:
        """The number of sites with an op and the owner that come before the node.

        Args:
            op: The op.
            otherwise: The number in the graph, which is returned if the graph is the whole program.
        """
        return otherwise if self.calls is None else dict(self.calls).get(op, otherwise)


def origin(node: fx.Node) -> Origin:
    """The origin of a node; an empty `Origin` if the node has none."""
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


def is_library_code(code: CodeType) -> bool:
    """Whether code is this package's, or PyTorch's outside of the layers and functions in torch.nn."""
    return not is_users_file(code.co_filename) and not code.co_filename.startswith(_MODULES)


def caller() -> str:
    """``file:line`` of the innermost frame on the stack that is user code; ``""`` if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code):
        frame = None if frame.f_code.co_filename.startswith(_COMMANDS) else frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""


def innermost(traceback: TracebackType | None) -> str:
    """``file:line`` of the innermost frame of a traceback that is user code, or else that is in torch.nn."""
    users, modules = "", ""
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if is_users(code):
            users = f"{code.co_filename}:{traceback.tb_lineno}"
        elif code.co_filename.startswith(_MODULES):
            modules = f"{code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return users or modules
