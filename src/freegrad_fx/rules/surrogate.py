"""Surrogate gradients for spiking networks: smooth replacements for the derivative of the Heaviside step.

They are meant for a Heaviside forward. For a network with other activations, ``forward="heaviside"`` replaces them.

A surrogate is the derivative of a smooth step, its primitive function. A parameter that is learnt gets the derivative
of the primitive with respect to it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.register import register
from .precision import bump, constant, times, wide

__all__ = [
    "arctan",
    "circle",
    "fast_sigmoid",
    "gaussian",
    "log_abs",
    "multi_gaussian",
    "piecewise_exponential",
    "piecewise_leaky",
    "piecewise_quadratic",
    "q_pseudo_spike",
    "sigmoid_derivative",
    "softsign",
    "superspike",
    "tanh_derivative",
]


def _in_one_buffer_sigmoid(grad: Tensor, x: Tensor, *, slope: float) -> Any:
    if grad.dtype != x.dtype:
        return NotImplemented
    root = x.abs().mul_(constant(slope, x)).add_(constant(1, x))
    return torch.div(grad, root).div_(root)


def _fast_sigmoid_by_slope(grad: Tensor, x: Tensor, *, slope: float) -> Tensor:
    root = 1 + slope * wide(x).abs()
    return -grad * wide(x) * wide(x).abs() / root / root


@register(
    "fast_sigmoid",
    reference="Zenke & Ganguli 2018, doi:10.1162/neco_a_01086",
    peers=("snnTorch fast_sigmoid", "Norse superspike"),
    requires="slope >= 0",
    fast=_in_one_buffer_sigmoid,
    learns={"slope": _fast_sigmoid_by_slope},
    examples=({"slope": 0.0}, {"slope": 0.3}, {"slope": 5.0}, {"slope": 100.0}),
    pointwise=True,
)
def fast_sigmoid(grad: Tensor, x: Tensor, *, slope: float = 25.0) -> Tensor:
    """grad / (1 + slope·|x|)²

    Norse's function ignores its parameter, so it always has the slope 1. snnax does not square.

    Args:
        slope: How fast the curve falls, at least 0.
    """
    root = 1 + slope * x.abs()
    return grad / root / root  # not divided by root², which overflows in float16 for |x| > 10


def _in_one_buffer_arctan(grad: Tensor, x: Tensor, *, alpha: float) -> Any:
    if grad.dtype != x.dtype:
        return NotImplemented
    factor, term = constant(math.pi**2 * alpha / 2, x), constant(2 / alpha, x)
    denominator = x.square().mul_(factor).add_(term)
    return torch.div(grad, denominator, out=denominator)


def _arctan_by_alpha(grad: Tensor, x: Tensor, *, alpha: float) -> Tensor:
    return grad * wide(x) / (2 + (math.pi * alpha * wide(x)).square() / 2)


@register(
    "arctan",
    reference="Fang et al. 2021, arXiv:2007.05785",
    peers=("snnTorch atan", "SpikingJelly ATan"),
    requires="alpha > 0",
    fast=_in_one_buffer_arctan,
    learns={"alpha": _arctan_by_alpha},
    examples=({"alpha": 0.3}, {"alpha": 1.0}, {"alpha": 5.0}),
    pointwise=True,
)
def arctan(grad: Tensor, x: Tensor, *, alpha: float = 2.0) -> Tensor:
    """grad·(alpha/2) / (1 + (π·alpha·x/2)²)

    Args:
        alpha: Twice the value at 0, above 0.
    """
    # numerator and denominator are divided by alpha/2
    return grad / (math.pi**2 * alpha / 2 * x.square() + 2 / alpha)


def _softsign_by_alpha(grad: Tensor, x: Tensor, *, alpha: float) -> Tensor:
    root = 1 + alpha * wide(x).abs()
    return grad * wide(x) / 2 / root / root


@register(
    "softsign",
    reference="Zenke & Ganguli 2018, doi:10.1162/neco_a_01086",
    peers="SpikingJelly SoftSign",
    requires="alpha > 0",
    learns={"alpha": _softsign_by_alpha},
    examples=({"alpha": 0.3}, {"alpha": 1.0}, {"alpha": 50.0}),
    pointwise=True,
)
def softsign(grad: Tensor, x: Tensor, *, alpha: float = 2.0) -> Tensor:
    """grad·(alpha/2) / (1 + alpha·|x|)²

    Args:
        alpha: Twice the slope at 0, above 0. The shape is that of `fast_sigmoid` with ``slope=alpha``.
    """
    root = 1 + alpha * wide(x).abs()
    return times(grad, alpha / 2 / root / root, x)


def _superspike_by_alpha(grad: Tensor, x: Tensor, *, alpha: float) -> Tensor:
    return grad * wide(x) / (1 + wide(x).abs())


@register(
    "superspike",
    reference="Zenke & Ganguli 2018, doi:10.1162/neco_a_01086",
    peers="SpikingJelly SuperSpike",
    requires="alpha >= 0",
    learns={"alpha": _superspike_by_alpha},
    examples=({"alpha": 0.0}, {"alpha": 0.3}, {"alpha": 7.0}),
    pointwise=True,
)
def superspike(grad: Tensor, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """grad·alpha / (1 + |x|)²

    In the paper, and in Norse's ``SuperSpike``, alpha multiplies x instead, as in `fast_sigmoid`.

    Args:
        alpha: The slope at 0, at least 0. It does not change the width.
    """
    root = 1 + wide(x).abs()
    return times(grad, alpha / root / root, x)


def _sigmoid_derivative_by_slope(grad: Tensor, x: Tensor, *, slope: float) -> Tensor:
    return grad * wide(x) * bump(slope * wide(x))


@register(
    "sigmoid_derivative",
    reference="Neftci et al. 2019, arXiv:1901.09948",
    peers=("snnTorch sigmoid", "SpikingJelly Sigmoid"),
    requires="slope >= 0",
    learns={"slope": _sigmoid_derivative_by_slope},
    examples=({"slope": 0.0}, {"slope": 0.3}, {"slope": 25.0}),
)
def sigmoid_derivative(grad: Tensor, x: Tensor, *, slope: float = 4.0) -> Tensor:
    """grad·slope·σ(slope·x)·(1 − σ(slope·x))

    The default is SpikingJelly's. snnTorch has 25, and its formula overflows to NaN for x < −3.6 in float32.

    Args:
        slope: Four times the value at 0, at least 0.
    """
    return times(grad, slope * bump(slope * wide(x)), x)


def _piecewise_quadratic_by_alpha(grad: Tensor, x: Tensor, *, alpha: float) -> Tensor:
    return grad * wide(x) * (1 - alpha * wide(x).abs()).clamp(min=0)


@register(
    "piecewise_quadratic",
    reference="Esser et al. 2016, arXiv:1603.08270; Bellec et al. 2018, arXiv:1803.09574",
    peers="SpikingJelly PiecewiseQuadratic",
    requires="alpha > 0",
    learns={"alpha": _piecewise_quadratic_by_alpha},
    examples=({"alpha": 0.3}, {"alpha": 4.0}),
    pointwise=True,
)
def piecewise_quadratic(grad: Tensor, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """grad·alpha·max(0, 1 − alpha·|x|)

    The triangle of area 1; `triangular` has the height 1.

    Args:
        alpha: The height, and the inverse of the half-width, above 0.
    """
    return times(grad, alpha * (1 - alpha * wide(x).abs()).clamp(min=0), x)


def _piecewise_exponential_by_alpha(grad: Tensor, x: Tensor, *, alpha: float) -> Tensor:
    return grad * wide(x) / 2 * torch.exp(-alpha * wide(x).abs())


@register(
    "piecewise_exponential",
    reference="Shrestha & Orchard 2018, arXiv:1810.08646",
    peers=("SpikingJelly PiecewiseExp", "sinabs SingleExponential"),
    requires="alpha > 0",
    learns={"alpha": _piecewise_exponential_by_alpha},
    examples=({"alpha": 0.3}, {"alpha": 4.0}),
)
def piecewise_exponential(grad: Tensor, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """grad·(alpha/2)·e^(−alpha·|x|)

    sinabs' curve is twice as high: ``grad_width=w`` is ``alpha=1/w`` followed by `scale` with ``s=2``.

    Args:
        alpha: The inverse of the width, above 0.
    """
    return times(grad, alpha / 2 * torch.exp(-alpha * wide(x).abs()), x)


def _gaussian_by_alpha(grad: Tensor, x: Tensor, *, alpha: float) -> Tensor:
    return grad * wide(x) / math.sqrt(math.pi) * torch.exp(-(alpha * wide(x)).square())


@register(
    "gaussian",
    reference="Wu et al. 2018, doi:10.3389/fnins.2018.00331 (STBP)",
    peers=("SpikingJelly Erf", "Norse heavi_erfc", "sinabs Gaussian"),
    requires="alpha > 0",
    learns={"alpha": _gaussian_by_alpha},
    examples=({"alpha": 0.3}, {"alpha": 10.0}),
)
def gaussian(grad: Tensor, x: Tensor, *, alpha: float = 2.0) -> Tensor:
    """grad·(alpha/√π)·e^(−alpha²·x²)

    sinabs has the standard deviation as its parameter: σ is ``alpha=1/(σ·√2)``. Norse multiplies by 2/√π instead of
    alpha/√π.

    Args:
        alpha: The inverse of the width, above 0.
    """
    return times(grad, alpha / math.sqrt(math.pi) * torch.exp(-(alpha * wide(x)).square()), x)


@register(
    "tanh_derivative",
    reference="Norse",
    peers=("Norse heavi_tanh", "Norse logistic"),
    examples=({"slope": 0.0}, {"slope": 0.3}, {"slope": -5.0}),
)
def tanh_derivative(grad: Tensor, x: Tensor, *, slope: float = 1.0) -> Tensor:
    """grad·(1 − tanh²(slope·x))

    Not multiplied by the slope: the value at 0 is 1 for every slope.

    Args:
        slope: The inverse of the width.
    """
    return times(grad, 4 * bump(2 * slope * wide(x)), x)


def _normal(x: Tensor, mean: float, deviation: float) -> Tensor:
    return torch.exp(-((x - mean) / deviation).square() / 2) / (deviation * math.sqrt(2 * math.pi))


@register(
    "multi_gaussian",
    reference="Yin et al. 2021, doi:10.1038/s42256-021-00397-w",
    peers="sinabs MultiGaussian",
    requires="sigma > 0, s > 0",
    examples=({"sigma": 0.3, "h": 0.0}, {"sigma": 2.5, "h": 0.5, "s": 3.0}, {"s": 1.0}),
)
def multi_gaussian(
    grad: Tensor, x: Tensor, *, sigma: float = 0.5, h: float = 0.15, s: float = 6.0
) -> Tensor:
    """grad·((1 + h)·N(x; 0, sigma) − h·N(x; sigma, s·sigma) − h·N(x; −sigma, s·sigma)), N the normal density

    Negative away from 0, for h > 0.

    Args:
        sigma: The standard deviation of the peak, above 0.
        h: The weight of the negative parts.
        s: The standard deviation of the negative parts in units of sigma, above 0.
    """
    x_wide = wide(x)
    sides = _normal(x_wide, sigma, s * sigma) + _normal(x_wide, -sigma, s * sigma)
    return times(grad, (1 + h) * _normal(x_wide, 0.0, sigma) - h * sides, x)


def _inside(x: Tensor, *, width: float) -> Tensor:
    """1[|x| < width]"""
    return x.abs() < width


def _piecewise_leaky_by_width(grad: Tensor, x: Tensor, *, width: float, leak: float) -> Tensor:
    return grad * torch.where(x.abs() < width, -x / (2 * width**2), -leak * x.sign())


def _piecewise_leaky_by_leak(grad: Tensor, x: Tensor, *, width: float, leak: float) -> Tensor:
    return grad * x.sign() * (wide(x).abs() - width).clamp(min=0)


@register(
    "piecewise_leaky",
    reference="Wu et al. 2018, doi:10.3389/fnins.2018.00331 (STBP)",
    peers="SpikingJelly PiecewiseLeakyReLU",
    requires="width > 0",
    mask=_inside,
    learns={"width": _piecewise_leaky_by_width, "leak": _piecewise_leaky_by_leak},
    examples=({"width": 0.3, "leak": 0.0}, {"width": 5.0, "leak": -0.5}),
    pointwise=True,
)
def piecewise_leaky(
    grad: Tensor, mask: Tensor, *, width: float = 1.0, leak: float = 0.01
) -> Tensor:
    """grad/(2·width) where |x| < width, leak·grad elsewhere

    Args:
        width: The half-width, above 0.
        leak: The factor outside.
    """
    return torch.where(mask, grad / (2 * width), leak * grad)


def _log_abs_by_alpha(grad: Tensor, x: Tensor, *, alpha: float) -> Tensor:
    return grad * wide(x) / (1 + alpha * wide(x).abs())


@register(
    "log_abs",
    reference="SpikingJelly",
    peers="SpikingJelly NonzeroSignLogAbs",
    requires="alpha > 0",
    learns={"alpha": _log_abs_by_alpha},
    examples=({"alpha": 0.3}, {"alpha": 20.0}),
    pointwise=True,
)
def log_abs(grad: Tensor, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """grad / (1/alpha + |x|)

    Args:
        alpha: The value at 0, above 0.
    """
    return times(grad, 1 / (1 / alpha + wide(x).abs()), x)


def _q_pseudo_spike_by_alpha(grad: Tensor, x: Tensor, *, alpha: float) -> Tensor:
    tail = 2 / (alpha - 1) * wide(x).abs()
    change = torch.log1p(tail) - tail / (1 + tail)
    return grad * x.sign() / 2 * (1 + tail).pow(1 - alpha) * change


@register(
    "q_pseudo_spike",
    reference="Herranz-Celotti & Rouat 2022, arXiv:2202.00282",
    peers="SpikingJelly QPseudoSpike",
    requires="alpha > 1",
    learns={"alpha": _q_pseudo_spike_by_alpha},
    examples=({"alpha": 1.25}, {"alpha": 7.0}),
)
def q_pseudo_spike(grad: Tensor, x: Tensor, *, alpha: float = 2.0) -> Tensor:
    """grad·(1 + 2·|x|/(alpha − 1))^(−alpha)

    Args:
        alpha: How fast the tails fall, above 1. ``alpha=2`` is `fast_sigmoid` with ``slope=2``.
    """
    return times(grad, (1 + 2 / (alpha - 1) * wide(x).abs()).pow(-alpha), x)


@register(
    "circle",
    reference="Norse",
    peers="Norse heavi_circ",
    requires="alpha > 0",
    examples=({"alpha": 0.3}, {"alpha": 5.0}),
)
def circle(grad: Tensor, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """grad·alpha³ / (x² + alpha²)^1.5

    Args:
        alpha: The width, above 0. The value at 0 is 1.
    """
    return times(grad, (1 + (wide(x) / alpha).square()).pow(-1.5), x)
