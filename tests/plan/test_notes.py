"""What the report says of a rule at an operation that it is not meant for, and of a forward that leaves only zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg


def model(low: float = 0.0, high: float = 0.4) -> nn.Module:
    built = nn.Sequential(nn.Linear(4, 4, bias=False), nn.GELU(), nn.ReLU(), nn.GELU())
    nn.init.uniform_(built[0].weight, low, high)  # type: ignore[arg-type]
    return built


def notes(plan: Any) -> list[str]:
    return [line for line in plan.to_text(0).splitlines() if line.startswith("Note")]


WAYS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "symbolic": lambda m, rules: fg.report(fg.transform(m, rules)),
    "export": lambda m, rules: fg.report(
        fg.transform(m, rules, example_inputs=(torch.ones(2, 4),))
    ),
    "compile": lambda m, rules: compiled(m, rules),
}


def compiled(m: nn.Module, rules: Any) -> Any:
    made = fg.compile(m, rules, backend="eager")
    made(torch.ones(2, 4))
    return fg.report(made)


@pytest.mark.parametrize("way", WAYS)
def test_guided_elsewhere_than_at_a_relu(way: str) -> None:
    (note,) = notes(WAYS[way](model(), {"activations": "guided"}))
    assert note == (
        "Note, 2 sites: rule 'guided' is meant for relu; its formula, max(grad, 0)·1[x > 0], replaces the derivative "
        "of gelu."
    )


def test_guided_at_a_relu_or_with_another_forward_is_not_noted() -> None:
    assert not notes(fg.explain(model(), {"relu": "guided"}))
    assert not notes(fg.explain(model(), {"gelu": fg.get("guided")(forward="relu")}))
    assert not notes(fg.explain(model(), {"activations": "d(ReLU)"}))


def test_a_rule_of_ones_own_declares_what_it_is_meant_for() -> None:
    @fg.register("test: for two", meant_for=("gelu", "silu"), overwrite=True)
    def rule(grad: Tensor) -> Tensor:
        """grad"""
        return grad

    plan = fg.explain(model(), {"activations": fg.compose("guided", rule)})
    assert [line.partition(";")[0] for line in notes(plan)] == [
        "Note, 2 sites: rule 'guided' is meant for relu",
        "Note, 1 site: rule 'test: for two' is meant for gelu and silu",
    ]
    assert [bool(site["remark"]) for site in plan.to_dict()["sites"]] == [True] * 3


@pytest.mark.parametrize(
    ("forward", "low", "high", "noted"),
    [
        ("round", 0.0, 0.4, True),
        ("round", -0.4, 0.4, True),
        ("round", -0.4, 2.0, False),
        ("trunc", 0.6, 0.9, True),
        ("trunc", 0.6, 1.9, False),
        ("sign", 0.0, 0.4, False),
        ("floor", -0.4, -0.1, False),
        (torch.round, 0.0, 0.4, False),
    ],
)
def test_a_forward_that_leaves_only_zeros(
    forward: Any, low: float, high: float, noted: bool
) -> None:
    torch.manual_seed(0)
    rules = {"params": fg.rules.straight_through(forward=forward)}
    original = model(low, high)
    found = notes(fg.explain(original, rules))
    assert bool(found) is noted
    if noted:
        assert f"forward={forward!r} makes each of them 0" in found[0]
        gm: Any = fg.transform(original, rules)
        assert not gm(torch.ones(1, 4)).any()


def test_parameters_without_values_are_not_looked_at() -> None:
    rules = {"params": fg.rules.straight_through(forward="round")}
    assert not notes(fg.explain(model().to("meta"), rules))
