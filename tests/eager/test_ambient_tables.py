"""Blocks with a table around transformed models without rules, and around layers that follow blocks.

The reference is the original model, transformed with the table.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from runs import loss

THREE = fg.rules.scale(s=3.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x)) + 1
        return torch.tanh(self.second(self.relu(x)))


torch.manual_seed(4)
NET, X = Net(), torch.randn(5, 4)


def gradients(model: nn.Module = NET) -> list[Tensor]:
    return list(torch.autograd.grad(loss([model(X)]), list(NET.parameters())))


NATIVE = gradients()

OF_A_MODEL = fg.RuleTable(
    [
        fg.on("relu", module="relu").backward(THREE),
        fg.on("activations", call=0, type=Net).backward(fg.compose("reverse", THREE)),
        fg.on(parameter="first.*").backward("clip_norm", max_norm=0.1),
    ]
)


@pytest.mark.parametrize(
    ("rules", "captured"),
    [
        ({"relu": THREE, "activations": None}, "symbolic"),
        ({nn.ReLU: THREE}, "symbolic"),
        (OF_A_MODEL, "symbolic"),
        (OF_A_MODEL, "exported"),
        ({"relu": THREE, "activations": None}, "compiled"),
    ],
)
def test_the_table_of_a_block_decides_ambient_sites(rules: Any, captured: str) -> None:
    torch._dynamo.reset()
    options = {"example_inputs": (X,)} if captured == "exported" else {}
    ambient, tabled = fg.transform(NET, **options), fg.transform(NET, rules, **options)
    model = torch.compile(ambient, backend="eager") if captured == "compiled" else ambient
    in_block = {"model": ambient} if rules is OF_A_MODEL else {}
    for _ in range(2):
        with fg.use(rules, **in_block) as block:
            found = gradients(model)
        assert all(map(torch.equal, found, gradients(tabled)))
        assert all(map(torch.equal, gradients(model), NATIVE))
    wanted = {d.site.name for d in fg.report(tabled).with_action("rewrite")}
    assert {d.site.name for d in fg.report(block).with_action("rewrite")} == wanted


def test_the_innermost_block_that_decides_an_ambient_site_wins() -> None:
    ambient = fg.transform(NET)
    every, one, parameters = fg.use(THREE), fg.use({"relu": "reverse"}), {"params": THREE}
    of_parameters = fg.use(parameters, model=ambient)
    cases = [
        ((every, one), {"activations": THREE, "relu": "reverse"}),
        ((one, every), {"activations": THREE}),
        ((of_parameters, every), {"activations": THREE, **parameters}),
        ((one, fg.native()), {"relu": None}),
        ((fg.native(), one), {"relu": "reverse"}),
    ]
    for (outer, inner), rules in cases:
        with outer, inner:
            found = gradients(ambient)
        assert all(map(torch.equal, found, gradients(fg.transform(NET, rules))))


def test_a_table_names_the_ambient_sites_of_a_part_by_their_paths_in_the_model() -> None:
    part, other = fg.transform(NET), fg.transform(NET)
    model, last = nn.Sequential(part, nn.ReLU()), nn.ReLU()
    rules = fg.RuleTable(
        [
            fg.on("relu", module="0.*").backward("reverse"),
            fg.on(parameter="0.first.weight").backward("scale", s=2.0),
        ]
    )
    with fg.use(rules, model=model):
        assert all(map(torch.equal, gradients(other), NATIVE))
        found = gradients(model)
    plain = nn.Sequential(NET, last)
    assert all(map(torch.equal, found, gradients(fg.transform(plain, rules))))


class ReadsALayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.follows, self.own = (
            fg.Activation("ReLU"),
            fg.Activation("ReLU", rule="straight_through"),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.follows(x) * (2 if x.sum() > 0 else 3) + self.own(x)


# Dynamo reads the gradients of its inputs after a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_table_of_a_block_decides_layers_without_a_rule(compiled: bool) -> None:
    torch._dynamo.reset()
    model = ReadsALayer()
    run = torch.compile(model, backend="eager") if compiled else model
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    with fg.use({"relu": "reverse"}):
        y = run(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.tensor([-1.0, -1.0]))


def test_what_a_table_cannot_do_at_an_ambient_site_is_said() -> None:
    kept = fg.transform(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Tanh()))
    with (
        pytest.warns(fg.FreegradWarning, match=r"1:softmax\[0\] keeps its backward"),
        fg.use({"softmax": "scale", "tanh": THREE}),
    ):
        kept(X)
    stepping = fg.rules.straight_through(forward="heaviside")
    with pytest.raises(fg.RuleError, match="keep their forward"), fg.use({"tanh": stepping}):
        kept(X)
    opaque = fg.transform(nn.Sequential(nn.Linear(4, 4), ReadsALayer()))
    with pytest.raises(fg.RuleError, match="as one opaque call"), fg.use({"relu": THREE}):
        opaque(X)
