"""Rules of attribution methods, which explain the output of a trained network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.register import register
from . import masks
from .precision import times, wide

__all__ = ["deconvnet", "guided", "identity_rule", "redirected", "smooth_relu"]


def _fast_guided(grad: Tensor, x: Tensor) -> Any:
    if not masks.can_mask(grad, x):
        return NotImplemented
    result = grad.clamp(min=0)
    torch.ops.aten.threshold_backward.grad_input(result, x, 0, grad_input=result)
    return result


@register(
    "guided",
    reference="Springenberg et al. 2015, arXiv:1412.6806",
    peers=("Captum GuidedBackprop", "zennit GuidedBackprop"),
    linear=False,
    mask=masks.positive,
    fast=_fast_guided,
    meant_for="relu",
    pointwise=True,
)
def guided(grad: Tensor, mask: Tensor) -> Tensor:
    """max(grad, 0)·1[x > 0]

    Meant for ReLU. The rule replaces the derivative of the operation: at a GELU or another activation, the gradient is
    that of guided backpropagation through a ReLU of the same input, as if the activation were a ReLU.
    """
    return masks.only_where(mask, grad.clamp(min=0))


@register(
    "deconvnet",
    reference="Zeiler & Fergus 2014, arXiv:1311.2901",
    peers=("Captum Deconvolution", "zennit DeconvNet"),
    linear=False,
    meant_for="relu",
    pointwise=True,
)
def deconvnet(grad: Tensor) -> Tensor:
    """max(grad, 0)"""
    return grad.clamp(min=0)


@register(
    "redirected",
    reference="Olah et al. 2017, doi:10.23915/distill.00007",
    peers="lucent RedirectedReLU",
    mask=masks.nonnegative,
    meant_for="relu",
    examples=({"leak": 0.0}, {"leak": 0.5}),
    pointwise=True,
)
def redirected(grad: Tensor, mask: Tensor, *, leak: float = 0.1) -> Tensor:
    """grad where x ≥ 0, leak·grad elsewhere

    For feature visualisation, where a unit that is off at first gets a gradient too. lucid's rule, of which lucent's
    is a simplification, also looks at the sign of the gradient.

    Args:
        leak: The factor where x < 0.
    """
    return torch.where(mask, grad, leak * grad)


@register(
    "smooth_relu",
    reference="Dombrowski et al. 2019, arXiv:1906.07983",
    peers="zennit ReLUBetaSmooth",
    meant_for="relu",
    requires="beta >= 0",
    examples=({"beta": 0.0}, {"beta": 0.3}, {"beta": 100.0}),
)
def smooth_relu(grad: Tensor, x: Tensor, *, beta: float = 10.0) -> Tensor:
    """grad·σ(beta·x)

    The derivative of the softplus ln(1 + e^(beta·x))/beta.

    Args:
        beta: How close the softplus is to the ReLU, at least 0.
    """
    return times(grad, torch.sigmoid(beta * wide(x)), x)


@register(
    "identity_rule",
    reference="Achtibat et al. 2024, arXiv:2402.05602 (AttnLRP)",
    peers="LXT identity_rule_implicit",
    kinds="operation",
    meant_for=(
        "relu",
        "gelu",
        "silu",
        "mish",
        "tanh",
        "hardswish",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
    ),
    examples=({"at_zero": 0.0}, {"at_zero": 1.0}),
    pointwise=True,
)
def identity_rule(grad: Tensor, x: Tensor, y: Tensor, *, at_zero: float = 0.5) -> Tensor:
    """grad·y/x, and grad·at_zero where x = 0

    Passes relevance, the product of value and gradient, unchanged through an activation with f(0) = 0. At a sigmoid or
    softplus, y/x is infinite near 0. LXT adds 10⁻¹⁰ to x, so that its factor at 0 is 0.

    Args:
        at_zero: f′(0), the limit of y/x: 1/2 for GELU and SiLU, 0.6 for Mish, 1 for tanh and ELU, 0 for ReLU.
    """
    zero = x == 0
    return torch.where(zero, at_zero * grad, grad * (y / torch.where(zero, 1, x)))
