"""Surrogate gradients for spiking networks that are not symmetric around the threshold, or random.

They are meant for a Heaviside forward, as those of `surrogate`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.register import register
from . import masks
from .draws import uniform_like
from .precision import bump, times, wide

__all__ = [
    "leaky_relu_derivative",
    "log_tailed_relu",
    "periodic_exponential",
    "s2nn",
    "sparse_fast_sigmoid",
    "spike_rate_escape",
    "squarewave_fourier",
    "stochastic_spike",
]


@register(
    "spike_rate_escape",
    reference="Gerstner & Kistler 2002, doi:10.1017/CBO9780511815706 (escape noise)",
    peers="snnTorch spike_rate_escape",
    requires="beta >= 0",
    examples=({"beta": 0.0}, {"beta": 0.3, "slope": 2.0}, {"beta": 7.0, "slope": 0.0}),
)
def spike_rate_escape(grad: Tensor, x: Tensor, *, beta: float = 1.0, slope: float = 25.0) -> Tensor:
    """grad·slope·e^(−beta·|x − 1|)

    As in snnTorch, the peak is at x = 1, also for a step at 0.

    Args:
        beta: The inverse of the width, at least 0.
        slope: The height.
    """
    return times(grad, slope * torch.exp(-beta * (wide(x) - 1).abs()), x)


@register(
    "sparse_fast_sigmoid",
    reference="Perez-Nieves & Goodman 2021, arXiv:2105.08810",
    peers="snnTorch SFS",
    requires="slope >= 0",
    examples=({"slope": 0.3, "bound": -1.0}, {"slope": 5.0, "bound": 0.0}),
    pointwise=True,
)
def sparse_fast_sigmoid(
    grad: Tensor, x: Tensor, *, slope: float = 25.0, bound: float = 1.0
) -> Tensor:
    """grad·1[x > bound] / (1 + slope·|x|)²

    As in snnTorch, the gradient passes on one side only; in the paper it passes where ``|x| < bound``.

    Args:
        slope: The slope of `fast_sigmoid`, at least 0.
        bound: Where the gradient begins to pass.
    """
    root = 1 + slope * wide(x).abs()
    passed = torch.where(x > bound, 1 / root / root, 0)
    return times(grad, passed, x)


def _leaky_by_leak(grad: Tensor, x: Tensor, *, leak: float, slope: float) -> Tensor:
    return grad * wide(x).clamp(max=0)


def _leaky_by_slope(grad: Tensor, x: Tensor, *, leak: float, slope: float) -> Tensor:
    return grad * wide(x).clamp(min=0)


@register(
    "leaky_relu_derivative",
    reference="Maas et al. 2013, Rectifier nonlinearities improve neural network acoustic models",
    peers=("SpikingJelly LeakyKReLU", "snnTorch LSO"),
    mask=masks.nonnegative,
    learns={"leak": _leaky_by_leak, "slope": _leaky_by_slope},
    examples=({"leak": 0.1}, {"leak": 0.3, "slope": -2.0}, {"leak": -1.0, "slope": 0.0}),
    pointwise=True,
)
def leaky_relu_derivative(
    grad: Tensor, mask: Tensor, *, leak: float = 0.0, slope: float = 1.0
) -> Tensor:
    """slope·grad where x ≥ 0, leak·grad elsewhere

    snnTorch's LSO is ``leak=0.1``, but has the leak at x = 0 too.

    Args:
        leak: The factor where x < 0.
        slope: The factor where x ≥ 0.
    """
    return torch.where(mask, slope * grad, leak * grad)


def _s2nn_by_alpha(grad: Tensor, x: Tensor, *, alpha: float, beta: float) -> Tensor:
    below = wide(x).clamp(max=0)
    return grad * below * bump(alpha * below)


def _s2nn_by_beta(grad: Tensor, x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return grad * torch.log1p(wide(x).clamp(min=0))


@register(
    "s2nn",
    reference="Suetake et al. 2022, arXiv:2201.10879",
    peers="SpikingJelly S2NN",
    requires="alpha >= 0",
    learns={"alpha": _s2nn_by_alpha, "beta": _s2nn_by_beta},
    examples=({"alpha": 0.0, "beta": 0.3}, {"alpha": 10.0, "beta": -1.0}),
)
def s2nn(grad: Tensor, x: Tensor, *, alpha: float = 4.0, beta: float = 1.0) -> Tensor:
    """grad·alpha·σ(alpha·x)·(1 − σ(alpha·x)) where x < 0, grad·beta/(x + 1) elsewhere

    Args:
        alpha: The slope of the sigmoid below 0, at least 0.
        beta: The value at 0.
    """
    x_wide = wide(x)
    # clamped also in the branch that is not taken, where 1/0 would be NaN in a second derivative
    slope = torch.where(x < 0, alpha * bump(alpha * x_wide), beta / (x_wide.clamp(min=0) + 1))
    return times(grad, slope, x)


@register(
    "squarewave_fourier",
    reference="SpikingJelly",
    peers="SpikingJelly SquarewaveFourierSeries",
    requires="n >= 1, period > 0",
    examples=({"n": 1}, {"n": 5, "period": 2.0}, {"n": 3, "period": 0.5}),
)
def squarewave_fourier(grad: Tensor, x: Tensor, *, n: int = 2, period: float = 8.0) -> Tensor:
    """grad·(4/period)·Σ_(i=1)^(n−1) cos(2π·(2i − 1)·x/period)

    The derivative of the Fourier series of a square wave. SpikingJelly's documentation has n terms, its code, and so
    this rule, n − 1: the default is one cosine. NaN where x is infinite.

    Args:
        n: One more than the number of terms, at least 1.
        period: The period, above 0.
    """
    # in whole turns, which can be taken off exactly; the product 2π·x would lose the digits of a large x
    turns = torch.fmod(wide(x), period) / period
    harmonics = [(2 * i - 1) * turns for i in range(1, n)]
    terms = [torch.cos(2 * math.pi * (t - t.round())) for t in harmonics]
    return times(grad, 4 / period * sum(terms, torch.zeros_like(turns)), x)


def _log_tailed_by_alpha(grad: Tensor, x: Tensor, *, alpha: float) -> Tensor:
    return grad * wide(x).clamp(max=0)


@register(
    "log_tailed_relu",
    reference="Cai et al. 2017, arXiv:1702.00953 (half-wave Gaussian quantization)",
    peers="SpikingJelly LogTailedReLU",
    learns={"alpha": _log_tailed_by_alpha},
    examples=({"alpha": 0.1}, {"alpha": -2.0}),
    pointwise=True,
)
def log_tailed_relu(grad: Tensor, x: Tensor, *, alpha: float = 0.0) -> Tensor:
    """alpha·grad where x < 0, grad where 0 ≤ x ≤ 1, grad/x where x > 1

    SpikingJelly has alpha at x = 0 too.

    Args:
        alpha: The factor below 0.
    """
    return times(grad, torch.where(x < 0, alpha, 1 / wide(x).clamp(min=1)), x)


@register(
    "periodic_exponential",
    reference="Weidel & Sheik 2021, arXiv:2111.01456 (WaveSense)",
    peers="sinabs PeriodicExponential",
    requires="width > 0, period > 0",
    examples=({"width": 0.3, "period": 2.0}, {"width": 5.0, "period": 0.3}),
)
def periodic_exponential(
    grad: Tensor, x: Tensor, *, width: float = 0.5, period: float = 1.0
) -> Tensor:
    """grad·e^(−d/width), d = −x where x < 0, else twice the distance from x to the nearest multiple of period

    For neurons that fire several spikes in one step: a spike at each multiple of the threshold. NaN where x = ∞.

    Args:
        width: The width of a peak, above 0.
        period: The threshold of the neuron, above 0. x is the membrane potential minus this threshold.
    """
    x_wide = wide(x)
    phase = torch.fmod(x_wide.clamp(min=0), period)
    above = 2 * torch.minimum(phase, period - phase)
    distance = torch.where(x < 0, -x_wide, above)
    return times(grad, torch.exp(-distance / width), x)


@register(
    "stochastic_spike",
    reference="snnTorch; Eshraghian et al. 2023, arXiv:2109.12894",
    peers="snnTorch SSO",
    mask=masks.positive,
    random=True,
    examples=({"mean": 0.3, "variance": 2.0}, {"mean": -1.0, "variance": 0.0}),
)
def stochastic_spike(
    grad: Tensor,
    mask: Tensor,
    *,
    mean: float = 0.0,
    variance: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """grad where x > 0, grad·variance·(U(0, 1) − 1/2 + mean) elsewhere

    Args:
        mean: The mean of the factor below the threshold, in units of variance.
        variance: The width of the interval from which the factor is drawn.
        generator: What the numbers are drawn from; None for the global generator.
    """
    factor = (uniform_like(grad, generator) - 0.5 + mean) * variance
    return torch.where(mask, grad, grad * factor)
