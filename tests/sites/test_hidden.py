"""A module that is kept whole and contains what the table selects is a warning, with a way in that reaches it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.sites.hidden import hidden_sites


def doubled(x: Tensor) -> Tensor:
    return F.relu(x) * 2


class Whole(nn.Module):
    """Cannot be traced, because it branches on a shape."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.act: Any = None

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return self.rest(x) if x.shape[0] > 1 else x

    def rest(self, x: Tensor) -> Tensor:
        return x + 1


class CallsAFunction(Whole):
    def rest(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class CallsAMethod(Whole):
    def rest(self, x: Tensor) -> Tensor:
        return (x + 1).relu_()


class CallsAHelper(Whole):
    def rest(self, x: Tensor) -> Tensor:
        return doubled(x)


class HoldsAFunction(Whole):
    def rest(self, x: Tensor) -> Tensor:
        self.act = F.relu
        return self.act(x)


def held() -> nn.Module:
    whole = HoldsAFunction()
    whole.act = F.relu
    return whole


HOLDS: dict[str, Callable[[], nn.Module]] = {
    "a module": lambda: Whole(nn.Linear(4, 4), nn.ReLU()),
    "a module in a module": lambda: Whole(nn.Sequential(nn.ReLU())),
    "a function": CallsAFunction,
    "a method": CallsAMethod,
    "a helper": CallsAHelper,
    "an attribute": held,
}


@pytest.mark.parametrize("kind", HOLDS)
def test_what_a_whole_module_holds_is_found(kind: str) -> None:
    found = [place.site.op for place in hidden_sites(HOLDS[kind](), "0")]
    assert found == ["relu"]


@pytest.mark.parametrize("kind", [kind for kind in HOLDS if kind != "an attribute"])
def test_a_whole_module_with_a_selected_op_is_a_warning(kind: str) -> None:
    model = nn.Sequential(HOLDS[kind](), nn.ReLU(), nn.Tanh())
    with pytest.warns(fg.FreegradWarning, match=r"0.*:relu in it.*freegrad_fx.compile") as caught:
        gm = fg.transform(model, {"relu": fg.rules.scale(s=0.0)})
    assert len(caught) == 1
    (note,) = fg.report(gm).opaque
    assert len(note.holds) == 1
    assert "the table selects" in str(fg.report(gm))
    with pytest.raises(fg.PlanError, match="relu in it"):
        fg.transform(model, {"relu": fg.rules.scale(s=0.0)}, strict=True)


@pytest.mark.parametrize("kind", ["a module", "a method"])
def test_the_ways_in_that_are_named_reach_it(kind: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    rules = {"relu": fg.rules.scale(s=0.0)}
    model = HOLDS[kind]()
    torch._dynamo.reset()
    compiled: Any = fg.compile(model, rules, backend="eager")
    for opened in (fg.transform(model, rules, example_inputs=(x.detach(),)), compiled):
        (grad,) = torch.autograd.grad(opened(x).sum(), x)
        assert not grad.any()


@pytest.mark.parametrize(
    ("rules", "more"),
    [
        ({"tanh": "straight_through"}, {}),
        ({"relu": None, "tanh": "straight_through"}, {}),
        (fg.RuleTable([fg.on("relu", module="1").backward("straight_through")]), {}),
        (None, {}),
        ({"relu": "straight_through"}, {"leaf_modules": [Whole]}),
    ],
)
def test_no_warning_where_nothing_is_selected(rules: Any, more: dict[str, Any]) -> None:
    model = nn.Sequential(Whole(nn.ReLU()), nn.ReLU(), nn.Tanh())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fg.transform(model, rules, **more)
    assert not any(note.holds for note in fg.report(gm).opaque)


def test_a_site_with_a_parametrization_is_not_hidden() -> None:
    act = nn.PReLU()
    nn.utils.parametrize.register_parametrization(act, "weight", Whole())
    assert not list(hidden_sites(act, "0"))


def test_a_scripted_module_is_not_searched() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    assert not list(hidden_sites(scripted, "0"))


def test_no_warning_where_the_module_holds_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fg.transform(nn.Sequential(Whole(nn.Linear(4, 4)), nn.ReLU()), "straight_through")
    assert len(fg.report(gm).opaque) == 1
