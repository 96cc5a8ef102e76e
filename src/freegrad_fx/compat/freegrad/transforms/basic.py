"""Derivatives of simple operations, and rules that transform only the gradient.

The formulas are those of the rules of the same name in `freegrad_fx.rules`. Without an input, as for a parameter,
`rectangular` and `triangular` raise TypeError or AttributeError, as in FreeGrad.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from freegrad_fx import rules

from ..registry import register

__all__ = [
    "centralize",
    "clip_norm",
    "heaviside",
    "identity",
    "noise",
    "rectangular",
    "scale",
    "triangular",
]


@register("d(ReLU)")
def heaviside(ctx: Any, grad_out: Tensor, tin: Tensor | None, **_: Any) -> Tensor:
    """grad·1[x > 0], and grad without an input"""
    return grad_out if tin is None else rules.d_relu.function(grad_out, tin)


@register("d(Linear)")
def identity(ctx: Any, grad_out: Tensor, tin: Any, **_: Any) -> Tensor:
    """grad"""
    return grad_out


@register("rectangular")
def rectangular(
    ctx: Any, grad_out: Tensor, tin: Tensor, a: float = -0.5, b: float = 0.5, **_: Any
) -> Tensor:
    """grad·1[a ≤ x ≤ b], both ends inclusive"""
    return rules.rectangular.function(grad_out, tin, a=a, b=b)


@register("triangular")
def triangular(ctx: Any, grad_out: Tensor, tin: Tensor, width: float = 1.0, **_: Any) -> Tensor:
    """grad·max(0, 1 − |x|/max(width, 10⁻⁶))"""
    return rules.triangular.function(grad_out, tin, width=width)


@register("scale")
def scale(ctx: Any, grad_out: Tensor, tin: Any, s: float = 1.0, **_: Any) -> Tensor:
    """s·grad"""
    return rules.scale.function(grad_out, s=s)


@register("clip_norm")
def clip_norm(
    ctx: Any, grad_out: Tensor, tin: Any, max_norm: float = 1.0, eps: float = 1e-12, **_: Any
) -> Tensor:
    """grad·min(1, max_norm/max(‖grad‖₂, eps)), the norm taken over the whole tensor"""
    return rules.clip_norm.function(grad_out, max_norm=max_norm, eps=eps)


@register("noise")
def noise(ctx: Any, grad_out: Tensor, tin: Any, sigma: float = 0.1, **_: Any) -> Tensor:
    """grad + N(0, sigma²)"""
    return rules.noise.function(grad_out, sigma=sigma)


@register("centralize")
def centralize(
    ctx: Any, grad_out: Tensor, tin: Any, dim: int = -1, keepdim: bool = True, **_: Any
) -> Tensor:
    """grad − mean(grad, dim)"""
    return grad_out - grad_out.mean(dim=dim, keepdim=keepdim)
