"""`first` and `last`: the first and the last operation that an entry matches, in the order in which operations run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg


class Net(nn.Module):
    """The modules are defined in another order than they run in, and one is skipped in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.a, self.c = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            x = self.a(x)
        return torch.tanh(self.c(self.b(self.c(x))))


def entries(**fields: Any) -> fg.RuleTable:
    return fg.RuleTable(
        [fg.on("relu", **fields).backward("reverse"), fg.on("relu").backward("scale")]
    )


def reversed_in(plan: Any) -> list[tuple[str, str]]:
    return [
        (d.site.name, d.modes) for d in plan.decisions if d.rules and d.rules[0].name == "reverse"
    ]


def test_each_graph_has_a_first_and_a_last_operation() -> None:
    first, last = (fg.explain(Net(), entries(**{order: True})) for order in ("first", "last"))
    assert {name for name, _ in reversed_in(first)} == {"c:relu[0]", "a:relu[0]"}
    assert {name for name, _ in reversed_in(last)} == {"c:relu[1]"}
    narrow = fg.explain(Net(), entries(module=["b", "c"], call=0, last=True))
    assert [name for name, _ in reversed_in(narrow)] == ["b:relu[0]"]
    x = torch.randn(2)
    exported = fg.explain(Net().eval(), entries(first=True), example_inputs=(x,))
    assert reversed_in(exported) == reversed_in(first)


def test_all_places_of_the_operation_are_selected() -> None:
    table = fg.RuleTable([fg.on("relu", first=True, at=["x", "output"]).backward("stop")])
    plan = fg.explain(nn.Sequential(nn.ReLU(), nn.ReLU()), table)
    assert [d.site.name for d in plan.with_action("rewrite")] == ["0:relu[0]@x", "0:relu[0]@output"]


def test_in_a_block_the_first_is_that_of_each_call_of_the_model() -> None:
    model = Net()
    table = fg.RuleTable([fg.on("relu", first=True).backward("scale", s=3.0)])
    x = torch.ones(2, requires_grad=True)
    (native,) = torch.autograd.grad(model(x).sum(), x)
    with fg.use(table, model=model) as block:
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(model(x).sum(), x)[0], 3 * native)
        model.eval()
        torch.testing.assert_close(torch.autograd.grad(model(x).sum(), x)[0], 3 * native)
        y = checkpoint(model, x, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 3 * native)
    names = {d.site.name for d in fg.report(block).with_action("rewrite")}
    assert names == {"c:relu[0]", "a:relu[0]"}


def test_it_is_written_and_read() -> None:
    table = entries(first=True)
    assert "first = true" in table.to_toml()
    assert fg.RuleTable.from_toml(table.to_toml()) == table != entries(last=True)
    assert repr(table[0]).startswith("on('relu', first=True).backward(")
    assert str(table[0].sites) == "relu, first"


def test_what_has_no_order_is_refused() -> None:
    with pytest.raises(fg.TableError, match="first and last exclude each other"):
        fg.on("relu", first=True, last=True)
    with pytest.raises(fg.TableError, match="first has to be True or False, got 1"):
        fg.on("relu", first=1)
    for field in ({"op": "params"}, {"parameter": "*"}, {"op": "all"}):
        with pytest.raises(fg.TableError, match="select parameters by name"):
            fg.on(**field, last=True)
    with pytest.raises(fg.TableError, match="cannot know before the call ends"):
        fg.use(entries(last=True), model=Net())
    with pytest.raises(fg.TableError, match="give the model"):
        fg.use(entries(first=True))
    with pytest.raises(fg.PlanError, match="captures a program in parts"):
        fg.compile(Net(), entries(first=True))
    ambient = fg.transform(Net())
    with (
        pytest.raises(fg.RuleError, match="do not tell their order"),
        fg.use(entries(first=True), model=ambient),
    ):
        ambient(torch.ones(2))
