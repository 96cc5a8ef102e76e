"""`vjp` and `jvp` of FreeGrad. For a `jvp` that depends on rules, see `freegrad_fx.functional`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import registry
from .context import use

__all__ = ["jvp", "vjp"]


def _block(
    rule: str | registry.Rule | None, params: dict[str, Any] | None
) -> AbstractContextManager[Any]:
    return use(rule, params, scope="all") if rule else nullcontext()


@torch.no_grad()
def jvp(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    v: Tensor,
    *,
    rule: str | registry.Rule | None = None,
    params: dict[str, Any] | None = None,
) -> Tensor:
    """Return (f(x + εv) − f(x − εv)) / 2ε with ε = 10⁻³: the derivative of the forward, which no rule changes.

    Args:
        f: A function of a tensor.
        x: The point at which to evaluate.
        v: The vector, of the shape of `x`.
        rule: A rule for a `use` block around `f`; it has no effect on the result.
        params: Keyword arguments for the rule.
    """
    step = 1e-3
    with _block(rule, params):
        difference = f(x + step * v) - f(x - step * v)
    return difference / (2 * step)


def vjp(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    rule: str | registry.Rule | None = None,
    params: dict[str, Any] | None = None,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return f(x) and the function v ↦ vᵀJ under a rule.

    Args:
        f: A function of a tensor.
        x: The point at which to evaluate.
        rule: A rule for a `use` block around `f`.
        params: Keyword arguments for the rule.
    """
    x = x.detach().requires_grad_()
    with _block(rule, params):
        y = f(x)

    def vjp_function(v: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(y, x, v, retain_graph=True)
        return gradient

    return y, vjp_function
