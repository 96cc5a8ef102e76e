"""Backwards in low precision: products of integers, and the ratio of signal and noise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.errors import RuleError


def of_integers(left: Tensor, right: Tensor) -> Tensor:
    """A product of matrices in integers, with a scale for each row of the left and each column of the right side."""
    rows, columns = left.abs().amax(1, keepdim=True) / 127, right.abs().amax(0, keepdim=True) / 127
    product = (left / rows).round().long() @ (right / columns).round().long()
    return product * rows * columns


def test_the_gradients_are_products_of_integers_and_close_to_the_native_ones() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).double()
    x = torch.randn(4, 16, 64, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 16, 48, dtype=torch.float64)
    inputs = [x, layer.weight, layer.bias]
    native = torch.autograd.grad(layer(x), inputs, grad)
    gm = fg.transform(nn.Sequential(layer), {"linear": "int8_backward"})
    found = torch.autograd.grad(gm(x), inputs, grad)
    g, rows = grad.flatten(0, 1), x.detach().flatten(0, 1)
    torch.testing.assert_close(found[0].flatten(0, 1), of_integers(g, layer.weight.detach()))
    torch.testing.assert_close(found[1], of_integers(g.t(), rows))
    assert torch.equal(found[2], native[2])
    for quantised, exact in zip(found[:2], native[:2], strict=True):
        noise = torch.linalg.vector_norm(quantised - exact) / torch.linalg.vector_norm(exact)
        assert -20 * torch.log10(noise) > 35


def test_a_vector_and_zeros_are_rounded_too() -> None:
    layer = nn.Linear(3, 2)
    gm = fg.transform(nn.Sequential(layer), {"linear": "int8_backward"})
    x = torch.randn(3, requires_grad=True)
    out = gm(x)
    found = torch.autograd.grad(out, [x, layer.weight], torch.zeros_like(out))
    assert not any(gradient.any() for gradient in found)
    grad = torch.tensor([1.0, -0.3])
    (of_weight,) = torch.autograd.grad(gm(x), [layer.weight], grad)
    torch.testing.assert_close(of_weight, torch.outer(grad, x.detach()))


def test_a_convolution_is_refused() -> None:
    gm = fg.transform(nn.Sequential(nn.Conv1d(1, 1, 1)), {"conv": "int8_backward"})
    with pytest.raises(RuleError, match="give it to the op 'linear'"):
        gm(torch.randn(1, 1, 3, requires_grad=True)).sum().backward()


# --- rules of one input at the output of a product ---


class Product(nn.Module):
    """A product of two operands with values from N(0, 1)."""

    def __init__(self, op: str) -> None:
        super().__init__()
        shapes = {"linear": (48, 64), "conv": (32, 16, 3), "matmul": (4, 64, 48)}
        self.op, self.weight = op, nn.Parameter(torch.randn(shapes[op], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        function = {"linear": F.linear, "conv": F.conv1d, "matmul": torch.matmul}[self.op]
        return function(x, self.weight)


OPS = {"linear": (4, 16, 64), "conv": (4, 16, 40), "matmul": (4, 16, 64)}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rule", ["quantize_int8", "stochastic_round"])
def test_gradients_of_products_with_a_gradient_of_eight_bits(op: str, rule: str) -> None:
    model, x = Product(op), torch.randn(OPS[op], dtype=torch.float64, requires_grad=True)
    table = fg.RuleTable([fg.on(op, at="output").backward(rule)])
    y = model(x)
    grad, inputs = torch.randn_like(y), [x, model.weight]
    native = torch.autograd.grad(y, inputs, grad)
    gm = fg.transform(model, table)
    for found, exact in zip(torch.autograd.grad(gm(x), inputs, grad), native, strict=True):
        noise = torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact)
        assert 35 < -20 * torch.log10(noise) < 60


@pytest.mark.parametrize("op", OPS)
def test_stochastic_rounding_of_the_gradient_of_a_product_is_unbiased(op: str) -> None:
    model, x = Product(op), torch.randn(OPS[op], dtype=torch.float64, requires_grad=True)
    table = fg.RuleTable([fg.on(op, at="output").backward("stochastic_round", bits=3)])
    y, n, inputs = model(x), 200, [x, model.weight]
    grad = torch.randn_like(y)
    native = torch.autograd.grad(y, inputs, grad)
    y = fg.transform(model, table)(x)
    draws = [torch.autograd.grad(y, inputs, grad, retain_graph=True) for _ in range(n)]
    for found, exact in zip(map(torch.stack, zip(*draws, strict=True)), native, strict=True):
        error = (found.mean(0) - exact) / (found.std(0) / n**0.5)
        # of this many entries that are from N(0, 1), the largest; and their mean square
        assert error.abs().max() < 6
        assert abs(error.square().mean() - 1) < 0.2
