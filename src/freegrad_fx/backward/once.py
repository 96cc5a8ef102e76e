"""Gradients that cannot be differentiated again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import RuleError

__all__ = ["differentiated_once"]


def differentiated_once(gradient: Tensor, where: str) -> Tensor:
    """Return the values of a gradient; its own backward raises `RuleError`.

    Args:
        gradient: The gradient.
        where: The rule and its site, for the error.
    """
    # the gradient may depend on nothing that autograd knows
    anchor = torch.empty(0, requires_grad=True)
    return _Once.apply(gradient, anchor, where)  # type: ignore[no-any-return, no-untyped-call]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor, where: str) -> Tensor:
        ctx.where = where
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuleError(
            f"{ctx.where} keeps less than a second derivative needs. Compute that of the original model, or give the "
            f"site None in an entry before this one."
        )
