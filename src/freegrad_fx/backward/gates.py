"""Identities that no gradient passes once they are closed, for code that learns later what its gradient has to be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import RuleError

__all__ = ["Gate", "gated", "is_closed"]


class Gate:
    """Says whether the gradient passes.

    Attributes:
        closed: Whether it does not.
        problem: The error if a gradient arrives at it while it is closed; ``""`` if the gradient is dropped.
    """

    def __init__(self) -> None:
        self.closed = False
        self.problem = ""


def gated(x: Tensor, gate: Gate) -> Tensor:
    """Return the values of a tensor. In the backward, its gradient passes unless the gate is closed.

    Raises:
        RuleError: In the backward: a gradient arrives at a closed gate that says so.
    """
    return _Gated.apply(x, gate)  # type: ignore[no-any-return, no-untyped-call]


def is_closed(node: Any) -> bool:
    """Whether a node of the autograd graph is that of a closed gate."""
    gate = getattr(node, "gate", None)
    return isinstance(gate, Gate) and gate.closed


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Gate) -> Tensor:
        ctx.gate = gate
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.gate.closed and ctx.gate.problem:
            raise RuleError(ctx.gate.problem)
        return None if ctx.gate.closed else grads[0], None
