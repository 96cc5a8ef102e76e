"""Rules at operands: of linear layers, convolutions, norms, attention and arithmetic, by every way in.

The reference is the same model with a naive edge at each operand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import freegrad_fx as fg
import models
from doors import DOORS
from models import naive
from runs import assert_same_forward, assert_same_gradients, close, difference_in_gradients, run

# Dynamo reads `.grad` of whatever goes from one graph into the next
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

ATTENTION = "scaled_dot_product_attention"
PLACES = (
    ("linear", "x"), ("linear", "weight"), ("linear", "bias"), ("linear", "output"),
    ("mul", "a"), ("mul", "b"), ("mul", "output"), ("add", "a"), ("add", "b"), ("div", "b"), ("sub", "a"),
    ("layer_norm", "weight"), ("conv", "x"), ("conv", "weight"),
    (ATTENTION, "query"), (ATTENTION, "key"), (ATTENTION, "value"),
)  # fmt: skip
FACTORS = {place: 1.1 + 0.1 * number for number, place in enumerate(PLACES)}
WINDOW, WINDOW_BY_HAND = fg.rules.rectangular(a=-3.0, b=3.0), models.rectangular(-3.0, 3.0)
TABLE = fg.RuleTable(
    fg.on(op, at=at).backward(fg.compose(fg.rules.scale(s=factor), WINDOW))
    for (op, at), factor in FACTORS.items()
)


class Net(nn.Module):
    """Modules and functions, operands by position and by keyword, given twice, constant, written into, and tied."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.conv, self.norm = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Conv1d(4, 4, 1),
            nn.LayerNorm(4),
        )
        self.g.weight = self.f.weight
        self.w = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("constant", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        h = self.norm(h * h + 2 * h)
        h = F.linear(input=h, weight=self.f.weight, bias=self.f.bias) + h @ self.w
        h = self.conv(h.t()[None])[0].t()
        a = F.scaled_dot_product_attention(h[None], h[None] * self.constant, value=h[None] - 1)[0]
        h = a / (h**2 + 1)
        h.mul_(h.sigmoid()).add_(a)
        both = (h,) + (a,)  # noqa: RUF005
        return self.g(both[0]) - both[1].exp()


def at(op: str, name: str, value: Any) -> Any:
    if (op, name) not in FACTORS or not isinstance(value, Tensor):
        return value
    for backward in (WINDOW_BY_HAND, models.scale(FACTORS[op, name])):
        value = naive(lambda v: v.clone(), backward)(value)
    return value


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.linear(at("linear", "x", x), at("linear", "weight", weight), at("linear", "bias", bias))
    return at("linear", "output", y)


def mul(a: Tensor, b: Any) -> Tensor:
    return at("mul", "output", at("mul", "a", a) * at("mul", "b", b))


def add(a: Tensor, b: Any) -> Tensor:
    return at("add", "a", a) + at("add", "b", b)


class ByHand(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = linear(x, self.f.weight, self.f.bias)
        h = add(mul(h, h), mul(h, 2))
        h = F.layer_norm(h, (4,), at("layer_norm", "weight", self.norm.weight), self.norm.bias)
        product = at("linear", "x", h) @ at("linear", "weight", self.w)
        h = add(linear(h, self.f.weight, self.f.bias), at("linear", "output", product))
        weight = at("conv", "weight", self.conv.weight)
        h = F.conv1d(at("conv", "x", h.t()[None]), weight, self.conv.bias)[0].t()
        query, key = at(ATTENTION, "query", h[None]), mul(h[None], self.constant)
        value = at(ATTENTION, "value", at("sub", "a", h[None]) - 1)
        a = F.scaled_dot_product_attention(query, at(ATTENTION, "key", key), value)[0]
        h = a / at("div", "b", add(h**2, 1))
        h = add(mul(h, h.sigmoid()), a)
        return at("sub", "a", linear(h, self.g.weight, self.g.bias)) - a.exp()


def made(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    return kind().double()


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_every_way_in_gives_the_gradients_of_the_model_written_by_hand(door: Any) -> None:
    model, expected = made(Net), run(made(ByHand), X)
    called = door(model, TABLE, (X,))
    actual, native = run(called, X, of=model), run(made(Net), X)
    assert_same_forward(actual, native)
    assert_same_gradients(actual, expected, close)
    assert difference_in_gradients(expected, native, close)
    if hasattr(called, "graph"):
        with fg.native():
            off = run(called, X, of=model)
        assert_same_gradients(off, native)


def test_a_rule_at_an_operand_acts_on_this_use_only() -> None:
    """The parameter is also tied, has a rule of its own, and its module has hooks."""
    layers = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    layers[1].weight = layers[0].weight
    layers[0].register_forward_hook(lambda module, args, y: y * 1.0)
    model = layers.double()
    x = torch.randn(3, 2, dtype=torch.float64)

    def gradient(called: Any, weight: Tensor) -> Tensor:
        return torch.autograd.grad(called(x).square().sum(), weight)[0]

    weight = model[0].weight
    second = weight.detach().clone().requires_grad_()
    first = weight.detach().clone().requires_grad_()
    by_hand = F.linear(F.linear(x, first), second).square().sum()
    of_first, of_second = torch.autograd.grad(by_hand, (first, second))
    entry = fg.on("linear", module="0", at="weight").backward("scale", s=3.0)
    own = fg.on("params").backward("reverse")
    for table, expected in (
        (fg.RuleTable([entry]), 3 * of_first + of_second),
        (fg.RuleTable([entry, own]), -(3 * of_first + of_second)),
    ):
        gm = fg.transform(model, table)
        assert [*gm.state_dict()] == [*model.state_dict()]
        torch.testing.assert_close(gradient(gm, weight), expected)
        with fg.use(table, model=model):
            torch.testing.assert_close(gradient(model, weight), expected)
    again = fg.transform(fg.transform(model, fg.RuleTable([entry])), fg.RuleTable([own]))
    torch.testing.assert_close(gradient(again, weight), -(3 * of_first + of_second))


def test_a_weight_that_the_module_computes_is_reported() -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer = nn.Linear(2, 2)
    parametrize.register_parametrization(layer, "weight", Double())
    table = fg.RuleTable([fg.on("linear", at=["weight", "bias"]).backward("stop")])
    with pytest.warns(fg.FreegradWarning, match="computes the weight itself, by a parametrization"):
        gm = fg.transform(nn.Sequential(layer), table)
    decided = {d.site.at: d.action for d in fg.report(gm).decisions if d.site.at != "replace"}
    assert decided == {"weight": "skip", "bias": "rewrite"}


def test_operands_of_one_operation_are_named_in_the_order_in_which_they_are_written() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x + 2 * x - x / 2 + (1 - x)

    table = fg.RuleTable([fg.on("mul", call=0, at="a").backward("stop")])
    x = torch.tensor([3.0], requires_grad=True)
    assert torch.autograd.grad(fg.transform(Model(), table)(x), x)[0].item() == 3 + 2 - 0.5 - 1
    names = {"mul[0]@a", "mul[0]@b", "mul[1]@a", "sub[0]@a", "sub[0]@b", "sub[1]@b"}
    table = fg.RuleTable([fg.on(["mul", "sub"], at=["a", "b"]).backward("stop")])
    for door in (DOORS["symbolic"], DOORS["exported"], DOORS["compiled"]):
        called = door(Model(), table, (x,))
        called(x)
        found = {d.site.name.partition(":")[2] for d in fg.report(called).with_action("rewrite")}
        assert found == names
