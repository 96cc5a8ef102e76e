"""Reads the modules that are being called from the Python stack, while Dynamo compiles or compiled code runs.

Dynamo compiles one frame at a time, and runs the code for one module also for other modules of the same class. Only the
stack shows which module is running. This file does not know graphs or rules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn

from .._torch.dynamo import compiled_function
from .._torch.modules import call_code

__all__ = [
    "SESSION",
    "Setting",
    "calls_module",
    "compiled_module",
    "compiled_otherwise",
    "frames",
    "setting",
]

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class Setting:
    """A place in a program at which code is captured or runs.

    Attributes:
        root: The module that was compiled; None if a function was compiled.
        modules: The modules that are being called, the outermost first.
    """

    root: nn.Module | None
    modules: tuple[nn.Module, ...]

    def top(self, *further: nn.Module) -> nn.Module | None:
        """The model that the code belongs to; None for code outside of modules."""
        if self.root is not None:
            return self.root
        return next((_model(module) for module in (*self.modules, *further)), None)


def frames() -> Iterator[FrameType]:
    """The frames of this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


SESSION = "_freegrad_fx"
"""An attribute that marks a function whose calls are sessions."""


def compiled_otherwise() -> Callable[..., Any] | None:
    """The innermost compiled function that is running, if it is compiled with another backend; else None."""
    frame = compiled_function(frames())
    function = None if frame is None else frame.f_locals.get("fn")
    return None if hasattr(function, SESSION) else function


def setting(root: nn.Module | None, until: FrameType | None) -> Setting:
    """The place of the running code, read from the stack up to a frame."""
    called: list[nn.Module] = []
    call = call_code()
    for frame in frames():
        if frame is until:
            break
        if frame.f_code is call:
            called.append(frame.f_locals["self"])
    return Setting(root, tuple(reversed(called)))


def compiled_module(function: Callable[..., Any]) -> nn.Module | None:
    """The model whose call or method `torch.compile` compiled; None for a function that is not a method."""
    # Modules of PyTorch are called through a wrapper function
    called = getattr(function, "__wrapped__", function)
    module = called if isinstance(called, nn.Module) else getattr(called, "__self__", None)
    return _model(module) if isinstance(module, nn.Module) else None


def calls_module(function: Callable[..., Any]) -> bool:
    """Whether a compiled function is the call of a module, not another method or a plain function."""
    called = getattr(function, "__wrapped__", function)
    if isinstance(called, nn.Module):
        return True
    name = getattr(called, "__name__", "")
    calls = ("forward", "_call_impl", "_wrapped_call_impl")
    return isinstance(getattr(called, "__self__", None), nn.Module) and name in calls


def _model(module: nn.Module) -> nn.Module:
    """The model inside of the wrappers for data parallelism."""
    while isinstance(module, _WRAPPERS):
        module = module.module
    return module
