"""Rules that use the operands of an operation, in whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import freegrad_fx as fg
from freegrad_fx.core import rule as registry
from freegrad_fx.errors import FreegradWarning, PlanError, RuleError


@pytest.fixture(autouse=True)
def own_rules() -> Iterator[None]:
    before = dict(registry._registry)
    yield
    registry._registry.clear()
    registry._registry.update(before)


@pytest.fixture
def doubled() -> fg.Rule:
    """A rule that doubles the gradient of the weight, and leaves the others native."""

    def doubled(grad, x, weight, *, f):
        return 2 * f.gradient("weight", grad)

    return fg.register("doubled", answers="weight")(doubled)


class Tied(nn.Module):
    """One weight at three places, in a module and in functions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.layer.weight).tanh()
        return (self.layer(x).tanh() @ self.layer.weight.t()).tanh()


class TiedByHand(nn.Module):
    """`Tied` with the gradient of the weight doubled at the places that are listed."""

    def __init__(self, model: Tied, places: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.places = model.layer, places

    def weight(self, place: int) -> Tensor:
        weight = self.layer.weight
        return 2 * weight - weight.detach() if place in self.places else weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight(0)).tanh()
        x = F.linear(x, self.weight(1), self.layer.bias).tanh()
        return F.linear(x, self.weight(2)).tanh()


def gradients(
    run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor
) -> tuple[Tensor | None, ...]:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(
        run(leaf).square().sum(), [leaf, *model.parameters()], allow_unused=True
    )


def ways(model: nn.Module, table: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """The model with a table, by `transform` and in a block."""
    yield fg.transform(model, table)

    def in_block(x: Tensor) -> Tensor:
        with fg.use(table, model=model):
            return model(x)

    yield in_block


def close(found: Any, expected: Any) -> bool:
    return all(map(torch.allclose, found, expected))


@pytest.mark.parametrize(
    ("places", "selected"),
    [
        ((0,), {"module": "", "call": 0}),
        ((1,), {"module": "layer"}),
        ((2,), {"module": "", "call": 1}),
        ((0, 1, 2), {}),
    ],
)
def test_a_rule_acts_at_the_places_of_a_tied_weight_that_are_selected(
    doubled: fg.Rule, places: tuple[int, ...], selected: dict[str, Any]
) -> None:
    model, x = Tied().double(), torch.randn(2, 3, dtype=torch.float64)
    expected = gradients(TiedByHand(model, places), model, x)
    table = fg.RuleTable([fg.on("linear", **selected).backward(doubled)])
    for run in ways(model, table):
        assert close(gradients(run, model, x), expected)


def test_rules_at_an_operand_of_the_site_and_on_the_parameter_act_one_after_the_other(
    doubled: fg.Rule,
) -> None:
    model, x = Tied().double(), torch.randn(2, 3, dtype=torch.float64)
    dx, dw, db = gradients(TiedByHand(model, (0, 1, 2)), model, x)
    table = fg.RuleTable(
        [
            fg.on("linear").backward(doubled),
            fg.on("linear", at="weight").backward("scale", s=3.0),
            fg.on(parameter="*.weight").backward("scale", s=5.0),
        ]
    )
    for run in ways(model, table):
        assert close(gradients(run, model, x), (dx, 15 * dw, db))


def test_hooks_of_the_module_run_around_the_rule(doubled: fg.Rule) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3)).double(), torch.randn(2, 3, dtype=torch.float64)
    model[0].register_forward_hook(lambda module, args, output: 7 * output)
    dx, dw, db = gradients(model, model, x)
    for run in ways(model, {"linear": doubled}):
        assert close(gradients(run, model, x), (dx, 2 * dw, db))


def test_a_weight_that_the_module_computes_is_out_of_reach(doubled: fg.Rule) -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.warns(FreegradWarning, match="computes the weight itself"):
        fg.transform(model, {"linear": doubled})


def test_in_place_products_give_rules_the_values_before() -> None:
    @fg.register("crossed", answers=("a", "b"))
    def crossed(grad, a, b):
        return {"a": grad * b * 3, "b": grad * a * 5}

    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            y *= x
            z = y.clone()
            z.mul_(y)
            return z

    def by_hand(x: Tensor) -> Tensor:
        def product(a: Tensor, b: Tensor) -> Tensor:
            surrogate = 3 * a * b.detach() + 5 * a.detach() * b
            return (a * b).detach() + surrogate - surrogate.detach()

        y = product(x + 1, x)
        return product(y, y)

    model, x = InPlace().double(), torch.randn(4, dtype=torch.float64)
    expected = gradients(by_hand, model, x)
    for run in ways(model, {"mul": crossed}):
        assert close(gradients(run, model, x), expected)


def test_under_autocast_the_products_have_the_dtype_of_the_forward(doubled: fg.Rule) -> None:
    @fg.register("natively", answers=("x", "weight"))
    def natively(grad, x, weight, *, f):
        return {"x": f.gradient("x", grad), "weight": f.gradient("weight", grad)}

    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(4, 3)

    def cast(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run_cast(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run(x).float()

        return run_cast

    expected = gradients(cast(model), model, x)
    for run in ways(model, {"linear": natively}):
        assert all(map(torch.equal, gradients(cast(run), model, x), expected))


def test_what_cannot_be_is_refused_with_a_remedy(doubled: fg.Rule) -> None:
    model = Tied()
    with pytest.raises(PlanError, match="needs the operand 'weight', which mul does not have"):
        fg.transform(nn.Sequential(model, Scaled()), {"mul": doubled})
    with pytest.raises(PlanError, match="a composition cannot contain it"):
        fg.transform(model, {"linear": fg.compose(doubled, "scale")})
    with pytest.raises(PlanError, match="acts around an identity"):
        fg.transform(model, fg.RuleTable([fg.on("linear", at="weight").backward(doubled)]))

    @fg.register("of_values", answers="value")
    def of_values(grad, query, key, value, *, f):
        return f.gradient("value", grad)

    attention = Attention()
    with pytest.raises(PlanError, match="not possible for this call"):
        fg.transform(attention, {"scaled_dot_product_attention": of_values})
    with (
        fg.use({"scaled_dot_product_attention": of_values}),
        pytest.raises(RuleError, match="not possible for this call"),
    ):
        attention(torch.randn(1, 2, 3, requires_grad=True))


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
