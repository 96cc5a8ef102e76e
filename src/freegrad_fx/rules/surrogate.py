"""Surrogate gradients for spikes: smooth stand-ins for the derivative of a step.

The forward that goes with them is a heaviside; on an unmodified network that rectifies it is given with
``forward="heaviside"``.
"""

from __future__ import annotations

import math

from torch import Tensor

from . import fused
from .rule import register

__all__ = ["arctan", "fast_sigmoid"]


@register(
    "fast_sigmoid",
    reference="Zenke & Ganguli 2018, doi:10.1162/neco_a_01086; snnTorch fast_sigmoid (Norse ignores its slope)",
    requires="slope >= 0",
    fused=fused.fast_sigmoid,
)
def fast_sigmoid(grad: Tensor, x: Tensor, *, slope: float = 25.0) -> Tensor:
    """grad / (1 + slope·|x|)²"""
    root = 1 + slope * x.abs()
    return grad / root / root  # its square would overflow in float16 for |x| > 10


@register(
    "arctan",
    reference="Fang et al. 2021, arXiv:2007.05785; snnTorch atan, SpikingJelly ATan",
    requires="alpha > 0",
    fused=fused.arctan,
)
def arctan(grad: Tensor, x: Tensor, *, alpha: float = 2.0) -> Tensor:
    """grad·(alpha/2) / (1 + (π·alpha·x/2)²)"""
    # both divided by alpha/2
    return grad / (math.pi**2 * alpha / 2 * x.square() + 2 / alpha)
