"""Compiles the formula of a rule to one kernel, for `compile=True` in eager mode."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._torch.dynamo import gives_up_recompiling, is_compile_error
from ..core.packing import memory_order
from ..core.rule import Rule
from ..errors import RuleError

__all__ = ["run_compiled"]

Formula: TypeAlias = Callable[..., Tensor]


def run_compiled(
    rule: Rule, site: str, function: Formula, grad: Tensor, *inputs: Tensor, **parameters: Any
) -> Any:
    """Apply a rule to a gradient with one compiled kernel.

    Args:
        rule: The rule.
        site: The name of the site, for error messages.
        function: The formula of the rule, as a function of ``x`` or of the mask of ``x``.
        grad: The incoming gradient.
        *inputs: The saved tensors that the formula reads.
        **parameters: The rule's parameters.

    Returns:
        The gradient for ``x``; ``NotImplemented`` if the recompilation limit has been reached, or the rule draws from a
        generator of its own, which compiled code cannot do.

    Raises:
        RuleError: The formula cannot be compiled.
    """
    if any(isinstance(value, torch.Generator) for value in parameters.values()):
        return NotImplemented
    layouts = tuple((t.dtype, t.device.type, *memory_order(t)) for t in (grad, *inputs))
    kernel = _kernel(function, tuple(sorted(parameters)), layouts)
    try:
        return kernel(grad, *inputs, **parameters)
    except Exception as error:
        if gives_up_recompiling(error):
            return NotImplemented
        if not is_compile_error(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise RuleError(
            f"compile=True: rule {rule.name!r} at site {site!r} cannot be compiled ({type(error).__name__}: "
            f"{reason}). Leave out compile=True to run the formula in eager mode."
        ) from error


@functools.lru_cache(maxsize=256)
def _kernel(
    function: Callable[..., Tensor], names: tuple[str, ...], layouts: tuple[Any, ...]
) -> Callable[..., Tensor]:
    """A function compiled for some dtypes and memory layouts, with dynamic shapes."""

    def run(grad: Tensor, *inputs: Tensor, **parameters: Any) -> Tensor:
        return function(grad, *inputs, **parameters)

    # Dynamo limits the recompilations of each code object, so every kernel gets its own
    own = types.FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=True)
