"""`meprop` and `sus`: fewer entries in the products of a linear layer and of an attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from doors import DOORS


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- meprop ---


def test_meprop_computes_both_products_from_the_largest_entries() -> None:
    layer, x, grad = nn.Linear(5, 6).double(), drawn(2, 3, 5).requires_grad_(), drawn(2, 3, 6)
    inputs = [x, layer.weight, layer.bias]
    gm = fg.transform(nn.Sequential(layer), {"linear": fg.rules.meprop(fraction=1 / 3)})
    found = torch.autograd.grad(gm(x), inputs, grad)
    largest = grad * (grad.abs() >= grad.abs().sort(-1).values[..., -2:-1])
    torch.testing.assert_close(found[0], largest @ layer.weight)
    rows = largest.flatten(0, 1).t() @ x.flatten(0, 1)
    torch.testing.assert_close(found[1], rows)
    torch.testing.assert_close(found[2], grad.sum((0, 1)))
    output = fg.RuleTable([fg.on("linear", at="output").backward("top_k", fraction=1 / 3)])
    same = torch.autograd.grad(fg.transform(nn.Sequential(layer), output)(x), inputs, grad)
    assert all(map(torch.equal, found[:2], same[:2]))
    torch.testing.assert_close(same[2], largest.sum((0, 1)))


# --- sus ---


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **self.options)


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 4),
    "causal": ({"is_causal": True, "scale": 0.7}, 4),
    "masked": ({"attn_mask": torch.tensor([[True, False, True, True, True]] * 5)}, 4),
    "grouped": ({"enable_gqa": True}, 2),
}


def operands(heads: int, batch: int = 1) -> list[Tensor]:
    torch.manual_seed(1)
    shapes = [(1, 4, 5, 3), (1, heads, 5, 3), (1, heads, 5, 5)]
    return [drawn(*s).expand(batch, *s[1:]).clone().requires_grad_() for s in shapes]


def gradients(options: dict[str, Any], given: list[Tensor], grad: Tensor, **values: Any) -> Any:
    model = Attention(**options)
    if values:
        rule = fg.rules.sus(generator=torch.Generator().manual_seed(2), **values)
        model = fg.transform(model, {"scaled_dot_product_attention": rule})
    return torch.autograd.grad(model(*given), given, grad)


@pytest.mark.parametrize("case", ["plain", "causal", "masked"])
def test_the_gradients_are_those_of_the_kept_entries(case: str) -> None:
    options, heads = CASES[case]
    given, c = operands(heads), 1.5
    q, k, v = (t.detach() for t in given)
    unit = torch.eye(5, dtype=torch.float64)
    # The gradient of the values is then the pattern
    pattern = gradients(options, given, unit.expand(1, 4, 5, 5), c=c)[2].transpose(-1, -2)
    y = Attention(**options)(q, k, v)
    exact = Attention(**options)(q, k, unit.expand_as(v))
    kept = pattern != 0
    assert 0 < kept.sum() < 20 * c * 2
    torch.testing.assert_close(pattern, torch.where(kept, exact.clamp(min=1 / c), 0))
    grad = drawn(*y.shape)
    dq, dk, dv = gradients(options, given, grad, c=c)
    m = torch.zeros_like(pattern)
    for i in range(5):
        for j in range(5):
            m[..., i, j] = pattern[..., i, j] * (
                (v[..., j, :] - y[..., i, :]) * grad[..., i, :]
            ).sum(-1)
    m *= options.get("scale", 3**-0.5)
    torch.testing.assert_close(dq, m @ k)
    torch.testing.assert_close(dk, m.transpose(-1, -2) @ q)
    torch.testing.assert_close(dv, pattern.transpose(-1, -2) @ grad)


@pytest.mark.parametrize(("options", "heads"), CASES.values(), ids=CASES)
def test_the_gradients_are_unbiased(options: dict[str, Any], heads: int) -> None:
    given, grad = operands(heads), drawn(1, 4, 5, 5)
    native = gradients(options, given, grad)
    all_kept = gradients(options, given, grad, c=1e9)
    for found, expected in zip(all_kept, native, strict=True):
        torch.testing.assert_close(found, expected)
    many = gradients(options, operands(heads, 2000), grad.expand(2000, -1, -1, -1), c=2.0)
    for found, expected in zip(many, native, strict=True):
        error = (found.mean(0) - expected[0]) / (found.std(0) / 2000**0.5 + 1e-12)
        assert error.abs().max() < 4
        assert error.abs().max() > 0.1


@pytest.mark.parametrize(
    "door",
    [
        pytest.param(DOORS["compiled"], id="compiled", marks=pytest.mark.slow),
        pytest.param(DOORS["in a block"], id="in a block"),
    ],
)
def test_every_way_in_takes_the_rules(door: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return F.scaled_dot_product_attention(x, x, x)

    table = {"linear": "meprop", "scaled_dot_product_attention": fg.rules.sus(c=1e9)}
    model, x = Model().double(), drawn(1, 1, 5, 3).requires_grad_()
    expected = torch.autograd.grad(fg.transform(model, table)(x).square().sum(), x)
    found = torch.autograd.grad(door(model, table, (x,))(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_under_autocast_the_gradients_have_the_dtypes_of_the_operands() -> None:
    model, x = Attention(), torch.randn(1, 2, 5, 4, requires_grad=True)
    gm = fg.transform(model, {"scaled_dot_product_attention": fg.rules.sus(c=1e9)})
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.autograd.grad(model(x, x, x).float().square().sum(), x)
        found = torch.autograd.grad(gm(x, x, x).float().square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
