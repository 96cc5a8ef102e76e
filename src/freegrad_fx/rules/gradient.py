"""Rules that change the gradient itself, and derivatives of simple operations.

References to FreeGrad mean the PyPI package freegrad 1.0.1. Rules from it have its names and defaults.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.register import register
from . import masks
from .draws import normal_like

__all__ = [
    "centralize",
    "clip_norm",
    "clip_value",
    "d_linear",
    "d_relu",
    "noise",
    "rectangular",
    "reverse",
    "scale",
    "triangular",
]


@register(
    "d(ReLU)",
    reference="FreeGrad; the derivative of max(0, x)",
    mask=masks.positive,
    fast=masks.where_positive,
)
def d_relu(grad: Tensor, mask: Tensor) -> Tensor:
    """grad·1[x > 0]"""
    return masks.only_where(mask, grad)


@register("d(Linear)", reference="FreeGrad; the derivative of the identity", sparse=True)
def d_linear(grad: Tensor) -> Tensor:
    """grad"""
    return grad


@register(
    "rectangular",
    reference="FreeGrad; Troiano et al. 2025, doi:10.1016/j.neucom.2025.131178",
    requires="a <= b",
    mask=masks.window,
    fast=masks.where_in_window,
    examples=(
        {"a": -1.0, "b": 0.25},
        {"a": -2.0, "b": -2.0},
        {"a": 0.3, "b": 0.3},
        {"a": -math.inf, "b": 0.3},
        {"a": 0.0, "b": math.inf},
    ),
)
def rectangular(grad: Tensor, mask: Tensor, *, a: float = -0.5, b: float = 0.5) -> Tensor:
    """grad·1[a ≤ x ≤ b], both ends inclusive"""
    return masks.only_where(mask, grad)


def _fast_triangular(grad: Tensor, x: Tensor, *, width: float) -> Any:
    slope = x.abs().div_(-max(width, 1e-6)).add_(1).clamp_(min=0)
    return slope.mul_(grad) if slope.dtype == grad.dtype else NotImplemented


@register(
    "triangular",
    reference="FreeGrad; Bellec et al. 2018, arXiv:1803.09574",
    fast=_fast_triangular,
    examples=({"width": 0.25}, {"width": 0.3}, {"width": 2.5}, {"width": 0.0}, {"width": -1.0}),
)
def triangular(grad: Tensor, x: Tensor, *, width: float = 1.0) -> Tensor:
    """grad·max(0, 1 − |x|/max(width, 10⁻⁶))"""
    width = width.clamp(min=1e-6) if isinstance(width, Tensor) else max(width, 1e-6)
    return grad * (1 - x.abs() / width).clamp(min=0)


@register(
    "scale",
    reference="FreeGrad; optax.scale",
    sparse=True,
    examples=({"s": -1.5}, {"s": 0.0}, {"s": 0.1}, {"s": 7.0}),
)
def scale(grad: Tensor, *, s: float = 1.0) -> Tensor:
    """s·grad"""
    return s * grad


@register(
    "reverse",
    reference="Ganin & Lempitsky 2015, arXiv:1409.7495 (gradient reversal, DANN)",
    sparse=True,
    examples=({"alpha": -2.0}, {"alpha": 0.0}, {"alpha": 0.3}),
)
def reverse(grad: Tensor, *, alpha: float = 1.0) -> Tensor:
    """−alpha·grad"""
    return -alpha * grad


@register(
    "clip_value",
    reference="optax.clip; torch.nn.utils.clip_grad_value_",
    requires="max_value >= 0",
    examples=({"max_value": 0.0}, {"max_value": 0.3}, {"max_value": 3.0}, {"max_value": math.inf}),
)
def clip_value(grad: Tensor, *, max_value: float = 1.0) -> Tensor:
    """min(max(grad, −max_value), max_value)"""
    return grad.clamp(-max_value, max_value)


@register(
    "clip_norm",
    reference="FreeGrad; Pascanu et al. 2013, arXiv:1211.5063",
    requires="max_norm >= 0, eps >= 0",
    examples=(
        {"max_norm": 0.0},
        {"max_norm": 0.5, "eps": 1e-6},
        {"max_norm": 3.0, "eps": 50.0},
        {"max_norm": 100.0},
        {"max_norm": math.inf},
    ),
)
def clip_norm(grad: Tensor, *, max_norm: float = 1.0, eps: float = 1e-12) -> Tensor:
    """grad·min(1, max_norm/max(‖grad‖₂, eps)), the norm taken over the whole tensor"""
    # at least float32: the norm of a large tensor overflows in float16, and the gradient would become zero
    norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    factor: Tensor = max_norm / norm.clamp_min(eps)
    return grad * factor.clamp(max=1).to(grad.dtype)


def _fast_noise(grad: Tensor, *, sigma: float) -> Tensor:
    return torch.randn_like(grad).mul_(sigma).add_(grad)


@register(
    "noise",
    reference="FreeGrad; Neelakantan et al. 2015, arXiv:1511.06807",
    requires="sigma >= 0",
    fast=_fast_noise,
    examples=({"sigma": 0.0}, {"sigma": 0.3}, {"sigma": 2.5}),
)
def noise(grad: Tensor, *, sigma: float = 0.1) -> Tensor:
    """grad + N(0, sigma²)"""
    return grad + sigma * normal_like(grad)


@register(
    "centralize",
    reference="FreeGrad; Yong et al. 2020, arXiv:2004.01461 (there for weights, over dims 1…)",
    examples=({"dim": 0}, {"dim": 1}, {"dim": (0, -1)}),
)
def centralize(grad: Tensor, *, dim: int | tuple[int, ...] = -1) -> Tensor:
    """grad − mean(grad, dim)"""
    return grad - grad.mean(dim=dim, keepdim=True)
