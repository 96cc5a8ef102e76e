"""Backwards in low precision, emulated: operands are rounded, and products have the precision of the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.register import register
from ..errors import RuleError
from .precision import wide

__all__ = ["int8_backward"]


def _rounded(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """s·clamp(round(value/s), −128, 127), with s = max|value|/127 over some dimensions."""
    if not dims:  # every entry has a scale of its own
        return value
    entries = wide(value)
    step = entries.abs().amax(dims, keepdim=True).div(127).clamp(min=1e-12)
    return ((entries / step).round().clamp(-128, 127) * step).to(value.dtype)


@register(
    "int8_backward",
    reference="torchao 0.18, Int8MixedPrecisionTraining",
    peers="torchao Int8MixedPrecisionTraining",
    kinds="operation",
    meant_for="linear",
    answers=("x", "weight"),
    linear=False,
    reducing=True,
)
def int8_backward(grad: Tensor, x: Tensor, weight: Tensor, *, f: Any) -> Any:
    """∂x = Q(grad)·Q(W), ∂W = Q(gradᵀ)·Q(x), where Q rounds to integers of 8 bits times a scale

    In each product, the left side has a scale for each row, the right side one for each column: max|·|/127. The bias
    has its native gradient. This shows what the precision does to training; it is not faster.

    Raises:
        RuleError: The operation is not a linear layer.
    """
    if weight.dim() != 2:
        raise RuleError("rule 'int8_backward' is for linear layers; give it to the op 'linear'")
    rows = tuple(range(grad.dim() - 1))

    def of_x() -> Any:
        return f.gradient("x", _rounded(grad, (-1,)), weight=_rounded(weight, (0,)))

    def of_weight() -> Any:
        return f.gradient("weight", _rounded(grad, rows), x=_rounded(x, rows))

    return {"x": of_x, "weight": of_weight}
