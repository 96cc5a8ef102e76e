"""What Python's stack tells while Dynamo compiles or runs: which modules are being called, and by whom.

Dynamo compiles one frame at a time, and the code that it makes for one module runs for another of the same class. Which
module is running can be read from the stack alone. This file knows nothing of graphs or rules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn

from .._torch.modules import call_code

__all__ = [
    "Setting",
    "calls_module",
    "compiled_module",
    "frames",
    "setting",
]

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class Setting:
    """Where in a program code is captured or run.

    Attributes:
        root: The module that was compiled; None where a function was.
        modules: The modules that are being called, the outermost first.
    """

    root: nn.Module | None
    modules: tuple[nn.Module, ...]

    def top(self, *further: nn.Module) -> nn.Module | None:
        """The model that the code belongs to; None for code that is in no module."""
        if self.root is not None:
            return self.root
        return next((_model(module) for module in (*self.modules, *further)), None)


def frames() -> Iterator[FrameType]:
    """The frames of this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def setting(root: nn.Module | None, until: FrameType | None) -> Setting:
    """Where the code that is running stands, looked at up to a frame."""
    called: list[nn.Module] = []
    call = call_code()
    for frame in frames():
        if frame is until:
            break
        if frame.f_code is call:
            called.append(frame.f_locals["self"])
    return Setting(root, tuple(reversed(called)))


def compiled_module(function: Callable[..., Any]) -> nn.Module | None:
    """The model whose call or method `torch.compile` compiled; None for a function that is no method."""
    # PyTorch's own modules are called through a function
    called = getattr(function, "__wrapped__", function)
    module = called if isinstance(called, nn.Module) else getattr(called, "__self__", None)
    return _model(module) if isinstance(module, nn.Module) else None


def calls_module(function: Callable[..., Any]) -> bool:
    """Whether what `torch.compile` compiled is the call of a module, and not another method or a function."""
    called = getattr(function, "__wrapped__", function)
    if isinstance(called, nn.Module):
        return True
    name = getattr(called, "__name__", "")
    calls = ("forward", "_call_impl", "_wrapped_call_impl")
    return isinstance(getattr(called, "__self__", None), nn.Module) and name in calls


def _model(module: nn.Module) -> nn.Module:
    """The model in the wrappers that PyTorch puts around one."""
    while isinstance(module, _WRAPPERS):
        module = module.module
    return module
