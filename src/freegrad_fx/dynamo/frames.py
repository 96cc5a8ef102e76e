"""What Python's stack tells while Dynamo compiles or runs: which modules are being called, and by whom.

Dynamo compiles one frame at a time, and the code that it makes for one module runs for another of the same class. Which
module is running can be read from the stack alone. This file knows nothing of graphs or rules.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn

__all__ = [
    "Setting",
    "calls_module",
    "capturable",
    "compiled_call",
    "compiled_module",
    "frames",
    "setting",
    "wrap_compiled",
]

_CALL: CodeType = nn.Module._call_impl.__code__
_EVAL_FRAME = os.path.join("torch", "_dynamo", "eval_frame.py")
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
    for frame in frames():
        if frame is until:
            break
        if frame.f_code is _CALL:
            called.append(frame.f_locals["self"])
    return Setting(root, tuple(reversed(called)))


def compiled_call() -> FrameType | None:
    """The frame of the innermost call of something that `torch.compile` returned."""
    for frame in frames():
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename.endswith(_EVAL_FRAME):
            return frame
    return None


def wrap_compiled(frame: FrameType, wrapper: Callable[[Callable[..., Any]], Any]) -> None:
    """Let a compiled function be called through a wrapper, in the call that is going on and in all later ones.

    What a backend may have entered around a call is entered before PyTorch saves the thread's dispatch state and left
    before PyTorch restores it, so that no dispatch mode can be entered there. The wrapper stands inside of that.

    Args:
        frame: The frame of the call.
        wrapper: Makes of the function that is compiled what is called in its place.

    Raises:
        RuntimeError: PyTorch calls compiled functions in another way than the releases that are known here.
    """
    for compiled in gc.get_referrers(frame.f_code):
        if isinstance(compiled, FunctionType) and "fn" in frame.f_code.co_freevars:
            cell = (compiled.__closure__ or ())[frame.f_code.co_freevars.index("fn")]
            if cell.cell_contents is frame.f_locals["fn"]:
                cell.cell_contents = wrapper(cell.cell_contents)
                return
    raise RuntimeError(
        f"torch {torch.__version__} calls compiled functions in another way than the releases that freegrad_fx is "
        f"tested with, so that its backend cannot follow them. Use transform(), or a release that is tested."
    )


def capturable(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that Dynamo captures.

    It looks into the frames of PyTorch's own modules only if they are called from a frame that it captures.
    `torch.compile` makes one around such a module, `nn.Module.compile` does not.
    """
    module = getattr(function, "__self__", None)
    if isinstance(module, nn.Module) and torch._dynamo.trace_rules.check(module.forward):
        return torch._dynamo.external_utils.wrap_inline(function)
    return function


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
