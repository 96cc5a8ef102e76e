"""`merged_parameters`: a batch norm in eval mode, merged into the linear layer or convolution before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..context import explicit_rules_act
from ..errors import RuleError

__all__ = ["merged_parameters"]


def merged_parameters(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    eps: float,
    site: str,
    training: Any = False,
    norm: Any = None,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of the layer that computes what a layer and the batch norm behind it compute.

    Formula: W·γ/√(σ² + ε) for each output channel, and (b − μ)·γ/√(σ² + ε) + β.

    They are for rules to read, and have no gradient. If no rule acts, those of the layer are returned.

    Args:
        x: The input of the layer.
        weight: Its weight.
        bias: Its bias.
        mean: The running mean μ of the batch norm.
        variance: Its running variance σ².
        gamma: Its weight γ.
        beta: Its bias β.
        eps: Its ε.
        site: The name of the site, for errors.
        training: Whether it normalises with the statistics of the batch.
        norm: The module of the batch norm, which says that itself; None for a function.
        groups: The groups of a convolution.
        transposed: Whether it is a transposed convolution.

    Raises:
        RuleError: The batch norm uses the statistics of the batch, or normalises another dimension than the outputs.
    """
    tensors = (x, weight, bias, mean, variance, gamma, beta)
    if has_torch_function(tensors):
        return handle_torch_function(
            merged_parameters, tensors, *tensors, eps=eps, site=site, training=training,
            norm=norm, groups=groups, transposed=transposed,
        )  # fmt: skip
    if not (torch.is_grad_enabled() and explicit_rules_act()):
        return weight, bias
    if norm is not None:
        training = norm.training
    if training or mean is None or variance is None:
        raise RuleError(
            f"the batch norm at site {site!r} normalises with the statistics of the batch, so that it is no part of "
            f"the layer before it. Call model.eval(); or leave conv_bn and linear_bn out of the table."
        )
    if weight.dim() == 2 != x.dim():
        raise RuleError(
            f"the batch norm at site {site!r} normalises another dimension of its input, of {x.dim()} dimensions, than "
            f"the outputs of the linear layer before it. Give linear_bn None there, and linear a rule."
        )
    with torch.no_grad():
        scale = torch.rsqrt(variance + eps) if gamma is None else gamma / torch.sqrt(variance + eps)
        shift = -mean if bias is None else bias - mean
        shift = shift * scale if beta is None else shift * scale + beta
        if transposed:  # the weight of a transposed convolution has the outputs of a group second
            by_group = weight.reshape(groups, -1, *weight.shape[1:])
            by_group = by_group * _beside(scale.reshape(groups, 1, -1), by_group.dim())
            return by_group.flatten(0, 1), shift
        return weight * _beside(scale, weight.dim()), shift


def _beside(scale: Tensor, dims: int) -> Tensor:
    """A tensor with dimensions of size 1 behind its own, up to a number."""
    return scale.reshape(*scale.shape, *[1] * (dims - scale.dim()))
