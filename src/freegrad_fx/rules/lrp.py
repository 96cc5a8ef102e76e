"""Layer-wise relevance propagation for linear layers and convolutions, in gradient space.

What flows backward is relevance divided by value, so that the relevance of any tensor is its value times its gradient:
sums, reshapes, pools and linear layers without a rule then have the native backward. Three rules are for the first
layer only, where the relevance itself is the result: `lrp_zbox`, `lrp_wsquare` and `lrp_flat`.

The README of LXT says that layer-wise relevance propagation is patented, and free for personal and scientific use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.register import register

__all__ = [
    "lrp_alpha_beta",
    "lrp_epsilon",
    "lrp_flat",
    "lrp_gamma",
    "lrp_wsquare",
    "lrp_zbox",
    "lrp_zplus",
]

_OF_LAYERS: dict[str, Any] = {
    "kinds": "operation",
    "reducing": True,
    "meant_for": ("linear", "conv", "linear_bn", "conv_bn"),
}


def _stable(z: Tensor, epsilon: float | Tensor) -> Tensor:
    """z + ε·sign(z), with sign(0) = 1."""
    # Numbers in torch.where would have the default dtype
    return torch.where(z >= 0, z + epsilon, z - epsilon)


def _layer(f: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer at other operands."""
    return f(x=x, weight=weight, **({} if bias is None else {"bias": bias}))  # type: ignore[no-any-return]


def _positive(value: Any) -> Any:
    return None if value is None else value.clamp(min=0)


def _negative(value: Any) -> Any:
    return None if value is None else value.clamp(max=0)


def _zero(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else torch.zeros_like(bias)


def _by_sign(x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    return torch.where(x >= 0, positive, negative)


@register(
    "lrp_epsilon",
    reference="Bach et al. 2015, doi:10.1371/journal.pone.0130140",
    peers=("zennit Epsilon", "Captum EpsilonRule"),
    requires="epsilon >= 0",
    **_OF_LAYERS,
)
def lrp_epsilon(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, *, f: Any, epsilon: float = 1e-6
) -> Tensor:
    """Wᵀs, with s = grad·y/(y + ε·sign(y))

    Args:
        epsilon: ε, which absorbs small contributions. With 0, the rule is the native gradient.
    """
    return f.gradient("x", grad * y / _stable(y, epsilon))  # type: ignore[no-any-return]


@register(
    "lrp_zplus",
    reference="Montavon et al. 2017, arXiv:1512.02479",
    peers="zennit ZPlus",
    requires="epsilon >= 0",
    **_OF_LAYERS,
)
def lrp_zplus(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    f: Any,
    epsilon: float = 1e-6,
) -> Tensor:
    """W⁺ᵀs where x ≥ 0, else W⁻ᵀs, with s = grad·y/(W⁺x⁺ + W⁻x⁻ + b⁺)

    Only contributions that raise the output get relevance.

    Args:
        epsilon: What is added to the denominator, with its sign.
    """
    up, down = weight.clamp(min=0), weight.clamp(max=0)
    z = _layer(f, x.clamp(min=0), up, _positive(bias))
    z = z + _layer(f, x.clamp(max=0), down, _zero(bias))
    s = grad * y / _stable(z, epsilon)
    return _by_sign(x, f.gradient("x", s, weight=up), f.gradient("x", s, weight=down))


@register(
    "lrp_alpha_beta",
    reference="Bach et al. 2015, doi:10.1371/journal.pone.0130140",
    peers="zennit AlphaBeta",
    requires="alpha >= 1, beta >= 0, alpha == beta + 1, epsilon >= 0",
    examples=[{"alpha": 1.0, "beta": 0.0}],
    **_OF_LAYERS,
)
def lrp_alpha_beta(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    f: Any,
    alpha: float = 2.0,
    beta: float = 1.0,
    epsilon: float = 1e-6,
) -> Tensor:
    """αW⁺ᵀs − βW⁻ᵀt where x ≥ 0, else αW⁻ᵀs − βW⁺ᵀt; s = grad·y/(W⁺x⁺ + W⁻x⁻ + b⁺), t = grad·y/(W⁻x⁺ + W⁺x⁻ + b⁻)

    Args:
        alpha: The weight of the contributions that raise the output.
        beta: The weight of those that lower it, α − 1.
        epsilon: What is added to the denominators, with their sign.
    """
    up, down = weight.clamp(min=0), weight.clamp(max=0)
    above, below = x.clamp(min=0), x.clamp(max=0)
    raising = _layer(f, above, up, _positive(bias)) + _layer(f, below, down, _zero(bias))
    lowering = _layer(f, above, down, _negative(bias)) + _layer(f, below, up, _zero(bias))
    s = grad * y / _stable(raising, epsilon)
    t = grad * y / _stable(lowering, epsilon)
    return _by_sign(
        x,
        alpha * f.gradient("x", s, weight=up) - beta * f.gradient("x", t, weight=down),
        alpha * f.gradient("x", s, weight=down) - beta * f.gradient("x", t, weight=up),
    )


@register(
    "lrp_gamma",
    reference="Montavon et al. 2019, doi:10.1007/978-3-030-28954-6_10",
    peers="zennit Gamma",
    requires="gamma >= 0, epsilon >= 0",
    **_OF_LAYERS,
)
def lrp_gamma(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    f: Any,
    gamma: float = 0.25,
    epsilon: float = 1e-6,
) -> Tensor:
    """Pᵀs + Nᵀt where x ≥ 0, else Nᵀs + Pᵀt; P = W + γW⁺, N = W + γW⁻, s where y > 0, t where y < 0

    ``s = 1[y > 0]·grad·y/(Px⁺ + Nx⁻ + b + γb⁺)`` and ``t = 1[y < 0]·grad·y/(Nx⁺ + Px⁻ + b + γb⁻)``: contributions of
    the sign of the output count more.

    Args:
        gamma: γ. With 0, the rule is that of `lrp_epsilon`.
        epsilon: What is added to the denominators, with their sign.
    """
    up, down = weight + gamma * weight.clamp(min=0), weight + gamma * weight.clamp(max=0)
    above, below = x.clamp(min=0), x.clamp(max=0)
    raised = None if bias is None else bias + gamma * bias.clamp(min=0)
    lowered = None if bias is None else bias + gamma * bias.clamp(max=0)
    positive = _layer(f, above, up, raised) + _layer(f, below, down, _zero(bias))
    negative = _layer(f, above, down, lowered) + _layer(f, below, up, _zero(bias))
    flow = grad * y
    s = torch.where(y > 0, flow, 0) / _stable(positive, epsilon)
    t = torch.where(y < 0, flow, 0) / _stable(negative, epsilon)
    return _by_sign(
        x,
        f.gradient("x", s, weight=up) + f.gradient("x", t, weight=down),
        f.gradient("x", s, weight=down) + f.gradient("x", t, weight=up),
    )


@register(
    "lrp_zbox",
    reference="Montavon et al. 2017, arXiv:1512.02479",
    peers="zennit ZBox",
    requires="epsilon >= 0",
    relevance=True,
    **_OF_LAYERS,
)
def lrp_zbox(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    f: Any,
    low: float = 0.0,
    high: float = 1.0,
    epsilon: float = 1e-6,
) -> Tensor:
    """x·Wᵀs − l·W⁺ᵀs − h·W⁻ᵀs, with s = grad·y/(y − (W⁺l + b⁺) − (W⁻h + b⁻))

    For the first layer, whose input is between l and h. The result is the relevance of the input, which is not to be
    multiplied by the input.

    Args:
        low: The lower bound l of the input: a number, or a tensor that broadcasts to the input.
        high: The upper bound h.
        epsilon: What is added to the denominator, with its sign.
    """
    up, down = weight.clamp(min=0), weight.clamp(max=0)
    least, most = torch.zeros_like(x) + low, torch.zeros_like(x) + high
    z = y - _layer(f, least, up, _positive(bias)) - _layer(f, most, down, _negative(bias))
    s = grad * y / _stable(z, epsilon)
    first = least * f.gradient("x", s, weight=up)
    return x * f.gradient("x", s) - first - most * f.gradient("x", s, weight=down)  # type: ignore[no-any-return]


@register(
    "lrp_wsquare",
    reference="Montavon et al. 2017, arXiv:1512.02479",
    peers="zennit WSquare",
    requires="epsilon >= 0",
    relevance=True,
    **_OF_LAYERS,
)
def lrp_wsquare(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    f: Any,
    epsilon: float = 1e-6,
) -> Tensor:
    """(W²)ᵀs, with s = grad·y/(W²·1 + b²)

    For the first layer. The result is the relevance of the input, which is not to be multiplied by the input.

    Args:
        epsilon: What is added to the denominator.
    """
    squares = weight.square()
    z = _layer(f, torch.ones_like(x), squares, None if bias is None else bias.square())
    return f.gradient("x", grad * y / _stable(z, epsilon), weight=squares)  # type: ignore[no-any-return]


@register(
    "lrp_flat",
    reference="Lapuschkin et al. 2019, doi:10.1038/s41467-019-08987-4",
    peers="zennit Flat",
    requires="epsilon >= 0",
    relevance=True,
    **_OF_LAYERS,
)
def lrp_flat(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    f: Any,
    epsilon: float = 1e-6,
) -> Tensor:
    """1ᵀs, with s = grad·y/(1·1): every input of an output gets the same relevance

    For the first layer. The result is the relevance of the input, which is not to be multiplied by the input.

    Args:
        epsilon: What is added to the denominator.
    """
    ones = torch.ones_like(weight)
    z = _layer(f, torch.ones_like(x), ones, _zero(bias))
    return f.gradient("x", grad * y / _stable(z, epsilon), weight=ones)  # type: ignore[no-any-return]
