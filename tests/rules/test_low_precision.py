"""Backwards in low precision: products of integers, and the ratio of signal and noise."""

from __future__ import annotations

import pytest
import torch
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
