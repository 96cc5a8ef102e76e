"""`merged_parameters`: a batch norm in eval mode, merged into the linear layer or convolution before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from .._torch.modules import has_hooks_between
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
    eps: float = 1e-5,
    site: str,
    training: Any = False,
    norm: Any = None,
    left: tuple[nn.Module, ...] = (),
    entered: tuple[nn.Module, ...] = (),
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of the layer that computes what a layer and the batch norm behind it compute.

    Formula: W·γ/√(σ² + ε) for each output channel, and (b − μ)·γ/√(σ² + ε) + β.

    They are for rules to read. If no rule acts, those of the layer are returned.

    Args:
        x: The input of the layer.
        weight: Its weight.
        bias: Its bias.
        mean: The running mean μ of the batch norm.
        variance: Its running variance σ².
        gamma: Its weight γ.
        beta: Its bias β.
        eps: Its ε. A module says that itself.
        site: The name of the site, for errors.
        training: Whether it normalises with the statistics of the batch.
        norm: The module of the batch norm, which says that itself; None for a function.
        left: The modules whose calls end between the layer and the batch norm.
        entered: The modules whose calls begin there.
        groups: The groups of a convolution.
        transposed: Whether it is a transposed convolution.

    Raises:
        RuleError: The batch norm uses the statistics of the batch, or normalises another dimension than the outputs; or
            a module has a hook that runs between the two.
    """
    tensors = (x, weight, bias, mean, variance, gamma, beta)
    if has_torch_function(tensors):
        return handle_torch_function(
            merged_parameters, tensors, *tensors, eps=eps, site=site, training=training,
            norm=norm, left=left, entered=entered, groups=groups, transposed=transposed,
        )  # fmt: skip
    if not (torch.is_grad_enabled() and explicit_rules_act()):
        return weight, bias
    if has_hooks_between(left, entered):
        raise RuleError(
            f"a hook that runs between the layer and the batch norm at site {site!r} can change what goes from one "
            f"into the other, so that they are no single layer. Remove the hook; or leave conv_bn and linear_bn out of "
            f"the table."
        )
    if norm is not None:
        training, eps = norm.training, norm.eps
    if training or mean is None or variance is None:
        raise RuleError(
            f"the batch norm at site {site!r} normalises with the statistics of the batch, so that it is no part of "
            f"the layer before it. Call model.eval(); or leave conv_bn and linear_bn out of the table."
        )
    if weight.dim() != x.dim():
        op, pair = ("linear", "linear_bn") if weight.dim() == 2 else ("conv", "conv_bn")
        raise RuleError(
            f"the batch norm at site {site!r} normalises another dimension than that of the outputs of the layer "
            f"before it, as the input has {x.dim()} dimensions, not {weight.dim()}. Give {pair} None there, "
            f"and {op} a rule."
        )
    scale = torch.rsqrt(variance + eps) if gamma is None else gamma / torch.sqrt(variance + eps)
    shift = -mean if bias is None else bias - mean
    shift = shift * scale if beta is None else shift * scale + beta
    if transposed:  # the weight of a transposed convolution has the outputs of a group second
        by_group = weight.reshape(groups, -1, *weight.shape[1:])
        by_group = by_group * _beside(scale.reshape(groups, 1, -1), by_group.dim())
        merged = by_group.flatten(0, 1)
    else:
        merged = weight * _beside(scale, weight.dim())
    # A batch norm can have a higher precision than the layer
    return merged.to(weight.dtype), shift.to(weight.dtype)


def _beside(scale: Tensor, dims: int) -> Tensor:
    """A tensor with dimensions of size 1 behind its own, up to a number."""
    return scale.reshape(*scale.shape, *[1] * (dims - scale.dim()))
