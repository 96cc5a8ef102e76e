"""Straight-through estimators and slopes of quantizers, which pass the gradient through a rounding or a sign."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.register import register
from . import masks
from .precision import bump, per_row, times, wide

__all__ = [
    "abs_subgradient",
    "approx_sign",
    "clipped_straight_through",
    "dorefa_activation",
    "dorefa_weight",
    "dsq",
    "error_decay",
    "magnitude_aware_sign",
    "n2uq",
    "reste",
    "straight_through",
    "swish_sign",
    "xnor_weight",
]


@register(
    "straight_through",
    reference="Bengio et al. 2013, arXiv:1308.3432",
    peers=(
        "Brevitas round_ste",
        "SpikingJelly DeterministicPass",
        "snnTorch straight_through_estimator",
    ),
    sparse=True,
    pointwise=True,
)
def straight_through(grad: Tensor) -> Tensor:
    """grad"""
    return grad


@register(
    "clipped_straight_through",
    reference="Hubara et al. 2016, arXiv:1602.02830",
    peers=("larq SteSign", "larq SteTern"),
    requires="bound >= 0",
    mask=masks.ball,
    fast=masks.where_in_ball,
    examples=({"bound": 0.0}, {"bound": 0.3}, {"bound": 4.0}, {"bound": math.inf}),
    pointwise=True,
)
def clipped_straight_through(grad: Tensor, mask: Tensor, *, bound: float = 1.0) -> Tensor:
    """grad·1[|x| ≤ bound], the bound inclusive

    XNOR-Net's published code leaves the bound out: its gradient passes where ``|x| < 1``.

    Args:
        bound: The largest ``|x|`` at which the gradient passes, at least 0.
    """
    return masks.only_where(mask, grad)


@register(
    "approx_sign",
    reference="Liu et al. 2018, arXiv:1808.00278 (Bi-Real Net)",
    peers=("larq ApproxSign", "bitorch ApproxSign"),
    pointwise=True,
)
def approx_sign(grad: Tensor, x: Tensor) -> Tensor:
    """grad·max(0, 2 − 2·|x|)

    The derivative of a piecewise quadratic approximation of sign(x).
    """
    return times(grad, (2 - 2 * wide(x).abs()).clamp(min=0), x)


@register(
    "swish_sign",
    reference="Darabi et al. 2018, arXiv:1812.11800",
    peers=("larq SwishSign", "bitorch SwishSign"),
    examples=({"beta": 0.0}, {"beta": 0.3}, {"beta": -2.0}, {"beta": 10.0}),
)
def swish_sign(grad: Tensor, x: Tensor, *, beta: float = 5.0) -> Tensor:
    """grad·beta·(2 − beta·x·tanh(beta·x/2)) / (1 + cosh(beta·x))

    The cosh of larq's formula overflows for ``|beta·x| > 88`` in float32; this form, with the derivative of the sigmoid
    instead, is 0 there.

    Args:
        beta: The inverse of the width.
    """
    z = (beta * wide(x)).clamp(-1000, 1000)  # ∞·0 would be NaN
    return times(grad, 2 * beta * bump(z) * (2 - z * torch.tanh(z / 2)), x)


@register(
    "error_decay",
    reference="Qin et al. 2020, arXiv:1909.10788 (IR-Net, error decay estimator)",
    examples=({"t": 0.01, "k": 100.0}, {"t": 0.3, "k": 2.0}, {"t": 0.0}),
)
def error_decay(grad: Tensor, x: Tensor, *, t: float = 10.0, k: float = 1.0) -> Tensor:
    """grad·k·t·(1 − tanh²(t·x))

    In the paper, t = 10^(−3 + 4·epoch/epochs) and k = max(1/t, 1). The defaults are those of the last epoch. Set both
    at each epoch with ``set_rule_parameter``.

    Args:
        t: The inverse of the width.
        k: The factor of the height.
    """
    return times(grad, 4 * k * t * bump(2 * t * wide(x)), x)


@register(
    "magnitude_aware_sign",
    reference="Liu et al. 2018, arXiv:1808.00278 (Bi-Real Net)",
    peers="larq MagnitudeAwareSign",
    kinds="parameter",
    reducing=True,
)
def magnitude_aware_sign(grad: Tensor, x: Tensor) -> Tensor:
    """grad·1[|x| ≤ 1]·mean|x|, the mean over dims 1…, which is over each output channel

    Over all entries if there are fewer than two dims. larq's weights have the output channel last.
    """
    size = wide(x).abs()
    return times(grad, torch.where(size <= 1, size.mean(dim=per_row(x), keepdim=True), 0), x)


def _in_unit_interval(x: Tensor) -> Tensor:
    """1[0 ≤ x ≤ 1]"""
    return masks.window(x, a=0.0, b=1.0)


@register(
    "dorefa_activation",
    reference="Zhou et al. 2016, arXiv:1606.06160 (DoReFa-Net)",
    peers="larq DoReFa",
    mask=_in_unit_interval,
    pointwise=True,
)
def dorefa_activation(grad: Tensor, mask: Tensor) -> Tensor:
    """grad·1[0 ≤ x ≤ 1]"""
    return masks.only_where(mask, grad)


@register(
    "xnor_weight",
    reference="Rastegari et al. 2016, arXiv:1603.05279 (XNOR-Net)",
    peers="XNOR-Net-PyTorch updateBinaryGradWeight",
    kinds="parameter",
    reducing=True,
)
def xnor_weight(grad: Tensor, x: Tensor) -> Tensor:
    """n·(1 − 1/s)·(mean|x|·1[|x| ≤ 1]·grad + sign(x)·mean(sign(x)·grad)), the means over each output channel

    n is the number of weights of an output channel, and s the number of input channels, the size of dim 1. The
    factor n·(1 − 1/s) is that of the authors' code and is not in the paper; for a depthwise convolution it is 0.
    With fewer than two dims, all entries are one channel, and s = n.
    """
    weight, g = wide(x), wide(grad)
    dims = per_row(x)
    n = math.prod(x.shape[d] for d in dims)
    s = x.shape[1] if x.dim() > 1 else n
    sign, size = weight.sign(), weight.abs()
    first = torch.where(size <= 1, size.mean(dim=dims, keepdim=True) * g, 0)
    second = sign * (sign * g).mean(dim=dims, keepdim=True)
    result = n * (1 - 1 / max(s, 1)) * (first + second)
    return result.to(torch.promote_types(grad.dtype, x.dtype))


@register(
    "dorefa_weight",
    reference="Zhou et al. 2016, arXiv:1606.06160 (DoReFa-Net)",
    peers="tensorpack DoReFa-Net fw",
    kinds="parameter",
    reducing=True,
)
def dorefa_weight(grad: Tensor, x: Tensor) -> Tensor:
    """(1 − t²)·(grad − 1[|t| = m]·sign(t)·Σ(grad·t)/(m·k))/m with t = tanh(x), m = max|t|, over all entries

    The derivative of ``t/m``: straight through the rounding of the forward `dorefa`. k is the number of entries of
    the largest magnitude, which share the gradient of the maximum, as in the authors' code.
    """
    t, g = wide(x).tanh(), wide(grad)
    size = t.abs()
    largest = size.amax() if size.numel() else size.new_ones(())
    m = torch.where(largest == 0, 1, largest)
    ends = size == m
    of_max = torch.where(ends, t.sign() * (g * t).sum() / (m * ends.sum().clamp(min=1)), 0)
    return ((1 - t * t) * (g - of_max) / m).to(torch.promote_types(grad.dtype, x.dtype))


@register(
    "abs_subgradient",
    reference="Brevitas",
    peers="Brevitas abs_binary_sign_grad",
    mask=masks.nonnegative,
    pointwise=True,
)
def abs_subgradient(grad: Tensor, mask: Tensor) -> Tensor:
    """grad where x ≥ 0, −grad elsewhere

    The derivative of ``|x|``, with 1 at x = 0, where PyTorch's is 0.
    """
    return torch.where(mask, grad, -grad)


@register(
    "reste",
    reference="Wu et al. 2023, arXiv:2308.06689 (ReSTE)",
    requires="power >= 1, 0 < margin, margin <= bound",
    examples=({"power": 1.0}, {"power": 2.0, "bound": 0.75, "margin": 0.3}),
)
def reste(
    grad: Tensor, x: Tensor, *, power: float = 3.0, bound: float = 1.5, margin: float = 0.1
) -> Tensor:
    """grad·|x|^((1−power)/power)/power where margin < |x| ≤ bound, grad·margin^(1/power)/margin inside, 0 outside

    The derivative of ``sign(x)·|x|^(1/power)``, with a secant where it is too steep. In the paper the power grows:
    1 + (1 − cos(π·epoch/(2·epochs)))·(3 − 1). Set it at each epoch with ``set_rule_parameter``.

    Args:
        power: The root, at least 1. With 1, the rule is `clipped_straight_through`.
        bound: The largest ``|x|`` at which the gradient passes.
        margin: Where the secant ends, above 0 and at most `bound`.
    """
    size = wide(x).abs()
    # clamped also in the branches that are not taken, where the power is infinite at 0
    curve = size.clamp(min=margin).pow((1 - power) / power) / power
    slope = torch.where(size <= margin, margin ** (1 / power) / margin, curve)
    return times(grad, torch.where(x.abs() <= bound, slope, 0), x)


def _dsq_by_alpha(
    grad: Tensor, x: Tensor, *, bits: int, low: float, high: float, alpha: float
) -> Tensor:
    step = (high - low) / (2**bits - 1)
    logarithm = torch.log if isinstance(alpha, Tensor) else math.log
    place = (wide(x) - low) / step
    from_middle = place - place.floor() - 0.5
    curve = torch.tanh(logarithm(2 / alpha - 1) * from_middle) / (1 - alpha)
    # of s and of k, times 1 − alpha
    of_width = 2 / (alpha * (2 - alpha)) * from_middle * (1 - ((1 - alpha) * curve).square())
    change = step / 2 * (curve - of_width) / (1 - alpha)
    return grad * torch.where((x >= low) & (x <= high), change, 0)


@register(
    "dsq",
    reference="Gong et al. 2019, arXiv:1908.05033 (differentiable soft quantization)",
    requires="bits >= 1, low < high, 0 < alpha, alpha < 1",
    learns={"alpha": _dsq_by_alpha},
    examples=(
        {"bits": 1, "alpha": 0.5},
        {"bits": 2, "low": 0.0, "high": 2.0},
        {"low": -0.5, "high": 0.75, "alpha": 0.9},
    ),
)
def dsq(
    grad: Tensor,
    x: Tensor,
    *,
    bits: int = 2,
    low: float = -1.0,
    high: float = 1.0,
    alpha: float = 0.2,
) -> Tensor:
    """grad·(Δ/2)·s·k·(1 − tanh²(k·(x − m))) where low ≤ x ≤ high, else 0; Δ = (high − low)/(2^bits − 1)

    m is the middle of the interval of width Δ that x is in, s = 1/(1 − alpha), and k = ln(2/alpha − 1)/Δ. The
    derivative of a chain of tanh curves through the steps of the quantizer.

    Args:
        bits: The bits of the quantizer, at least 1.
        low: The lower end of its range.
        high: The upper end of its range.
        alpha: How far the curve is from the steps, above 0 and below 1. The paper learns it, as an ``nn.Parameter`` is
            here: it gets the derivative of the chain of curves.
    """
    step = (high - low) / (2**bits - 1)
    logarithm = torch.log if isinstance(alpha, Tensor) else math.log
    z = logarithm(2 / alpha - 1)  # k·Δ
    place = (wide(x) - low) / step
    from_middle = place - place.floor() - 0.5
    slope = z / (2 * (1 - alpha)) * 4 * bump(2 * z * from_middle)
    return times(grad, torch.where((x >= low) & (x <= high), slope, 0), x)


@register(
    "n2uq",
    reference="Liu et al. 2022, arXiv:2111.14826 (N2UQ, generalized straight-through estimator)",
    examples=(
        {"start": -0.5, "widths": (0.5, 1.0, 2.0), "step": 0.5},
        {"widths": (0.25,), "step": -1.0},
        {"widths": (0.0, 0.5)},
    ),
)
def n2uq(
    grad: Tensor,
    x: Tensor,
    *,
    start: float = 0.0,
    widths: tuple[float, ...] = (1.0, 1.0, 1.0),
    step: float = 1.0,
) -> Tensor:
    """grad·step/max(width, 10⁻³) in the segment of x, 0 outside of all segments

    The segments follow one another from `start`, and have the given widths. Each contains its lower end. A quantizer
    of b bits has 2^b − 1 segments.

    Args:
        start: The lower end of the first segment.
        widths: The widths of the segments. Widths below 10⁻³ count as 10⁻³.
        step: The distance of the levels of the quantizer.
    """
    x_wide = wide(x)
    slope = torch.zeros_like(x_wide)
    low = start
    for width in widths:
        width = width.clamp(min=1e-3) if isinstance(width, Tensor) else max(width, 1e-3)
        slope = torch.where((x_wide >= low) & (x_wide < low + width), step / width, slope)
        low = low + width
    return times(grad, slope, x)
