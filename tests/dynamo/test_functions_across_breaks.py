"""Functions that a forward makes and that are alive where Dynamo breaks the graph."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.dynamo.watch import activation_call


class Times:
    def __init__(self, factor: Any) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(x * self.factor)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

    def before(self, x: Tensor) -> Tensor:
        return self.act(self.a(x))


class Lambda(Net):
    def forward(self, x: Tensor) -> Tensor:
        double = lambda t: t * 2  # noqa: E731
        h = self.before(x)
        if h.sum() > 0:
            h = h + 1
        return double(h)


class Nested(Net):
    def forward(self, x: Tensor) -> Tensor:
        options = {"k": 2}

        def scaled(t: Tensor, *, given: Any = options) -> Tensor:
            return torch.relu(self.b(t)) * given["k"] * options["k"]

        h = self.before(x)
        if h.sum() > 0:
            h = h + 1
        return scaled(h)


class Partial(Net):
    def forward(self, x: Tensor) -> Tensor:
        add = functools.partial(lambda a, b, k: torch.relu(a + b * k), x, k=2)
        h = self.before(x)
        if h.sum() > 0:
            h = h + 1
        return add(h)


class Object(Net):
    def forward(self, x: Tensor) -> Tensor:
        times = Times(2)
        h = self.before(x)
        if h.sum() > 0:
            h = h + 1
        return times(h)


class Generator(Net):
    def forward(self, x: Tensor) -> Tensor:
        parts = (torch.relu(x * i) for i in range(3))
        h = self.before(x)
        torch._dynamo.graph_break()
        return h + sum(parts)


# PyTorch's own warning where a graph goes on with the result of another
@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
# Python runs the generator, and a warning names its sites
@pytest.mark.filterwarnings("ignore:outside of the captured graphs of Generator")
@pytest.mark.parametrize("by", ["compile", "backend"])
@pytest.mark.parametrize("make", [Lambda, Nested, Partial, Object, Generator])
def test_the_model_runs_with_its_rules(make: Callable[[], nn.Module], by: str) -> None:
    torch._dynamo.reset()
    model, rules = make(), {"relu": "d(ReLU)"}
    compiled: Any = (
        fg.compile(model, rules, backend="aot_eager")
        if by == "compile"
        else torch.compile(model, backend=fg.backend(rules, inner="aot_eager"))
    )
    for size in (3, 5, 7):  # Dynamo compiles again for other shapes, and for the other branch
        for shift in (0.0, -9.0):
            x = (torch.randn(size, 4) + shift).requires_grad_()
            output, expected = compiled(x), model(x)
            assert torch.equal(output, expected)
            output.sum().backward()
            grad = x.grad
            torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


def call() -> object:
    return activation_call()


def test_code_that_cannot_be_hashed_is_not_looked_up_by_its_hash() -> None:
    """Dynamo generates such code for a function that is alive across a graph break."""
    code = call.__code__.replace(
        co_consts=(*call.__code__.co_consts, {}), co_filename=torch.__file__
    )
    with pytest.raises(TypeError, match="unhashable"):
        hash(code)
    assert types.FunctionType(code, globals())() is None
