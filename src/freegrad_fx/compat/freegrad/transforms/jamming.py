"""Gradient jamming: the gradient is multiplied by uniform noise. Without an input, no mask is applied."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from freegrad_fx import rules

from ..registry import register

__all__ = ["full_jam", "positive_jam", "rectangular_jam"]


@register("full_jam")
def full_jam(ctx: Any, grad_out: Tensor, tin: Any, **_: Any) -> Tensor:
    """grad·U(0, 1)"""
    return rules.full_jam.function(grad_out)


@register("positive_jam")
def positive_jam(ctx: Any, grad_out: Tensor, tin: Tensor | None, **_: Any) -> Tensor:
    """grad·U(0, 1)·1[x ≥ 0]"""
    if tin is None:
        return rules.full_jam.function(grad_out)
    return rules.positive_jam.function(grad_out, tin)


@register("rectangular_jam")
def rectangular_jam(
    ctx: Any, grad_out: Tensor, tin: Tensor | None, a: float = -5.0, b: float = 5.0, **_: Any
) -> Tensor:
    """grad·U(0, 1)·1[a ≤ x ≤ b], both ends inclusive"""
    if tin is None:
        return rules.full_jam.function(grad_out)
    return rules.rectangular_jam.function(grad_out, tin, a=a, b=b)
