"""Errors for rules that compute an operation at other operands, at operations for which that is not possible."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import freegrad_fx as fg

REASONS = {
    "dropout": (nn.Dropout(0.5), "it would draw other random numbers"),
    "batch_norm": (nn.BatchNorm1d(3), "it depends on statistics that are no operands"),
    "embedding": (nn.Embedding(3, 2), "it depends on indices, which are no operand"),
}


@pytest.mark.parametrize("op", REASONS)
def test_the_error_says_why_f_cannot_compute_an_operation(op: str) -> None:
    @fg.register("computes", kinds="operation", keeps_shape=False)
    def computes(grad: Tensor, x: Tensor, *, f: Any) -> Any:
        return f.gradient("x", grad)

    layer, reason = REASONS[op]
    with pytest.raises(fg.PlanError, match=f"for this call of {op}: {reason}; at"):
        fg.explain(nn.Sequential(layer), {op: "computes"})
