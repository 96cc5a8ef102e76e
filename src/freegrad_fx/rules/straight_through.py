"""Straight-through estimators, which pass the gradient through a rounding or a sign."""

from __future__ import annotations

import math

from torch import Tensor

from ..core.register import register
from . import masks

__all__ = ["clipped_straight_through", "straight_through"]


@register(
    "straight_through",
    reference="Bengio et al. 2013, arXiv:1308.3432; Brevitas *_ste",
    sparse=True,
)
def straight_through(grad: Tensor) -> Tensor:
    """grad"""
    return grad


@register(
    "clipped_straight_through",
    reference="Hubara et al. 2016, arXiv:1602.02830; larq SteSign (XNOR-Net's bound is strict)",
    requires="bound >= 0",
    mask=masks.ball,
    fast=masks.where_in_ball,
    examples=({"bound": 0.0}, {"bound": 0.3}, {"bound": 4.0}, {"bound": math.inf}),
)
def clipped_straight_through(grad: Tensor, mask: Tensor, *, bound: float = 1.0) -> Tensor:
    """grad·1[|x| ≤ bound], the bound inclusive"""
    return masks.only_where(mask, grad)
