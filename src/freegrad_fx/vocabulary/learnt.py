"""Quantizers and thresholds whose parameters can be tensors that are learnt, for use as replacement forwards.

Their derivatives are those that autograd computes. A rule that learns a parameter, such as ``lsq``, replaces them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["clip_quantize", "jump", "step_quantize"]


def step_quantize(
    x: Tensor,
    step: float | Tensor,
    offset: float | Tensor = 0.0,
    bits: int = 4,
    signed: bool = True,
) -> Tensor:
    """Return the nearest level to `x`, ties to even.

    Formula: ``step·clamp(round((x − offset)/step), n₀, n₁) + offset`` with ``n₀ = −2^(bits − 1)`` and
    ``n₁ = 2^(bits − 1) − 1``, in the shape and dtype of `x`. The forward of the rules ``lsq`` and ``lsq_plus``.

    Args:
        x: A tensor of floating point numbers.
        step: The distance of two levels, above 0; a tensor for several channels is broadcast against `x`.
        offset: The value of the level 0.
        bits: The number of bits.
        signed: False for ``n₀ = 0`` and ``n₁ = 2^bits − 1``.

    Source: Esser et al. 2020, arXiv:1902.08153; Bhalgat et al. 2020, arXiv:2004.09576.
    """
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    level = ((x - offset) / step).clamp(low, high).round()
    return (level * step + offset).to(x.dtype)


def clip_quantize(x: Tensor, bound: float | Tensor, bits: int = 4) -> Tensor:
    """Return the nearest of 2^bits evenly spaced values from 0 to `bound`, ties to even.

    Formula: ``round(clamp(x, 0, bound)/s)·s`` with ``s = bound/(2^bits − 1)``, in the shape and dtype of `x`. The
    forward of the rule ``pact``.

    Args:
        x: A tensor of floating point numbers.
        bound: The upper end of the range, above 0.
        bits: The number of bits.

    Source: Choi et al. 2018, arXiv:1805.06085.
    """
    most = 2**bits - 1
    end = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
    level = (torch.minimum(x.clamp(min=0), end) * (most / bound)).round()
    return torch.mul(level, bound / most).to(x.dtype)


def jump(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Return x where x > threshold, and 0 elsewhere.

    Formula: ``x·1[x > threshold]``, in the shape and dtype of `x`. The forward of the rule ``jump_relu``; the operation
    of this name has a number as the threshold.

    Args:
        x: A tensor of floating point numbers.
        threshold: The threshold; a tensor for several features is broadcast against `x`.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435.
    """
    return torch.where(x > threshold, x, 0)
