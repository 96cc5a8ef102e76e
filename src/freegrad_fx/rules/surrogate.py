"""Surrogate gradients for spiking networks: smooth replacements for the derivative of the Heaviside step.

They are meant for a Heaviside forward. For a network with other activations, ``forward="heaviside"`` replaces them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.register import register

__all__ = ["arctan", "fast_sigmoid"]


def _in_one_buffer_sigmoid(grad: Tensor, x: Tensor, *, slope: float) -> Any:
    if grad.dtype != x.dtype:
        return NotImplemented
    root = x.abs().mul_(slope).add_(1)
    return torch.div(grad, root, out=torch.empty_like(grad)).div_(root)


@register(
    "fast_sigmoid",
    reference="Zenke & Ganguli 2018, doi:10.1162/neco_a_01086; snnTorch fast_sigmoid (Norse ignores its slope)",
    requires="slope >= 0",
    fast=_in_one_buffer_sigmoid,
    examples=({"slope": 0.0}, {"slope": 0.3}, {"slope": 5.0}, {"slope": 100.0}),
)
def fast_sigmoid(grad: Tensor, x: Tensor, *, slope: float = 25.0) -> Tensor:
    """grad / (1 + slope·|x|)²"""
    root = 1 + slope * x.abs()
    return grad / root / root  # not divided by root², which overflows in float16 for |x| > 10


def _in_one_buffer_arctan(grad: Tensor, x: Tensor, *, alpha: float) -> Any:
    if grad.dtype != x.dtype:
        return NotImplemented
    denominator = x.square().mul_(math.pi**2 * alpha / 2).add_(2 / alpha)
    return torch.div(grad, denominator, out=denominator)


@register(
    "arctan",
    reference="Fang et al. 2021, arXiv:2007.05785; snnTorch atan, SpikingJelly ATan",
    requires="alpha > 0",
    fast=_in_one_buffer_arctan,
    examples=({"alpha": 0.3}, {"alpha": 1.0}, {"alpha": 5.0}),
)
def arctan(grad: Tensor, x: Tensor, *, alpha: float = 2.0) -> Tensor:
    """grad·(alpha/2) / (1 + (π·alpha·x/2)²)"""
    # numerator and denominator are divided by alpha/2
    return grad / (math.pi**2 * alpha / 2 * x.square() + 2 / alpha)
