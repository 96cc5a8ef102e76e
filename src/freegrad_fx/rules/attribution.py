"""Rules of attribution methods, which explain the output of a trained network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.register import register
from . import masks

__all__ = ["guided"]


def _fast_guided(grad: Tensor, x: Tensor) -> Any:
    if not masks.can_mask(grad, x):
        return NotImplemented
    result = grad.clamp(min=0)
    torch.ops.aten.threshold_backward.grad_input(result, x, 0, grad_input=result)
    return result


@register(
    "guided",
    reference="Springenberg et al. 2015, arXiv:1412.6806; Captum GuidedBackprop, zennit GuidedBackprop",
    mask=masks.positive,
    fast=_fast_guided,
    meant_for="relu",
)
def guided(grad: Tensor, mask: Tensor) -> Tensor:
    """max(grad, 0)·1[x > 0]

    Meant for ReLU. The rule replaces the derivative of the operation: at a GELU or another activation, the gradient is
    that of guided backpropagation through a ReLU of the same input, as if the activation were a ReLU.
    """
    return masks.only_where(mask, grad.clamp(min=0))
