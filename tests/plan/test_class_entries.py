"""A class as a key selects calls of modules: what no rule can act on there is refused, as early as it can be known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.errors import PlanError, RuleError


class First(nn.Module):
    """The first output of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 4),
        lambda: nn.GRU(4, 4),
        lambda: nn.RNN(4, 4),
        lambda: nn.LSTMCell(4, 4),
        lambda: nn.MaxPool1d(1, return_indices=True),
    ],
)
def test_a_class_that_returns_a_tuple_is_refused_when_planned(
    make: Callable[[], nn.Module],
) -> None:
    module = make()
    kind = type(module)
    with pytest.raises(PlanError, match=rf"entry '{kind.__name__}' .* returns a tuple.*module:"):
        fg.transform(First(module), {kind: "straight_through"})
    assert fg.transform(First(module), {kind: None}) is not None


def test_a_cell_that_returns_a_tensor_is_accepted() -> None:
    gm = fg.transform(nn.Sequential(nn.GRUCell(4, 4)), {nn.GRUCell: "straight_through"})
    x = torch.ones(2, 4, requires_grad=True)
    gm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.eq(1).all()


class Two(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x * 2


def test_a_class_of_the_user_that_returns_a_tuple_is_refused_in_the_forward() -> None:
    gm = fg.transform(First(Two()), {Two: "straight_through"})
    with pytest.raises(TypeError, match=r"'module:Two\[0\]' returned tuple.* give the class None"):
        gm(torch.ones(3, requires_grad=True))


class Derived(nn.Linear):
    pass


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.sum()


SHAPES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "Linear": (lambda: nn.Linear(4, 3), True),
    "square Linear": (lambda: nn.Linear(4, 4), False),
    "derived": (lambda: Derived(4, 3), True),
    "own forward": (lambda: Own(4, 3), False),
    "Conv1d": (lambda: nn.Conv1d(4, 3, 1), True),
    "strided Conv1d": (lambda: nn.Conv1d(4, 4, 1, stride=2), True),
    "Conv1d of the same shape": (lambda: nn.Conv1d(4, 4, 3, padding=1), False),
    "Embedding": (lambda: nn.Embedding(4, 4), True),
    "Flatten": (nn.Flatten, True),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), True),
    "MaxPool1d of the same shape": (lambda: nn.MaxPool1d(3, stride=1, padding=1), False),
    "LayerNorm": (lambda: nn.LayerNorm(4), False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_class_that_changes_the_shape_is_refused_when_planned(name: str) -> None:
    make, refused = SHAPES[name]
    module = make()
    model, rules = nn.Sequential(module), {type(module): "clip_norm"}
    if not refused:
        x = torch.randn(4, 4, 4, requires_grad=True)
        fg.transform(model, rules)(x).sum().backward()
        return
    with pytest.raises(
        PlanError, match=r"'clip_norm' .* changes the shape; at site 0:.*parameter="
    ):
        fg.transform(model, rules)


def test_a_rule_that_changes_the_shape_is_accepted() -> None:
    @fg.register("test: widened", keeps_shape=False, overwrite=True)
    def widened(grad: Tensor, x: Tensor) -> Tensor:
        """grad summed, for each entry of x"""
        return grad.sum(-1, keepdim=True).expand_as(x)

    gm = fg.transform(nn.Sequential(nn.Linear(4, 3)), {nn.Linear: widened})
    x = torch.ones(2, 4, requires_grad=True)
    gm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.eq(3).all()


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1)


def test_a_class_of_the_user_that_changes_the_shape_is_refused_in_the_backward() -> None:
    gm = fg.transform(nn.Sequential(Sums()), {Sums: "clip_norm"})
    y = gm(torch.ones(2, 3, requires_grad=True))
    with pytest.raises(RuleError, match=r"'clip_norm' at site '0:Sums\[0\]'.*keeps_shape=False"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("rules", "site"),
    [({"relu": None}, r"0:relu\[0\]"), ({"params": None}, r"1\.(weight|bias)")],
)
@pytest.mark.parametrize("shape", [(3,), (5, 1, 1, 1)])
def test_a_tensor_that_does_not_fit_is_named_in_the_backward(
    rules: dict[str, Any], site: str, shape: tuple[int, ...]
) -> None:
    rule = fg.rules.scale(s=torch.ones(shape))
    gm = fg.transform(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), dict.fromkeys(rules, rule))
    y = gm(torch.ones(2, 4, requires_grad=True))
    with pytest.raises(
        RuleError, match=rf"'scale' at site '{site}'.*'s', a tensor of shape \({shape[0]},"
    ):
        y.sum().backward()
