"""Rules of attribution methods, for the activations of a network that is explained, not trained."""

from __future__ import annotations

from torch import Tensor

from . import fused, masks
from .rule import register

__all__ = ["guided"]


@register(
    "guided",
    reference="Springenberg et al. 2015, arXiv:1412.6806; Captum GuidedBackprop, zennit GuidedBackprop",
    mask=masks.positive,
    fused=fused.guided,
)
def guided(grad: Tensor, mask: Tensor) -> Tensor:
    """max(grad, 0)·1[x > 0]"""
    return masks.only_where(mask, grad.clamp(min=0))
