"""The contents of an `nn.Module`, its hooks, and its call."""

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
"""The attributes of every module for its own parameters, buffers and submodules."""

COMPILED_CALL = "_compiled_call_impl"
"""The attribute in which `nn.Module.compile` stores the compiled call."""

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
"""The base classes of modules of torch.nn that return new memory."""

_any_global_hook = private(
    "torch.nn.modules.module._has_any_global_hook", "telling which hooks run"
)
_reparametrize = private(
    "torch.nn.utils.stateless._reparametrize_module", "calling a module with other parameters"
)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of a module, without those of submodules. The dict is the module's own, not a copy."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module, without those of submodules. The dict is the module's own, not a copy."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The direct submodules of a module. The dict is the module's own, not a copy."""
    return module._modules


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks, which can write into its tensors and replace them."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has backward hooks."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks."""
    return has_forward_hooks(module) or has_backward_hooks(module)


def has_global_hooks() -> bool:
    """Whether there are hooks for all modules."""
    return bool(_any_global_hook())


def with_parameters(
    module: nn.Module, parameters: Mapping[str, Tensor]
) -> AbstractContextManager[Any]:
    """Replace parameters of a module while a block runs. Other names of a tied parameter are not replaced."""
    found: AbstractContextManager[Any] = _reparametrize(module, dict(parameters), tie_weights=False)
    return found


def call_code() -> CodeType:
    """The code object that runs when a module is called."""
    code: CodeType = lookup("torch.nn.Module._call_impl", "following compiled modules").__code__
    return code


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether a module is the result of `torch.compile` for another module."""
    # Without Dynamo there are no compiled modules, and importing it takes seconds
    if "torch._dynamo" not in sys.modules:
        return False
    kind = lookup("torch._dynamo.eval_frame.OptimizedModule", "telling compiled models")
    return isinstance(module, kind)


def compiled_model(wrapper: nn.Module) -> nn.Module | None:
    """The model inside of a result of `torch.compile`; None for other modules."""
    return children_of(wrapper).get("_orig_mod")


def make_replica(module: nn.Module) -> None:
    """Make a copy of a module a replica, as `nn.DataParallel` does: its parameters are replaced by plain tensors."""
    module.__dict__.update({PARAMETERS: {}, "_is_replica": True})
