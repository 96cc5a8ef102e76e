"""Rules for one-hot samples of a softmax, and for vector quantisation, which pass a gradient through the choice."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.register import register
from .draws import uniform_like
from .precision import wide

__all__ = ["gumbel_straight_through", "reinmax", "rotation_trick"]

_SAMPLED = ("softmax", "sample_one_hot")


@register(
    "reinmax",
    reference="Liu et al. 2023, arXiv:2304.08612 (ReinMax)",
    peers="reinmax",
    requires="tau > 0",
    kinds="operation",
    meant_for=_SAMPLED,
    reducing=True,
    examples=({"tau": 1.5}, {"dim": 0}),
)
def reinmax(grad: Tensor, x: Tensor, y: Tensor, *, tau: float = 1.0, dim: int = -1) -> Tensor:
    """2·J(½·(softmax(x/τ) + y))·grad − ½·J(softmax(x))·grad with J(p)·g = p·(g − Σ p·g), over `dim`

    For ``forward="sample_one_hot"``: y is the sample. It is exact to second order, where the straight-through
    estimator ``J(softmax(x))·grad`` is exact to first order.

    Args:
        tau: The temperature τ, at least 1 in the paper. It changes the gradient alone.
        dim: The dimension of the softmax.
    """
    g, logits = wide(grad), wide(x)
    middle = 0.5 * ((logits / tau).softmax(dim) + y)
    result = 2 * _through(middle, g, dim) - 0.5 * _through(logits.softmax(dim), g, dim)
    return result.to(torch.promote_types(grad.dtype, x.dtype))


@register(
    "gumbel_straight_through",
    reference="Jang et al. 2016, arXiv:1611.01144; Paulus et al. 2020, arXiv:2010.04838 (samples > 1)",
    peers="torch.nn.functional.gumbel_softmax(hard=True)",
    requires="tau > 0, samples >= 1",
    kinds="operation",
    meant_for=_SAMPLED,
    reducing=True,
    random=True,
    examples=({"tau": 0.5, "samples": 1}, {"dim": 0}),
)
def gumbel_straight_through(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    tau: float = 1.0,
    samples: int = 1,
    dim: int = -1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """J(softmax((x + G)/τ))·grad/τ with J(p)·g = p·(g − Σ p·g) and Gumbel noise G for which x + G is largest at y

    For ``forward="sample_one_hot"``: y is the sample, the place of its largest entry. The noise is drawn in the
    backward, from its distribution given y, so that y and G together are distributed as in the straight-through
    Gumbel-softmax estimator. With several samples, the mean over G is taken: the Gumbel-Rao estimator, which has the
    same mean and a smaller variance.

    Args:
        tau: The temperature τ. It changes the gradient alone.
        samples: The number of draws of the noise.
        dim: The dimension of the softmax.
        generator: What the numbers are drawn from; None for the global generator.
    """
    g, logits = wide(grad), wide(x).log_softmax(dim)
    if not g.numel():
        return grad.to(torch.promote_types(grad.dtype, x.dtype))
    chosen = torch.zeros_like(logits).scatter_(dim, y.argmax(dim, keepdim=True), 1.0) > 0
    result = torch.zeros_like(g)
    for _ in range(samples):
        # Exponential numbers. That of the chosen entry gives the maximum of x + G, below which the others are
        drawn = -uniform_like(logits, generator).clamp(min=torch.finfo(logits.dtype).tiny).log()
        largest = torch.where(chosen, drawn, 0).sum(dim, keepdim=True)
        perturbed = -torch.where(chosen, drawn, drawn * (-logits).exp() + largest).log()
        result = result + _through((perturbed / tau).softmax(dim), g, dim)
    return (result / (tau * samples)).to(torch.promote_types(grad.dtype, x.dtype))


@register(
    "rotation_trick",
    reference="Fifty et al. 2024, arXiv:2410.06424",
    peers="vector-quantize-pytorch rotation_trick",
    kinds="operation",
    reducing=True,
)
def rotation_trick(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """λ·(grad − 2·w·(w·grad) + 2·u·(v·grad)) with λ = |y|/|x|, u = x/|x|, v = y/|y|, w = (u + v)/|u + v|

    x and y are the vectors before and after the quantisation, along the last dimension. The transpose of the rotation
    and scaling that maps x to y: it keeps the angle between the gradient and the vector. Where y = −x·λ, w is 0, and
    the map is the reflection of x. Where x = 0, no such map exists, and the gradient is passed straight through; where
    y = 0, λ and the gradient are 0. The forward stays exactly y, as in no peer.
    """
    g, e, q = wide(grad), wide(x), wide(y)
    size_e, size_q = _norm(e), _norm(q)
    u, v = e / _or_one(size_e), q / _or_one(size_q)
    w = (u + v) / _or_one(_norm(u + v))
    turn = 2 * (u * _dot(v, g) - w * _dot(w, g))
    scale = torch.where(size_e == 0, 1, size_q / _or_one(size_e))
    result = (g + torch.where(size_e == 0, 0, turn)) * scale
    return result.to(torch.promote_types(grad.dtype, x.dtype))


def _through(p: Tensor, g: Tensor, dim: int) -> Tensor:
    """The product of the derivative of a softmax with the result p, and g."""
    return (g - (g * p).sum(dim, keepdim=True)) * p


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _norm(a: Tensor) -> Tensor:
    """The norm along the last dimension, without the overflow of squares, and with the derivative 0 at 0."""
    if not a.numel():
        return a.sum(-1, keepdim=True)
    largest = _or_one(a.detach().abs().amax(-1, keepdim=True))
    squares = _dot(a / largest, a / largest)
    return torch.where(squares == 0, 0, _or_one(squares).sqrt()) * largest


def _or_one(size: Tensor) -> Tensor:
    return torch.where(size == 0, 1, size)
