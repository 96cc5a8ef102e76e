"""Rules of quantizers and thresholds whose parameters are learnt: the step, the offset, the bound, the threshold.

They belong to forwards of `vocabulary` with the same parameters. A parameter that is a tensor which requires a gradient
gets one from the rule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.register import register
from .precision import wide

__all__ = ["jump_relu", "lsq", "lsq_plus", "pact"]


def _ends(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and the highest level."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _inside(level: Tensor, bits: int, signed: bool) -> Tensor:
    low, high = _ends(bits, signed)
    return (level >= low) & (level <= high)


def _by_step(grad: Tensor, level: Tensor, bits: int, signed: bool, per_sample: bool) -> Tensor:
    """The gradient of the step for each entry, scaled by 1/√(N·n₁)."""
    low, high = _ends(bits, signed)
    rounding = torch.where(_inside(level, bits, signed), level.round() - level, 0)
    change = rounding + torch.where(level < low, low, 0) + torch.where(level > high, high, 0)
    count = level.numel()
    if per_sample and level.dim():
        count //= max(level.shape[0], 1)
    return grad * (change / math.sqrt(max(count, 1) * max(high, 1)))


def _lsq_by_step(
    grad: Tensor,
    x: Tensor,
    *,
    step: float | Tensor,
    bits: int,
    signed: bool,
    per_sample: bool,
) -> Tensor:
    return _by_step(grad, wide(x) / step, bits, signed, per_sample)


@register(
    "lsq",
    reference="Esser et al. 2020, arXiv:1902.08153 (learned step size quantization)",
    peers="lsq-net LsqQuan",
    requires="step > 0, bits >= 1",
    learns={"step": _lsq_by_step},
    examples=({"step": 0.5, "bits": 2}, {"step": 0.3, "signed": False, "per_sample": True}),
)
def lsq(
    grad: Tensor,
    x: Tensor,
    *,
    step: float = 0.1,
    bits: int = 4,
    signed: bool = True,
    per_sample: bool = False,
) -> Tensor:
    """grad where n₀ ≤ x/step ≤ n₁, 0 elsewhere

    The gradient of the step is ``Σ grad·d/√(N·n₁)``, where d is ``round(z) − z`` for ``z = x/step`` in the range, n₀
    below it and n₁ above it. N is the number of entries of x, as in the code of lsq-net also for activations, or with
    `per_sample` that of one sample, as in the paper. A step for each channel gets the sum over the entries that it is
    for.

    Args:
        step: The step, above 0. To learn it, an ``nn.Parameter``; the paper begins with ``2·mean|x|/√n₁``.
        bits: The number of bits: ``n₀ = −2^(bits − 1)`` and ``n₁ = 2^(bits − 1) − 1``.
        signed: False for ``n₀ = 0`` and ``n₁ = 2^bits − 1``.
        per_sample: Whether N is the number of entries of one sample; dim 0 is the batch.
    """
    return torch.where(_inside(wide(x) / step, bits, signed), grad, 0)


def _lsq_plus_by_step(
    grad: Tensor,
    x: Tensor,
    *,
    step: float | Tensor,
    offset: float | Tensor,
    bits: int,
    signed: bool,
    per_sample: bool,
) -> Tensor:
    return _by_step(grad, (wide(x) - offset) / step, bits, signed, per_sample)


def _lsq_plus_by_offset(
    grad: Tensor,
    x: Tensor,
    *,
    step: float | Tensor,
    offset: float | Tensor,
    bits: int,
    signed: bool,
    per_sample: bool,
) -> Tensor:
    return torch.where(_inside((wide(x) - offset) / step, bits, signed), 0, grad)


@register(
    "lsq_plus",
    reference="Bhalgat et al. 2020, arXiv:2004.09576 (LSQ+)",
    requires="step > 0, bits >= 1",
    learns={"step": _lsq_plus_by_step, "offset": _lsq_plus_by_offset},
    examples=(
        {"step": 0.5, "bits": 2, "per_sample": True},
        {"step": 0.25, "offset": -0.5, "bits": 3, "signed": True},
    ),
)
def lsq_plus(
    grad: Tensor,
    x: Tensor,
    *,
    step: float = 0.1,
    offset: float = 0.0,
    bits: int = 4,
    signed: bool = False,
    per_sample: bool = False,
) -> Tensor:
    """grad where n₀ ≤ (x − offset)/step ≤ n₁, 0 elsewhere

    The gradient of the step is that of `lsq` for ``z = (x − offset)/step``; that of the offset is Σ grad over the
    entries outside of the range.

    Args:
        step: The step, above 0.
        offset: The value of the level 0.
        bits: The number of bits, as for `lsq`.
        signed: As for `lsq`, but False by default, for activations.
        per_sample: As for `lsq`.
    """
    return torch.where(_inside((wide(x) - offset) / step, bits, signed), grad, 0)


def _pact_by_bound(grad: Tensor, x: Tensor, *, bound: float | Tensor) -> Tensor:
    return torch.where(x >= bound, grad, 0)


@register(
    "pact",
    reference="Choi et al. 2018, arXiv:1805.06085 (PACT)",
    requires="bound > 0",
    learns={"bound": _pact_by_bound},
    examples=({"bound": 0.5}, {"bound": 1.0}),
    pointwise=True,
)
def pact(grad: Tensor, x: Tensor, *, bound: float = 10.0) -> Tensor:
    """grad where 0 ≤ x < bound, 0 elsewhere

    The gradient of the bound is Σ grad over the entries with x ≥ bound. The paper adds L2 regularisation of the bound
    to the loss.

    Args:
        bound: The upper end of the range, above 0; the paper's α.
    """
    return torch.where((x >= 0) & (x < bound), grad, 0)


def _jump_by_threshold(
    grad: Tensor, x: Tensor, *, threshold: float | Tensor, bandwidth: float
) -> Tensor:
    near = (wide(x) - threshold).abs() < bandwidth / 2
    return torch.where(near, grad, 0) * (-1 / bandwidth) * threshold


@register(
    "jump_relu",
    reference="Rajamanoharan et al. 2024, arXiv:2407.14435 (JumpReLU autoencoders)",
    peers="SAELens JumpReLU",
    requires="bandwidth > 0",
    learns={"threshold": _jump_by_threshold},
    examples=({"threshold": 0.5, "bandwidth": 1.0}, {"threshold": 0.25}),
    pointwise=True,
)
def jump_relu(
    grad: Tensor, x: Tensor, *, threshold: float = 0.0, bandwidth: float = 0.001
) -> Tensor:
    """grad where x > threshold, 0 elsewhere

    The gradient of the threshold is ``−(threshold/bandwidth)·Σ grad`` over the entries with
    ``|x − threshold| < bandwidth/2``: a rectangle in place of the jump. A threshold for each feature gets the sum over
    the batch. SAELens has the bandwidth 0.05.

    Args:
        threshold: The threshold.
        bandwidth: The width of the rectangle, above 0.
    """
    return torch.where(x > threshold, grad, 0)
