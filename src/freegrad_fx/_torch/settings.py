"""What code can ask about the global state of PyTorch: functions and the flags of `torch.backends`."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

__all__ = ["CAPTURES", "FUNCTIONS", "flag_of", "flag_readers", "flags", "located"]

CAPTURES = (
    "torch.compiler.is_compiling",
    "torch.compiler.is_dynamo_compiling",
    "torch.compiler.is_exporting",
    "torch._dynamo.is_compiling",
    "torch._dynamo.external_utils.is_compiling",
    "torch._utils.is_compiling",
    "torch.jit.is_tracing",
    "torch.fx._symbolic_trace.is_fx_tracing",
    "torch.fx._symbolic_trace.is_fx_symbolic_tracing",
)
"""Functions that return whether the code is being compiled, exported or traced. All return False in an eager call.

`torch.jit.is_scripting` is not one of them: it always returns False when Python runs the code.
"""

FUNCTIONS = (
    "torch.is_grad_enabled",
    "torch.is_inference_mode_enabled",
    "torch.is_autocast_enabled",
    "torch.is_autocast_cpu_enabled",
    "torch.is_autocast_ipu_enabled",
    "torch.is_autocast_xla_enabled",
    "torch.is_autocast_cache_enabled",
    "torch.get_autocast_dtype",
    "torch.get_autocast_cpu_dtype",
    "torch.get_autocast_gpu_dtype",
    "torch.get_autocast_ipu_dtype",
    "torch.get_autocast_xla_dtype",
    "torch.is_anomaly_enabled",
    "torch.is_anomaly_check_nan_enabled",
    "torch.is_warn_always_enabled",
    "torch.are_deterministic_algorithms_enabled",
    "torch.is_deterministic_algorithms_warn_only_enabled",
    "torch.get_deterministic_debug_mode",
    "torch.get_default_dtype",
    "torch.get_default_device",
    "torch.get_float32_matmul_precision",
    "torch.get_num_threads",
    "torch.get_num_interop_threads",
    "torch.backends.mha.get_fastpath_enabled",
    "torch.backends.cuda.flash_sdp_enabled",
    "torch.backends.cuda.mem_efficient_sdp_enabled",
    "torch.backends.cuda.math_sdp_enabled",
    "torch.backends.cuda.cudnn_sdp_enabled",
    *CAPTURES,
)
"""Functions that return a part of the global state."""


def located(name: str) -> tuple[Any, str] | None:
    """The object that has the attribute with a dotted name, and the attribute; None if there is none.

    No module is imported: code that calls a function has imported its module.
    """
    path, _, attribute = name.rpartition(".")
    if path in sys.modules:
        owner: Any = sys.modules[path]
    else:
        owner = torch
        for part in path.split(".")[1:]:
            owner = vars(owner).get(part)
            if owner is None:
                return None
    return (owner, attribute) if hasattr(owner, attribute) else None


def _backends() -> Iterator[ModuleType]:
    """The modules of `torch.backends` whose flags are descriptors."""
    kind = getattr(torch.backends, "PropModule", ())
    return (module for module in vars(torch.backends).values() if isinstance(module, kind))


@functools.cache
def flag_readers() -> dict[type[Any], str]:
    """The classes whose method reads a flag of `torch.backends`, with the name of the method."""
    readers: dict[type[Any], str] = {}
    for module in _backends():
        for value in vars(type(module)).values():
            if hasattr(type(value), "__set__") and type(value).__module__.startswith("torch."):
                readers[type(value)] = "__get__"
    matmul = getattr(torch.backends.cuda, "matmul", None)
    if "__getattr__" in vars(type(matmul)):
        readers[type(matmul)] = "__getattr__"
    return readers


def flags() -> dict[str, Any]:
    """The flags of `torch.backends` that are descriptors, by their dotted names. Those that raise are left out."""
    found: dict[str, Any] = {}
    readers = flag_readers()
    for module in _backends():
        for name, value in vars(type(module)).items():
            if type(value) in readers:
                with contextlib.suppress(Exception):
                    found[f"{module.__name__}.{name}"] = getattr(module, name)
    return found


def flag_of(reader: Any, *args: Any) -> str | None:
    """The dotted name of the flag that a method of `flag_readers` reads; None if it is not known.

    Args:
        reader: The instance whose method is called.
        args: The arguments of the method.
    """
    if reader is getattr(torch.backends.cuda, "matmul", None):
        name = str(args[0])
        return None if name.startswith("__") else f"torch.backends.cuda.matmul.{name}"
    for module in _backends():
        if args and args[0] is module:
            for name, value in vars(type(module)).items():
                if value is reader:
                    return f"{module.__name__}.{name}"
    return None
