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
from .precision import constant

__all__ = [
    "centralize",
    "d_linear",
    "d_relu",
    "decay",
    "nan_to_zero",
    "noise",
    "rectangular",
    "reverse",
    "scale",
    "stop",
    "triangular",
]


@register(
    "d(ReLU)",
    reference="FreeGrad; the derivative of max(0, x)",
    peers="FreeGrad d(ReLU)",
    mask=masks.positive,
    fast=masks.where_positive,
    pointwise=True,
)
def d_relu(grad: Tensor, mask: Tensor) -> Tensor:
    """grad·1[x > 0]"""
    return masks.only_where(mask, grad)


@register(
    "d(Linear)",
    reference="FreeGrad; the derivative of the identity",
    peers="FreeGrad d(Linear)",
    sparse=True,
    pointwise=True,
)
def d_linear(grad: Tensor) -> Tensor:
    """grad"""
    return grad


@register(
    "rectangular",
    reference="Troiano et al. 2025, doi:10.1016/j.neucom.2025.131178",
    peers=("FreeGrad rectangular", "SpikingJelly Rect"),
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
    pointwise=True,
)
def rectangular(grad: Tensor, mask: Tensor, *, a: float = -0.5, b: float = 0.5) -> Tensor:
    """grad·1[a ≤ x ≤ b], both ends inclusive

    SpikingJelly's window has the area 1 and leaves the ends out: ``alpha·1[|x| < 1/(2·alpha)]``.

    Args:
        a: The lower end of the window, at most `b`.
        b: The upper end.
    """
    return masks.only_where(mask, grad)


def _fast_triangular(grad: Tensor, x: Tensor, *, width: float) -> Any:
    slope = x.abs().div_(constant(-max(width, 1e-6), x)).add_(constant(1, x)).clamp_(min=0)
    return slope.mul_(grad) if slope.dtype == grad.dtype else NotImplemented


@register(
    "triangular",
    reference="Bellec et al. 2018, arXiv:1803.09574",
    peers=("FreeGrad triangular", "Norse triangle"),
    fast=_fast_triangular,
    examples=({"width": 0.25}, {"width": 0.3}, {"width": 2.5}, {"width": 0.0}, {"width": -1.0}),
    pointwise=True,
)
def triangular(grad: Tensor, x: Tensor, *, width: float = 1.0) -> Tensor:
    """grad·max(0, 1 − |x|/max(width, 10⁻⁶))

    Norse's parameter is the height, 0.3, and its width is 1. `piecewise_quadratic` has the area 1.

    Args:
        width: The half-width; less than 10⁻⁶ counts as 10⁻⁶.
    """
    width = width.clamp(min=1e-6) if isinstance(width, Tensor) else max(width, 1e-6)
    return grad * (1 - x.abs() / width).clamp(min=0)


@register(
    "scale",
    reference="FreeGrad",
    peers=("FreeGrad scale", "optax scale"),
    sparse=True,
    examples=({"s": -1.5}, {"s": 0.0}, {"s": 0.1}, {"s": 7.0}),
    pointwise=True,
)
def scale(grad: Tensor, *, s: float = 1.0) -> Tensor:
    """s·grad

    With a tensor, whose shape broadcasts to that of the gradient, this is gradient routing (Cloud et al. 2024,
    arXiv:2410.04332): set the mask of each batch with ``set_rule_parameter``.

    Args:
        s: The factor, a number or a tensor.
    """
    return s * grad


@register(
    "reverse",
    reference="Ganin & Lempitsky 2015, arXiv:1409.7495 (gradient reversal, DANN)",
    peers="pytorch-revgrad RevGrad",
    sparse=True,
    examples=({"alpha": -2.0}, {"alpha": 0.0}, {"alpha": 0.3}),
    pointwise=True,
)
def reverse(grad: Tensor, *, alpha: float = 1.0) -> Tensor:
    """−alpha·grad

    Args:
        alpha: The factor.
    """
    return -alpha * grad


def _fast_noise(grad: Tensor, *, sigma: float, generator: torch.Generator | None = None) -> Tensor:
    return normal_like(grad, generator).mul_(sigma).add_(grad)


@register(
    "noise",
    reference="Neelakantan et al. 2015, arXiv:1511.06807",
    peers=("FreeGrad noise", "optax add_noise"),
    linear=False,
    random=True,
    requires="sigma >= 0",
    fast=_fast_noise,
    examples=({"sigma": 0.0}, {"sigma": 0.3}, {"sigma": 2.5}),
)
def noise(grad: Tensor, *, sigma: float = 0.1, generator: torch.Generator | None = None) -> Tensor:
    """grad + N(0, sigma²)

    optax, as the paper, lowers the variance at each step; set sigma with ``set_rule_parameter`` for that.

    Args:
        sigma: The standard deviation, at least 0.
        generator: What the numbers are drawn from; None for the global generator.
    """
    return grad + sigma * normal_like(grad, generator)


@register(
    "centralize",
    reference="Yong et al. 2020, arXiv:2004.01461",
    peers=("FreeGrad centralize", "optax centralize"),
    reducing=True,
    examples=({"dim": 0}, {"dim": 1}, {"dim": (0, -1)}),
)
def centralize(grad: Tensor, *, dim: int | tuple[int, ...] = -1) -> Tensor:
    """grad − mean(grad, dim)

    The paper and optax take the mean over all dims but one, and only of weights: ``dim=(1, 2, 3)`` for a convolution.

    Args:
        dim: The dims of the mean.
    """
    return grad - grad.mean(dim=dim, keepdim=True)


@register(
    "decay",
    reference="Hanson & Pratt 1988, Comparing biases for minimal network construction with back-propagation",
    peers=("optax add_decayed_weights", "torch.optim.SGD weight_decay"),
    kinds="parameter",
    linear=False,
    examples=({"rate": 0.0}, {"rate": 0.3}, {"rate": -2.0}),
    pointwise=True,
)
def decay(grad: Tensor, x: Tensor, *, rate: float = 0.01) -> Tensor:
    """grad + rate·x

    The weight decay that is coupled with the gradient: momentum and adaptive steps see it. AdamW's is decoupled.

    Args:
        rate: The decay of a step, before the learning rate.
    """
    return grad + rate * x


@register("nan_to_zero", reference="torch.nan_to_num", peers="optax zero_nans", pointwise=True)
def nan_to_zero(grad: Tensor) -> Tensor:
    """grad where it is finite, 0 where grad is infinite or NaN

    optax leaves infinite entries as they are.
    """
    return torch.where(grad.isfinite(), grad, 0)


@register(
    "stop",
    reference="torch.Tensor.detach",
    peers="jax.lax.stop_gradient",
    sparse=True,
    pointwise=True,
)
def stop(grad: Tensor) -> Tensor:
    """0, whatever grad is

    Unlike a factor of 0, also where the gradient is infinite or NaN.
    """
    return torch.zeros_like(grad)
