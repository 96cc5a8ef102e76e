"""Gradient jamming: the gradient of a unit is multiplied with uniform noise.

FreeGrad = the PyPI package freegrad 1.0.1, whose names and defaults these rules keep.
"""

from __future__ import annotations

from torch import Tensor

from . import fused, masks
from .draws import uniform_like
from .rule import register

__all__ = ["full_jam", "positive_jam", "rectangular_jam"]

_PAPER = "FreeGrad; Troiano et al. 2025, doi:10.1016/j.neucom.2025.131178"


@register("full_jam", reference=_PAPER, fused=fused.full_jam)
def full_jam(grad: Tensor) -> Tensor:
    """grad·U(0, 1)"""
    return grad * uniform_like(grad)


@register("positive_jam", reference=_PAPER, mask=masks.nonnegative, fused=fused.positive_jam)
def positive_jam(grad: Tensor, mask: Tensor) -> Tensor:
    """grad·U(0, 1)·1[x ≥ 0]"""
    return masks.only_where(mask, grad * uniform_like(grad))


@register(
    "rectangular_jam",
    reference=_PAPER,
    requires="a <= b",
    mask=masks.window,
    fused=fused.window_jam,
)
def rectangular_jam(grad: Tensor, mask: Tensor, *, a: float = -5.0, b: float = 5.0) -> Tensor:
    """grad·U(0, 1)·1[a ≤ x ≤ b], both ends inclusive"""
    return masks.only_where(mask, grad * uniform_like(grad))
