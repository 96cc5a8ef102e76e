"""Tells which transform, dispatch mode or recording is active in this thread."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dynamo import is_compiling
from .releases import lookup, private

__all__ = [
    "DispatchMode",
    "current_dispatch_mode",
    "dispatch_modes",
    "function_mode_active",
    "function_modes",
    "function_transforms_active",
    "in_function_transform",
    "in_pre_dispatch",
    "innermost_function_mode",
    "is_batched",
    "is_exporting",
    "is_functionalised",
    "is_jit_tracing",
    "is_transformed",
    "proxy_mode",
    "runs_alone",
    "tracing_state",
    "without_dead_transform",
]

_TRANSFORMS = "telling whether a transform of torch.func is active"
_MODES = "telling which dispatch modes are active"

function_transforms_active = private("torch._C._are_functorch_transforms_active", _TRANSFORMS)
"""Whether a transform of `torch.func` is active."""

without_dead_transform = private("torch._C._functorch.unwrap_if_dead", _TRANSFORMS)
"""Remove the wrapper of a transform that has ended from a tensor; return other tensors unchanged."""

is_transformed = private("torch._C._functorch.is_functorch_wrapped_tensor", _TRANSFORMS)
"""Whether a tensor belongs to a transform of `torch.func`."""

is_batched = private("torch._C._functorch.is_legacy_batchedtensor", _TRANSFORMS)
"""Whether a tensor is a batch of gradients (`is_grads_batched`)."""

dispatch_modes = private("torch._C._len_torch_dispatch_stack", _MODES)
"""The number of active dispatch modes."""

DispatchMode = private("torch.utils._python_dispatch.TorchDispatchMode", _MODES)
"""The base class of dispatch modes."""

current_dispatch_mode = private("torch.utils._python_dispatch._get_current_dispatch_mode", _MODES)
"""The innermost dispatch mode."""

_interpreter = private("torch._C._functorch.peek_interpreter_stack", _TRANSFORMS)
tracing_state = private("torch._C._get_tracing_state", "telling whether torch.jit.trace runs")
"""The state of `torch.jit.trace`, which `torch.onnx.export` uses; None if it is not running."""

_key_included = private("torch._C._dispatch_tls_is_dispatch_key_included", _MODES)
_infra_mode = private("torch._C._get_dispatch_mode", _MODES)
_PRE_DISPATCH = private("torch._C.DispatchKey.PreDispatch", _MODES)
_FUNCTIONAL = private("torch._C._TorchDispatchModeKey.FUNCTIONAL", _MODES)


def in_function_transform() -> bool:
    """Whether the running code is inside of a transform of `torch.func`."""
    return _interpreter() is not None


in_pre_dispatch: Callable[[], bool] = functools.partial(_key_included, _PRE_DISPATCH)
"""Whether a mode is active that receives operations before autograd, such as the mode of `torch.export`."""


def is_functionalised() -> bool:
    """Whether AOTAutograd is tracing."""
    return _infra_mode(_FUNCTIONAL) is not None


def is_jit_tracing() -> bool:
    """Whether `torch.jit.trace` is running, which `torch.onnx.export` uses."""
    return tracing_state() is not None


def is_exporting() -> bool:
    """Whether `torch.export` is running."""
    return torch.compiler.is_exporting()


def proxy_mode() -> Any:
    """The mode with which `make_fx` records; None if it is not running."""
    name = "torch.fx.experimental.proxy_tensor"
    if name not in sys.modules:  # importing it imports sympy
        return None
    return lookup(f"{name}.get_proxy_mode", "telling whether make_fx runs")()


def runs_alone(tensor: Tensor) -> bool:
    """Whether operations on a tensor are neither differentiated, batched, compiled nor recorded."""
    return type(tensor) is Tensor and not (
        torch.is_grad_enabled()
        or is_compiling()
        or is_transformed(tensor)
        or is_batched(tensor)
        or dispatch_modes()
    )


function_modes = private("torch._C._len_torch_function_stack", "telling which modes are active")
"""The number of active function modes."""

_function_modes = private(
    "torch.overrides._get_current_function_mode_stack", "telling which function modes are active"
)


def function_mode_active(mode: Any) -> bool:
    """Whether a function mode is active in this thread."""
    return any(active is mode for active in _function_modes())


innermost_function_mode = private(
    "torch.overrides._get_current_function_mode", "telling which function modes are active"
)
"""The innermost function mode of this thread; None if there is none."""
