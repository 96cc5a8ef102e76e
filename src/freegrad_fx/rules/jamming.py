"""Gradient jamming: each entry of the gradient is multiplied by uniform noise.

References to FreeGrad mean the PyPI package freegrad 1.0.1. The rules have its names and defaults.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.register import register
from . import masks
from .draws import uniform_like

__all__ = ["full_jam", "positive_jam", "rectangular_jam"]

_PAPER = "Troiano et al. 2025, doi:10.1016/j.neucom.2025.131178"


def _fast_jam(grad: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    return uniform_like(grad, generator).mul_(grad)


@register("full_jam", reference=_PAPER, peers="FreeGrad full_jam", random=True, fast=_fast_jam)
def full_jam(grad: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """grad·U(0, 1)

    Args:
        generator: What the numbers are drawn from; None for the global generator.
    """
    return grad * uniform_like(grad, generator)


def _fast_positive_jam(grad: Tensor, x: Tensor, *, generator: torch.Generator | None = None) -> Any:
    bounds = masks.outer(0.0, 0.0, x.dtype)
    if bounds is None or not masks.can_mask(grad, x):
        return NotImplemented
    result = _fast_jam(grad, generator=generator)
    torch.ops.aten.threshold_backward.grad_input(result, x, bounds[0], grad_input=result)
    return result


@register(
    "positive_jam",
    reference=_PAPER,
    peers="FreeGrad positive_jam",
    random=True,
    mask=masks.nonnegative,
    fast=_fast_positive_jam,
)
def positive_jam(grad: Tensor, mask: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """grad·U(0, 1)·1[x ≥ 0]

    Args:
        generator: What the numbers are drawn from; None for the global generator.
    """
    return masks.only_where(mask, grad * uniform_like(grad, generator))


def _fast_window_jam(
    grad: Tensor, x: Tensor, *, a: float, b: float, generator: torch.Generator | None = None
) -> Any:
    bounds = masks.outer(a, b, x.dtype)
    if bounds is None or not masks.can_mask(grad, x):
        return NotImplemented
    result = _fast_jam(grad, generator=generator)
    torch.ops.aten.hardtanh_backward.grad_input(result, x, *bounds, grad_input=result)
    return result


@register(
    "rectangular_jam",
    reference=_PAPER,
    peers="FreeGrad rectangular_jam",
    random=True,
    requires="a <= b",
    mask=masks.window,
    fast=_fast_window_jam,
    examples=({"a": -0.5, "b": 1.0}, {"a": -0.3, "b": 0.5}, {"a": 0.3, "b": math.inf}),
)
def rectangular_jam(
    grad: Tensor,
    mask: Tensor,
    *,
    a: float = -5.0,
    b: float = 5.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """grad·U(0, 1)·1[a ≤ x ≤ b], both ends inclusive

    Args:
        a: The lower end of the window.
        b: The upper end of the window.
        generator: What the numbers are drawn from; None for the global generator.
    """
    return masks.only_where(mask, grad * uniform_like(grad, generator))
