"""Methods of a transformed model that call its parts: a warning says that no rule acts there, and its remedy works."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg

RULES = {"relu": fg.rules.scale(s=7.0)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]

    def validation_step(self, x: Tensor) -> Tensor:
        return self.encoder(x).sum()  # type: ignore[no-any-return]

    def by_index(self, x: Tensor) -> Tensor:
        return self.layers[1](x)  # type: ignore[no-any-return]

    def in_a_loop(self, x: Tensor) -> Tensor:
        for _, layer in enumerate(self.layers):
            x = layer(x)
        return x

    def through_another(self, x: Tensor) -> Tensor:
        return self.validation_step(x)

    def by_forward(self, x: Tensor) -> Tensor:
        return self(x).sum()  # type: ignore[no-any-return]

    def without_rule(self, x: Tensor) -> Tensor:
        return self.head(x)  # type: ignore[no-any-return]

    def groups(self, x: Tensor) -> Any:
        return [self.encoder.parameters(), self.encoder, len(self.layers), self.encoder[0].weight]


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found if issubclass(w.category, fg.FreegradWarning)]


def given(name: str) -> Tensor:
    return torch.randn(2, 3 if name in ("validation_step", "through_another", "by_forward") else 4)


STAGES: dict[str, Callable[[Any], Any]] = {
    "transformed": lambda gm: gm,
    "copied": copy.deepcopy,
    "saved": lambda gm: pickle.loads(pickle.dumps(gm)),
    "transformed twice": lambda gm: fg.transform(gm, {"params": "scale"}),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("name", "method", "part"),
    [
        ("validation_step", "validation_step", "encoder"),
        ("by_index", "by_index", "layers"),
        ("in_a_loop", "in_a_loop", "layers"),
        ("through_another", "validation_step", "encoder"),
    ],
)
def test_a_call_of_a_part_with_a_rule_is_said_once(
    name: str, method: str, part: str, stage: str
) -> None:
    gm = STAGES[stage](fg.transform(Model(), RULES))
    x = given(name)
    (text,) = warned(lambda: [getattr(gm, name)(x) for _ in range(3)])
    assert f"Model.{method} calls {part} of the transformed model" in text
    gm.recompile()
    assert not warned(lambda: getattr(gm, name)(x))


@pytest.mark.parametrize("name", ["by_forward", "without_rule", "groups"])
def test_other_methods_do_not_warn(name: str) -> None:
    gm: Any = fg.transform(Model(), RULES)
    assert not warned(lambda: getattr(gm, name)(given(name)))


def test_methods_without_such_calls_are_those_of_the_model() -> None:
    gm: Any = fg.transform(Model(), RULES)
    assert type(gm).by_forward is Model.by_forward
    native: Any = fg.transform(Model(), {"relu": None})
    assert type(native).validation_step is Model.validation_step
    assert type(fg.transform(Model())).validation_step is Model.validation_step  # type: ignore[attr-defined]


def test_a_parameter_with_a_rule() -> None:
    gm: Any = fg.transform(Model(), {"params": "scale"})
    (text,) = warned(lambda: gm.without_rule(given("without_rule")))
    assert "calls head" in text


def test_where_no_gradient_or_no_rule_is_wanted_it_is_silent() -> None:
    gm: Any = fg.transform(Model(), RULES)
    x = given("validation_step")

    def run() -> None:
        with torch.no_grad():
            gm.validation_step(x)
        with fg.native():
            gm.validation_step(x)
        with fg.use(RULES, model=gm):
            gm.validation_step(x)

    assert not warned(run)


@pytest.mark.parametrize("rules", [RULES, {"params": fg.rules.scale(s=7.0)}])
def test_the_remedy_gives_the_rules(rules: Any) -> None:
    model = Model()
    gm: Any = fg.transform(model, rules)
    x, bias = given("validation_step"), model.encoder[0].bias
    hidden = model.encoder[0](x) if rules is RULES else model.encoder(x)  # scale is no derivative
    (expected,) = torch.autograd.grad(7 * hidden.sum(), bias)
    with fg.use(rules, model=gm):
        (actual,) = torch.autograd.grad(gm.validation_step(x), bias)
    assert torch.equal(actual, expected)


def test_a_compiled_method_warns_too() -> None:
    torch.compiler.reset()
    gm: Any = fg.transform(Model(), RULES)
    run = torch.compile(gm.validation_step, backend="eager", fullgraph=True)
    x = given("validation_step")
    (text,) = warned(lambda: [run(x) for _ in range(2)])
    assert "validation_step calls encoder" in text
