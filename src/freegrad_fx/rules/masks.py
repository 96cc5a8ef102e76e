"""Where a rule lets the gradient pass: the masks that the formulas of rules are made of. Knows no rule."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused

__all__ = ["ball", "nonnegative", "only_where", "positive", "window"]


def positive(x: Tensor) -> Tensor:
    """1[x > 0]"""
    return x > 0


def nonnegative(x: Tensor) -> Tensor:
    """1[x ≥ 0]"""
    return x >= 0


def window(x: Tensor, *, a: float, b: float) -> Tensor:
    """1[a ≤ x ≤ b]"""
    largest = torch.finfo(x.dtype).max if x.is_floating_point() else 0
    numbers = not (isinstance(a, Tensor) or isinstance(b, Tensor))
    if numbers and not torch.compiler.is_compiling() and -largest <= a <= b <= largest:
        return x.clamp(a, b) == x  # the same, and one pass over booleans instead of three
    return (x >= a) & (x <= b)


def ball(x: Tensor, *, bound: float) -> Tensor:
    """1[|x| ≤ bound]"""
    return x.abs() <= bound


def only_where(mask: Tensor, grad: Tensor) -> Tensor:
    """grad·1[mask], which is 0 outside of the mask for every gradient, an infinite one too."""
    masked = fused.only_where(mask, grad)
    return torch.where(mask, grad, 0) if masked is None else masked
