"""Rules that compute an operation at other operands: errors where that is not possible, and batch norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg

REASONS = {
    "dropout": (nn.Dropout(0.5), "it would draw other random numbers"),
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


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_is_computed_without_a_change_of_its_statistics(training: bool) -> None:
    @fg.register("computes_twice", kinds="operation", overwrite=True)
    def computes_twice(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *, f: Any) -> Any:
        return f.gradient("x", grad)

    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3))
    model = nn.Sequential(norm)
    norm.train(training)
    x = torch.randn(5, 3, requires_grad=True)
    before = norm.running_mean.clone()
    expected = torch.autograd.grad(norm(x).square().sum(), x)[0]
    once = norm.running_mean.clone()
    for examples in ((), (x,)):
        gm = fg.transform(model, {"batch_norm": "computes_twice"}, example_inputs=examples or None)
        norm.running_mean.copy_(before)
        found = torch.autograd.grad(gm(x).square().sum(), x)[0]
        torch.testing.assert_close(found, expected)
        assert torch.equal(norm.running_mean, once)
