"""GELUs that models compute in separate operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from doors import DOORS


class New(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class Fast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


class Erf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * (1.0 + torch.erf(x / math.sqrt(2.0)))) * 0.5


class Quick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


GELUS = (New, Fast, Erf, Last, Quick)
WAYS = pytest.mark.parametrize(
    "door", [DOORS["symbolic"], DOORS["in a block"]], ids=["graph", "block"]
)


def model_of(*kinds: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for kind in kinds for layer in (nn.Linear(4, 4), kind())]
    return nn.Sequential(*layers, nn.Linear(4, 2)).double()


def gradient(called: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    y = called(x)
    return y, torch.autograd.grad(y.sum(), x)[0]


class ByHand(nn.Module):
    """The identity rule at one of the GELUs: the gradient is that of a product with a constant."""

    def __init__(self, gelu: nn.Module) -> None:
        super().__init__()
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gelu(x) / x).detach()


# Dynamo reads `.grad` of whatever goes from one graph into the next
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "door",
    [
        pytest.param(door, id=name, marks=[pytest.mark.slow] * (name in ("exported", "compiled")))
        for name, door in DOORS.items()
    ],
)
def test_every_spelling_is_a_gelu(door: Any) -> None:
    model = model_of(*GELUS)
    _, expected = gradient(model_of(*((lambda k=k: ByHand(k())) for k in GELUS)))
    called = door(model, {"activations": "identity_rule"}, (torch.ones(3, 4).double(),))
    y, found = gradient(called)
    assert torch.equal(y, gradient(model)[0])
    torch.testing.assert_close(found, expected)


@WAYS
def test_a_rule_at_the_step_alone_acts_there(door: Any) -> None:
    called = door(model_of(New), {"tanh": "stop"}, ())
    with fg.use({"tanh": "stop"}) as block:
        _, expected = gradient(model_of(New))
    assert torch.equal(gradient(called)[1], expected)
    assert [d.site.op for d in fg.report(block).decisions] == ["tanh"]


@WAYS
def test_its_forward_can_be_replaced(door: Any) -> None:
    rules = {"gelu": fg.rules.straight_through(forward="relu")}
    y, found = gradient(door(model_of(New), rules, ()))
    expected_y, expected = gradient(door(model_of(nn.GELU), rules, ()))
    assert torch.equal(y, expected_y)
    assert torch.equal(found, expected)


def test_an_ambient_gelu_follows_blocks() -> None:
    gm = fg.transform(model_of(New), ambient=True)
    assert torch.equal(gradient(gm)[1], gradient(model_of(New))[1])
    rules = {"gelu": "straight_through"}
    with fg.use(rules):
        _, found = gradient(gm)
    assert torch.equal(found, gradient(fg.transform(model_of(New), rules))[1])


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(1.702 * x)
    return x * gate


OTHERS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x * torch.sigmoid(x),
    lambda x: 0.5 * x * (1.0 + torch.tanh(x)),
    lambda x: x * 0.5 * (1.0 + torch.erf(x)),
    lambda x: x.flip(0) * torch.sigmoid(1.702 * x),
    lambda x: F.relu(x) * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    lambda x: torch.tanh(x),
    without_gradient,
]


@pytest.mark.parametrize("forward", OTHERS)
def test_what_is_no_gelu(forward: Any) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    plan = fg.explain(Other(), fg.RuleTable([fg.on("gelu", optional=True).backward("stop")]))
    assert not [d for d in plan.decisions if d.site.op == "gelu"]


def test_an_input_that_is_written_between_the_calls_is_no_gelu() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            gate = torch.sigmoid(1.702 * x)
            x.mul_(2)
            return x * gate

    model = model_of(Writes)
    with pytest.warns(fg.FreegradWarning, match="written into between the calls that read it"):
        gm = fg.transform(model, {"gelu": "stop"})
    assert all(map(torch.equal, gradient(gm), gradient(model)))
