"""Tells which modules are running, from the frames of the calling thread. Changes nothing in the modules."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from .._torch.dynamo import takes_for_constant, traces_code_with
from .._torch.functions import Function, function_of_frame
from .._torch.modules import call_code
from ..context import OWN_RULES, intercepting_blocks

__all__ = [
    "Running",
    "has_rules_already",
    "in_one_site",
    "is_compiled_graph",
    "looks_for_sites",
    "one_site",
    "running_function",
    "running_modules",
]


class _Thread(threading.local):
    def __init__(self) -> None:
        self.sites = 0


_thread = _Thread()


@contextmanager
def one_site() -> Iterator[None]:
    """A context in which everything that runs is one site, such as the call of a module whose class has a rule."""
    _thread.sites += 1
    try:
        yield
    finally:
        _thread.sites -= 1


def in_one_site() -> bool:
    """Whether everything that runs now is one site, so that no operation in it is another one."""
    return _thread.sites > 0


def looks_for_sites(observed: Any) -> bool:
    """Whether the block to which some observed sites belong is in force, and what runs now can be another site."""
    return not in_one_site() and any(b.observed is observed for b in intercepting_blocks())


@takes_for_constant
def has_rules_already() -> bool:
    """Whether Dynamo is tracing code whose sites have rules of their own already."""
    return traces_code_with(OWN_RULES)


@dataclass(frozen=True)
class Running:
    """A module whose call is running, with the frame of the call."""

    module: nn.Module
    frame: FrameType


def running_modules(depth: int = 1) -> Iterator[Running]:
    """The modules whose calls are running in this thread, the innermost first.

    Args:
        depth: The number of frames to skip.
    """
    code = call_code()
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        if frame.f_code is code:
            yield Running(frame.f_locals["self"], frame)
        elif frame.f_code.co_filename.startswith(_GENERATED):
            # Dynamo's graphs are run by their `forward`, not by a call
            graph = frame.f_locals.get("self")
            if isinstance(graph, nn.Module) and is_compiled_graph(graph):
                yield Running(graph, frame)
        frame = frame.f_back


def running_function(depth: int = 1) -> Function | None:
    """The user's autograd.Function whose forward is running in this thread; None if there is none.

    Autograd records nothing there, so that no rule can act: the Function has its own backward.

    Args:
        depth: The number of frames to skip.
    """
    if torch.is_grad_enabled():  # PyTorch disables gradients for a forward
        return None
    of_modules = call_code()
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        back = frame.f_back
        if frame.f_code.co_name == "forward" and (back is None or back.f_code is not of_modules):
            function = function_of_frame(frame)
            if function is not None:
                return function
        frame = back
    return None


def is_compiled_graph(module: Any) -> bool:
    """Whether a module is a graph that Dynamo captured."""
    return isinstance(module, fx.GraphModule) and hasattr(module, _OF_DYNAMO)


_GENERATED = "<eval_with_key>"
"""The beginning of the file name of code that FX generates."""

_OF_DYNAMO = "compile_subgraph_reason"
"""An attribute of the graphs that Dynamo captures."""
