"""The built-in rules once more, in fewer passes over memory: what runs in eager mode, beside the plain formulas.

Each function has the signature of the rule that it belongs to, and returns the same bits, or ``NotImplemented`` for
arguments that it is not for. It may write into tensors that it has made itself: it is called where no second
derivative is wanted and no transform of torch.func is active.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .._torch.dispatch import dispatch_modes, is_batched, is_transformed

__all__ = [
    "arctan",
    "clipped",
    "fast_sigmoid",
    "full_jam",
    "guided",
    "noise",
    "only_where",
    "positive",
    "positive_jam",
    "runs_alone",
    "triangular",
    "window",
    "window_jam",
]

_aten = torch.ops.aten


def _can_mask(grad: Tensor, x: Tensor) -> bool:
    """Whether PyTorch's masking kernels do what a formula does, which lets nothing pass where x is NaN.

    They let it pass. A sum finds a NaN in a fraction of their time, and a comparison, which takes longer for each
    entry, begins sooner. On other devices reading the answer would wait for them.
    """
    if grad.dtype is not x.dtype or not x.is_cpu:
        return False
    if x.numel() <= 16384:
        return torch.equal(x, x)
    total = x.sum().item()
    return total - total == 0  # neither NaN nor infinite


def runs_alone(tensor: Tensor) -> bool:
    """Whether nothing differentiates, batches, compiles or records what is computed from a tensor now."""
    return type(tensor) is Tensor and not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or is_transformed(tensor)
        or is_batched(tensor)
        or dispatch_modes()
    )


def positive(grad: Tensor, x: Tensor) -> Any:
    """grad where x > 0"""
    if not _can_mask(grad, x):
        return NotImplemented
    result: Tensor = _aten.threshold_backward.default(grad, x, 0)
    return result


def guided(grad: Tensor, x: Tensor) -> Any:
    """max(grad, 0) where x > 0"""
    if not _can_mask(grad, x):
        return NotImplemented
    result = grad.clamp(min=0)
    _aten.threshold_backward.grad_input(result, x, 0, grad_input=result)
    return result


def window(grad: Tensor, x: Tensor, *, a: float, b: float) -> Any:
    """grad where a ≤ x ≤ b"""
    bounds = _outer(a, b, x.dtype)
    if bounds is None or not _can_mask(grad, x):
        return NotImplemented
    result: Tensor = _aten.hardtanh_backward.default(grad, x, *bounds)
    return result


def clipped(grad: Tensor, x: Tensor, *, bound: float) -> Any:
    """grad where |x| ≤ bound"""
    return window(grad, x, a=-bound, b=bound)


def only_where(mask: Tensor, grad: Tensor) -> Tensor | None:
    """grad where a mask is, 0 elsewhere; None where `torch.where` is wanted"""
    usual = mask.is_cpu and mask.dtype is torch.bool and grad.is_floating_point()
    if not (usual and mask.shape == grad.shape and runs_alone(grad)):
        return None
    result = mask.view(torch.uint8).to(grad.dtype)
    _aten.threshold_backward.grad_input(grad, result, 0, grad_input=result)
    return result


def full_jam(grad: Tensor) -> Tensor:
    """grad·U(0, 1)"""
    return torch.rand_like(grad).mul_(grad)


def positive_jam(grad: Tensor, x: Tensor) -> Any:
    """grad·U(0, 1) where x ≥ 0"""
    bounds = _outer(0.0, 0.0, x.dtype)
    if bounds is None or not _can_mask(grad, x):
        return NotImplemented
    result = full_jam(grad)
    _aten.threshold_backward.grad_input(result, x, bounds[0], grad_input=result)
    return result


def window_jam(grad: Tensor, x: Tensor, *, a: float, b: float) -> Any:
    """grad·U(0, 1) where a ≤ x ≤ b"""
    bounds = _outer(a, b, x.dtype)
    if bounds is None or not _can_mask(grad, x):
        return NotImplemented
    result = full_jam(grad)
    _aten.hardtanh_backward.grad_input(result, x, *bounds, grad_input=result)
    return result


def noise(grad: Tensor, *, sigma: float) -> Tensor:
    """grad + N(0, sigma²)"""
    return torch.randn_like(grad).mul_(sigma).add_(grad)


def triangular(grad: Tensor, x: Tensor, *, width: float) -> Any:
    """grad·max(0, 1 − |x|/width)"""
    slope = x.abs().div_(-max(width, 1e-6)).add_(1).clamp_(min=0)
    return slope.mul_(grad) if slope.dtype == grad.dtype else NotImplemented


def fast_sigmoid(grad: Tensor, x: Tensor, *, slope: float) -> Any:
    """grad / (1 + slope·|x|)²"""
    if grad.dtype != x.dtype:
        return NotImplemented
    root = x.abs().mul_(slope).add_(1)
    return torch.div(grad, root, out=torch.empty_like(grad)).div_(root)


def arctan(grad: Tensor, x: Tensor, *, alpha: float) -> Any:
    """grad·(alpha/2) / (1 + (π·alpha·x/2)²)"""
    if grad.dtype != x.dtype:
        return NotImplemented
    denominator = x.square().mul_(math.pi**2 * alpha / 2).add_(2 / alpha)
    return torch.div(grad, denominator, out=denominator)


@functools.lru_cache(maxsize=1024)
def _outer(a: float, b: float, dtype: torch.dtype) -> tuple[float, float] | None:
    """The numbers of a dtype next to a window, outside: PyTorch's kernels take a window without its ends."""
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return None
    ends = torch.tensor([a, b], dtype=dtype)
    if not ends.isfinite().all():
        return None
    outside = torch.tensor([-math.inf, math.inf], dtype=dtype)
    low, high = torch.nextafter(ends, outside).tolist()
    return low, high
