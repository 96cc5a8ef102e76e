"""The second derivative of a composition is that of its rules' formulas, each of the operation's own input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.ops import decoupled, stop_gradient

Formula = Callable[[Tensor, Tensor], Tensor]

X = torch.tensor([0.3, -0.4, 0.7, -1.6, 0.05], dtype=torch.double)

SCALE = fg.rules.scale(s=0.5)
SIGMOID = fg.rules.fast_sigmoid(slope=2.0)


@fg.register("test: second derivative, cubic")
def cubic(grad: Tensor, x: Tensor) -> Tensor:
    """grad · x³"""
    return grad * x**3


@fg.register("test: second derivative, gradient squared")
def squared(grad: Tensor, x: Tensor) -> Tensor:
    """grad² · x"""
    return grad * grad * x


# Written again here, so that the rules are compared with something else than themselves
FORMULAS: dict[str, Formula] = {
    "triangular": lambda g, x: g * (1 - x.abs()).clamp(min=0),
    "scale": lambda g, x: g * 0.5,
    "fast_sigmoid": lambda g, x: g / (1 + 2.0 * x.abs()) ** 2,
    "test: second derivative, cubic": lambda g, x: g * x**3,
    "test: second derivative, gradient squared": lambda g, x: g * g * x,
}
CHAINS = {
    "smooth, then constant": ("triangular", SCALE),
    "constant, then smooth": (SCALE, "triangular"),
    "both smooth": (SIGMOID, "test: second derivative, cubic"),
    "not linear in the gradient": (
        "test: second derivative, cubic",
        "test: second derivative, gradient squared",
    ),
    "three": (SIGMOID, "test: second derivative, cubic", "triangular"),
}
chains = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def by_hand(function: Callable[[Tensor], Tensor], chain: Any) -> Callable[[Tensor], Tensor]:
    """A function whose backward is the rules of a chain, one after the other, all with the function's own input."""
    formulas = [FORMULAS[fg.get(rule).name] for rule in chain]

    class ByHand(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return function(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            (x,) = ctx.saved_tensors
            for formula in formulas:
                grad = formula(grad, x)
            return grad

    return ByHand.apply  # type: ignore[no-any-return]


class Around(nn.Module):
    """A site between operations, so that its incoming gradient depends on the input too."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        h = x * 0.9
        return self.function(h) ** 2


class Viewed(nn.Module):
    """A site that works in place on memory that is read through another view."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * 0.9
        view = h[:]
        torch.tanh_(h)
        return view**2


class OfParameter(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value.detach().clone())

    def forward(self) -> Tensor:
        return self.weight**2


def first_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return grad


def derivatives(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The first and second derivative, and the second one by finite differences of the first."""
    x = X.clone().requires_grad_()
    first = first_gradient(function, x)
    weights = torch.linspace(1.0, 2.0, len(X), dtype=X.dtype)
    (second,) = torch.autograd.grad((first * weights).sum(), x)
    above, below = (first_gradient(function, (X + step).requires_grad_()) for step in (1e-6, -1e-6))
    return first.detach(), second, weights * (above - below).detach() / 2e-6


def check(function: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor]) -> None:
    first, second, _ = derivatives(function)
    expected_first, expected_second, _ = derivatives(expected)
    torch.testing.assert_close(first, expected_first)
    torch.testing.assert_close(second, expected_second)
    assert second.abs().max() > 0


def transformed(model: nn.Module, chain: Any) -> fg.CapturedModule:
    return fg.transform(model, {"tanh": fg.compose(*chain)})


def in_block(model: Callable[[Tensor], Tensor], chain: Any) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with fg.use(fg.compose(*chain)):
            return model(x)

    return run


def by_calls(chain: Any) -> Callable[[Tensor], Tensor]:
    """The calls of a rewritten graph, as a user can write them."""
    first, *others = map(fg.get, chain)

    def run(x: Tensor) -> Tensor:
        source = x
        for rule in reversed(others):
            source = decoupled(stop_gradient(source), source, x, rule=rule)
        return decoupled(torch.tanh(stop_gradient(x)), source, x, rule=first)

    return run


WAYS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "symbolic": lambda chain: transformed(Around(torch.tanh), chain),
    "module": lambda chain: transformed(Around(nn.Tanh()), chain),
    "in place": lambda chain: transformed(Around(torch.tanh_), chain),
    "in place, read elsewhere": lambda chain: transformed(Viewed(), chain),
    "export": lambda chain: fg.transform(
        Around(torch.tanh), {"tanh": fg.compose(*chain)}, example_inputs=(X,)
    ),
    "copied": lambda chain: copy.deepcopy(transformed(Around(torch.tanh), chain)),
    "calls": lambda chain: Around(by_calls(chain)),
    "Activation": lambda chain: Around(fg.Activation("Tanh", rule=fg.compose(*chain))),
    "ambient Activation": lambda chain: in_block(Around(fg.Activation("Tanh")), chain),
    "ambient": lambda chain: in_block(fg.transform(Around(torch.tanh)), chain),
    "ambient, in place": lambda chain: in_block(fg.transform(Around(torch.tanh_)), chain),
    "table in a block of another rule": lambda chain: in_block(
        transformed(Around(torch.tanh), chain), (fg.rules.scale(s=9.0), SCALE)
    ),
    "compiled": lambda chain: fg.compile(
        Around(torch.tanh), {"tanh": fg.compose(*chain)}, backend="eager"
    ),
    "transform, then compiled": lambda chain: torch.compile(
        transformed(Around(torch.tanh), chain), backend="eager"
    ),
}


@pytest.mark.sampled(6)
@chains
@pytest.mark.parametrize("way", WAYS)
def test_every_rule_of_a_chain_reads_the_input_of_the_operation(way: str, chain: Any) -> None:
    torch._dynamo.reset()
    check(WAYS[way](chain), Around(by_hand(torch.tanh, chain)))


@chains
def test_finite_differences_agree_where_the_gradient_is_a_function_of_x_alone(chain: Any) -> None:
    gm = transformed(nn.Sequential(nn.Tanh()), chain)
    _, second, differences = derivatives(gm)
    torch.testing.assert_close(second, differences, rtol=1e-5, atol=1e-7)


@chains
def test_under_torch_func(chain: Any) -> None:
    gm, expected = transformed(Around(torch.tanh), chain), Around(by_hand(torch.tanh, chain))
    second = torch.func.grad(lambda x: torch.func.grad(lambda v: gm(v).sum())(x).sum())(X)
    x = X.clone().requires_grad_()
    torch.testing.assert_close(second, torch.autograd.grad(first_gradient(expected, x).sum(), x)[0])
    jacobian = torch.func.vmap(torch.func.grad(torch.func.grad(lambda v: gm(v).sum())))(X)
    torch.testing.assert_close(jacobian, second)


@chains
def test_compositions_on_a_parameter(chain: Any) -> None:
    gm = fg.transform(OfParameter(X), {"params": fg.compose(*chain)})
    identity = by_hand(Tensor.clone, chain)
    (first,) = torch.autograd.grad(gm().sum(), gm.weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), gm.weight)
    x = X.clone().requires_grad_()
    expected = first_gradient(lambda v: identity(v) ** 2, x)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), x)[0])
