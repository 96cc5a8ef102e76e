"""Rules that keep fewer bits or fewer entries of the gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.register import register
from .draws import uniform_like
from .precision import per_row, wide

__all__ = [
    "dropout_gradient",
    "meprop",
    "quantize_int8",
    "sign_gradient",
    "stochastic_round",
    "stochastic_sign",
    "sus",
    "top_k",
]


@register(
    "sign_gradient",
    reference="Bernstein et al. 2018, arXiv:1802.04434 (signSGD)",
    peers="optax scale_by_sign",
    linear=False,
)
def sign_gradient(grad: Tensor) -> Tensor:
    """sign(grad), NaN where grad is NaN"""
    return torch.where(grad.isnan(), grad, grad.sign())


@register(
    "stochastic_sign",
    reference="Jin et al. 2020, arXiv:2002.10940 (sto-sign)",
    linear=False,
    reducing=True,
    joint=True,
    random=True,
)
def stochastic_sign(grad: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """1 with probability (1 + grad/m)/2, else −1, where m = max|grad| over the whole tensor; 0 if m = 0

    The mean is grad/m: unbiased up to the scale.

    Args:
        generator: What the numbers are drawn from; None for the global generator.
    """
    g = wide(grad)
    largest = g.abs().amax() if grad.numel() else g.sum()
    drawn = torch.where(largest * (2 * uniform_like(g, generator) - 1) < g, 1.0, -1.0)
    return torch.where(largest > 0, drawn, g * 0).to(grad.dtype)


@register(
    "top_k",
    reference="Sun et al. 2017, arXiv:1706.06197 (meProp)",
    linear=False,
    reducing=True,
    requires="fraction > 0, fraction <= 1",
    examples=({"fraction": 0.3}, {"fraction": 0.5}, {"fraction": 1.0}),
)
def top_k(grad: Tensor, *, fraction: float = 0.1) -> Tensor:
    """grad where |grad| is among the k largest of its row, 0 elsewhere; a row is the last dim, of n entries

    k is the integer nearest to fraction·n, at least 1. Exactly k entries pass: of equal values, the first ones.

    Args:
        fraction: The part of the entries that passes, above 0 and at most 1.
    """
    return _largest_of_rows(grad, fraction)


@register(
    "meprop",
    reference="Sun et al. 2017, arXiv:1706.06197 (meProp)",
    kinds="operation",
    meant_for="linear",
    answers=("x", "weight"),
    linear=False,
    reducing=True,
    requires="fraction > 0, fraction <= 1",
    examples=({"fraction": 0.3}, {"fraction": 1.0}),
)
def meprop(grad: Tensor, x: Tensor, weight: Tensor, *, f: Any, fraction: float = 0.1) -> Any:
    """∂x = T(grad)·W, ∂W = T(grad)ᵀ·x, where T keeps the k largest |grad| of each row, as `top_k`

    The bias has its native gradient, that of all entries. The rule `top_k` at the output of the layer gives the same
    gradients of the input and of the weight, but that of the bias has the k entries only.

    Args:
        fraction: The part of the entries that passes, above 0 and at most 1.
    """
    largest = _largest_of_rows(grad, fraction)
    return {
        "x": lambda: f.gradient("x", largest),
        "weight": lambda: f.gradient("weight", largest),
    }


def _largest_of_rows(grad: Tensor, fraction: float) -> Tensor:
    """The largest entries of each row, and 0 elsewhere."""
    row = grad.reshape(1) if grad.dim() == 0 else grad
    n = row.shape[-1]
    order = row.abs().argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(n, device=grad.device).expand(row.shape)
    first = (2 * rank + 1 < 2 * fraction * n) | (rank == 0)
    passed = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, first)
    # in the memory format of grad, which the result then has too
    passed = torch.ones_like(grad, dtype=torch.bool) & passed.reshape(grad.shape)
    return torch.where(passed, grad, 0)


@register(
    "dropout_gradient",
    reference="Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from overfitting",
    random=True,
    requires="0 <= p < 1",
    examples=({"p": 0.0}, {"p": 0.3}),
)
def dropout_gradient(
    grad: Tensor, *, p: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """grad/(1 − p) with probability 1 − p, else 0

    The mean is the gradient. The forward is not dropped.

    Args:
        p: The probability of 0, at least 0 and below 1.
        generator: What the numbers are drawn from; None for the global generator.
    """
    # drawn in float32, as half precision has too few numbers for most probabilities
    return torch.where(uniform_like(wide(grad), generator) >= p, grad / (1 - p), 0)


@register(
    "sus",
    reference="Pankov & Harik 2025, arXiv:2505.15080 (SUS backprop)",
    kinds="operation",
    meant_for="scaled_dot_product_attention",
    answers=("query", "key", "value"),
    reducing=True,
    random=True,
    requires="c > 0",
    examples=({"c": 1.0}, {"c": 1e9}),
)
def sus(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    y: Tensor,
    *,
    f: Any,
    c: float = 30.0,
    generator: torch.Generator | None = None,
) -> Any:
    """∂Q = s·M·K, ∂K = s·Mᵀ·Q, ∂V = Pᵀ·grad, M = P⊙(grad·Vᵀ − Σ grad·y), with entries of the pattern P drawn

    s is the scale of the scores. In each backward, an entry p of the pattern is kept with probability min(1, c·p), and
    is then max(p, 1/c); the others are 0. Their mean is p: the gradients are unbiased. Of each row, c entries are kept
    at most, on average.

    This shows what the noise does to training; it is not faster, and computes the whole pattern. It is for PyTorch's
    attention; an attention with a softmax of its own has no site for it.

    Args:
        c: How many entries of a row are kept at most, on average.
        generator: What the numbers are drawn from; None for the global generator.
    """
    one = torch.eye(key.shape[-2], dtype=value.dtype, device=value.device)
    pattern = f(value=one.expand(*value.shape[:-1], -1))
    chance = wide(pattern) * c
    kept = uniform_like(chance, generator) < chance
    pattern = torch.where(kept, pattern.clamp(min=1 / c), 0)
    # Under autocast, the operands have another dtype than the output
    dtype = torch.promote_types(query.dtype, grad.dtype)
    g, out, queries, keys, values, pattern = (
        t.to(dtype) for t in (grad, y, query, key, value, pattern)
    )
    # one head of keys and values can serve several heads of queries
    shares = query.shape[-3] // key.shape[-3] if f.constants.get("enable_gqa") else 1
    if shares > 1:
        keys, values = (t.repeat_interleave(shares, -3) for t in (keys, values))
    scale = f.constants.get("scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale

    def scores() -> Tensor:
        through = g @ values.transpose(-1, -2) - (g * out).sum(-1, keepdim=True)
        return scale * pattern * through

    def summed(found: Tensor, like: Tensor) -> Tensor:
        if shares > 1 and found.shape[-3] != like.shape[-3]:
            found = found.reshape(*found.shape[:-3], -1, shares, *found.shape[-2:]).sum(-3)
        return found.sum_to_size(like.shape).to(like.dtype)

    return {
        "query": lambda: summed(scores() @ keys, query),
        "key": lambda: summed(scores().transpose(-1, -2) @ queries, key),
        "value": lambda: summed(pattern.transpose(-1, -2) @ g, value),
    }


@register(
    "stochastic_round",
    reference="Zhou et al. 2016, arXiv:1606.06160 (DoReFa-Net)",
    linear=False,
    reducing=True,
    random=True,
    requires="bits >= 1",
    examples=({"bits": 1}, {"bits": 2}, {"bits": 4}),
)
def stochastic_round(
    grad: Tensor, *, bits: int = 8, generator: torch.Generator | None = None
) -> Tensor:
    """2·m·(⌊n·(grad/(2·m) + 1/2) + U(0, 1)⌋/n − 1/2), n = 2^bits − 1, m = max|grad| over dims 1…, by sample

    Rounds to n + 1 levels from −m to m, unbiased. Over all entries if there are fewer than two dims.

    Args:
        bits: The bits of a level, at least 1.
        generator: What the numbers are drawn from; None for the global generator.
    """
    if not grad.numel():
        return grad
    g = wide(grad)
    n: int = 2**bits - 1
    largest, divisor = _largest(g, per_row(g))
    place = n * (g / (2 * divisor) + 0.5)
    level = (
        (place + uniform_like(g, generator)).floor().clamp(max=n)
    )  # the sum can be rounded up to n + 1
    return (2 * largest * (level / n - 0.5)).to(grad.dtype)


@register(
    "quantize_int8",
    reference="torchao",
    peers="torchao int8_mixed_precision_training",
    linear=False,
    reducing=True,
)
def quantize_int8(grad: Tensor) -> Tensor:
    """m/127·round(127·grad/m), m = max|grad| over the last dim, by row

    Computed in floating point, with the values of int8 numbers. Rounds half to even.
    """
    if not grad.numel():
        return grad
    g = wide(grad)
    largest, divisor = _largest(g, (-1,) if grad.dim() else ())
    return ((127 * (g / divisor)).round() * (largest / 127)).to(grad.dtype)


def _largest(g: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """max|g| over dims, and the same with 1 in place of 0, to divide by"""
    size = g.abs()
    largest = size.amax(dim=dims, keepdim=True) if dims else size
    return largest, torch.where(largest == 0, 1, largest)
