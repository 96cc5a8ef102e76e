"""What an `nn.Module` holds, and how it is called."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any

from torch import Tensor, nn

from .releases import lookup, private

__all__ = [
    "BUFFERS",
    "CHILDREN",
    "COMPILED_CALL",
    "FRESH_BASES",
    "PARAMETERS",
    "buffers_of",
    "call_code",
    "children_of",
    "compiled_model",
    "has_backward_hooks",
    "has_forward_hooks",
    "has_global_hooks",
    "has_hooks",
    "is_compiled_wrapper",
    "make_replica",
    "parameters_of",
    "with_parameters",
]

PARAMETERS, BUFFERS, CHILDREN = "_parameters", "_buffers", "_modules"
"""The attributes in which every module holds its own parameters, buffers and submodules."""

COMPILED_CALL = "_compiled_call_impl"
"""The attribute in which `nn.Module.compile` puts the compiled call."""

FRESH_BASES: tuple[type[nn.Module], ...] = tuple(
    private(f"torch.nn.modules.{name}", "telling which memory a module returns")
    for name in (
        "conv._ConvNd",
        "batchnorm._NormBase",
        "pooling._MaxPoolNd",
        "pooling._AvgPoolNd",
        "pooling._LPPoolNd",
    )
)
"""The bases of modules of torch.nn that return memory of their own."""

_any_global_hook = private(
    "torch.nn.modules.module._has_any_global_hook", "telling which hooks run"
)
_reparametrize = private(
    "torch.nn.utils.stateless._reparametrize_module", "calling a module with other parameters"
)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters that a module itself holds; the dict is the module's own."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers that a module itself holds; the dict is the module's own."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The submodules that a module itself holds; the dict is the module's own."""
    return module._modules


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run around a module's forward, which can write and return anything."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether hooks run around a module's backward."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around a module's forward or backward."""
    return has_forward_hooks(module) or has_backward_hooks(module)


def has_global_hooks() -> bool:
    """Whether hooks run around every module."""
    return bool(_any_global_hook())


def with_parameters(
    module: nn.Module, parameters: Mapping[str, Tensor]
) -> AbstractContextManager[Any]:
    """Let a module hold other tensors for some parameters, which are not tied to others of the same tensor."""
    found: AbstractContextManager[Any] = _reparametrize(module, dict(parameters), tie_weights=False)
    return found


def call_code() -> CodeType:
    """The code that runs when a module is called."""
    code: CodeType = lookup("torch.nn.Module._call_impl", "following compiled modules").__code__
    return code


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` returned for another."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds, and it makes them
        return False
    kind = lookup("torch._dynamo.eval_frame.OptimizedModule", "telling compiled models")
    return isinstance(module, kind)


def compiled_model(wrapper: nn.Module) -> nn.Module | None:
    """The model in what `torch.compile` returned for one; None for other modules."""
    return children_of(wrapper).get("_orig_mod")


def make_replica(module: nn.Module) -> None:
    """Let a copy of a module be what `nn.DataParallel` makes: plain tensors are put under its parameters' names."""
    module.__dict__.update({PARAMETERS: {}, "_is_replica": True})
