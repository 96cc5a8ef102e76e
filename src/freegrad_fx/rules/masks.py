"""Masks, which state where the gradient passes, and kernels that apply one in a single pass. Does not know any rule.

The functions named ``where_…`` are fast forms for `register`: they return the result of the formula, bit for bit, or
``NotImplemented`` for arguments that they do not support. They run in eager mode, in a backward that is not
differentiated itself.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .._torch.dispatch import runs_alone
from .._torch.dynamo import is_compiling
from ..core.declaration import tells_sign

__all__ = [
    "ball",
    "can_mask",
    "nonnegative",
    "not_clipped",
    "only_where",
    "outer",
    "positive",
    "where_in_ball",
    "where_in_window",
    "where_positive",
    "window",
]

_aten = torch.ops.aten


@tells_sign
def positive(x: Tensor) -> Tensor:
    """1[x > 0]"""
    return x > 0


def nonnegative(x: Tensor) -> Tensor:
    """1[x ≥ 0]"""
    return x >= 0


def not_clipped(x: Tensor) -> Tensor:
    """1[not x ≤ 0], which holds for NaN, as in PyTorch's kernel of ReLU"""
    return ~(x <= 0)


def window(x: Tensor, *, a: float, b: float) -> Tensor:
    """1[a ≤ x ≤ b]"""
    largest = torch.finfo(x.dtype).max if x.is_floating_point() else 0
    numbers = not (isinstance(a, Tensor) or isinstance(b, Tensor))
    if numbers and not is_compiling() and -largest <= a <= b <= largest:
        return x.clamp(a, b) == x  # the same mask, with one pass over booleans instead of three
    return (x >= a) & (x <= b)


def ball(x: Tensor, *, bound: float) -> Tensor:
    """1[|x| ≤ bound]"""
    return x.abs() <= bound


def only_where(mask: Tensor, grad: Tensor) -> Tensor:
    """grad·1[mask], where entries outside of the mask are 0, also if the gradient is infinite or NaN there."""
    usual = mask.is_cpu and mask.dtype is torch.bool and grad.is_floating_point()
    if not (usual and mask.shape == grad.shape and runs_alone(grad)):
        return torch.where(mask, grad, 0)
    result = mask.view(torch.uint8).to(grad.dtype)
    _aten.threshold_backward.grad_input(grad, result, 0, grad_input=result)
    return result


# --- kernels ---


def can_mask(grad: Tensor, x: Tensor) -> bool:
    """Return whether PyTorch's masking kernels compute the formula for these tensors.

    They do not if ``x`` has a NaN: the kernels pass the gradient there, and the formulas do not. For a large tensor, a
    sum detects NaN in a fraction of the time of the kernels. For a small one, a comparison is faster, as it has less
    overhead. Other devices than the CPU are not supported, as reading the result would synchronise with the device.
    """
    if grad.dtype is not x.dtype or not x.is_cpu:
        return False
    if x.numel() <= 16384:
        return torch.equal(x, x)
    total = x.sum().item()
    return total - total == 0  # neither NaN nor infinite


def where_positive(grad: Tensor, x: Tensor) -> Any:
    """grad where x > 0"""
    if not can_mask(grad, x):
        return NotImplemented
    result: Tensor = _aten.threshold_backward.default(grad, x, 0)
    return result


def where_in_window(grad: Tensor, x: Tensor, *, a: float, b: float) -> Any:
    """grad where a ≤ x ≤ b"""
    bounds = outer(a, b, x.dtype)
    if bounds is None or not can_mask(grad, x):
        return NotImplemented
    result: Tensor = _aten.hardtanh_backward.default(grad, x, *bounds)
    return result


def where_in_ball(grad: Tensor, x: Tensor, *, bound: float) -> Any:
    """grad where |x| ≤ bound"""
    return where_in_window(grad, x, a=-bound, b=bound)


@functools.lru_cache(maxsize=1024)
def outer(a: float, b: float, dtype: torch.dtype) -> tuple[float, float] | None:
    """Return the nearest numbers of a dtype outside of a window; None if there are none.

    PyTorch's kernels exclude the ends of a window, and the formulas include them.
    """
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return None
    ends = torch.tensor([a, b], dtype=dtype)
    if not ends.isfinite().all():
        return None
    outside = torch.tensor([-math.inf, math.inf], dtype=dtype)
    low, high = torch.nextafter(ends, outside).tolist()
    return low, high
