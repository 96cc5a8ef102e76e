"""`report` finds the plan of whatever a model has become, and says what it was given where there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg

TABLE = {"relu": "scale"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.act(self.fc(x)))


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend=fg.backend(TABLE, inner="eager"))
    return model


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "its method compile": compiled_in_place,
    "torch.compile": lambda m: torch.compile(m, backend=fg.backend(TABLE, inner="eager")),
    "fg.compile": lambda m: fg.compile(m, TABLE, backend="eager"),
    "DataParallel around it": lambda m: nn.DataParallel(compiled_in_place(m)),
    "compiled again": lambda m: torch.compile(compiled_in_place(m), backend="eager"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_compiled_with_a_backend_has_its_report(way: str) -> None:
    compiled = WAYS[way](Net())
    with pytest.raises(
        fg.PlanError, match=r"captured nothing yet\. Call the compiled model before"
    ):
        fg.report(compiled)
    compiled(torch.ones(2, 4))
    assert [d.site.name for d in fg.report(compiled).with_action("rewrite")] == ["act:relu[0]"]


def test_a_compiled_function_has_a_report() -> None:
    compiled = torch.compile(function, backend=fg.backend(TABLE, inner="eager"))
    compiled(torch.ones(2, 4))
    assert [d.site.name for d in fg.report(compiled).decisions] == ["<root>:relu[0]"]


def test_one_backend_of_two_models_tells_them_apart() -> None:
    backend = fg.backend({"activations": "scale"}, inner="eager")
    first, second = Net(), nn.Sequential(nn.GELU())
    first.compile(backend=backend)
    compiled = torch.compile(second, backend=backend)
    for model in (first, compiled):
        model(torch.ones(2, 4))
    assert [d.site.op for d in fg.report(first).decisions] == ["relu", "tanh"]
    assert [d.site.op for d in fg.report(compiled).decisions] == ["gelu"]
    with pytest.raises(fg.PlanError, match=r"several models \(Net, Sequential\)"):
        fg.report(backend)


def test_the_report_of_a_transformed_model_that_is_compiled_is_its_own() -> None:
    gm = fg.transform(Net(), TABLE)
    plan = fg.report(gm)
    gm.compile(backend="eager")
    assert fg.report(gm) is plan
    assert fg.report(torch.compile(gm, backend="eager")) is plan
    assert fg.report(copy.deepcopy(fg.transform(Net(), TABLE))).hits == (1,)


def function(x: Tensor) -> Tensor:
    return F.relu(x)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Net, "got the class Net. Give the transformed model"),
        (Net(), r"got Net, which neither of them returned.*freegrad_fx\.explain\(model, rules\)"),
        (nn.Sequential(Net()), "got Sequential, which neither of them returned"),
        (torch.compile(Net(), backend="eager"), "compiled with another backend.*freegrad_fx.backend"),
        (torch.fx.symbolic_trace(Net()), "A second trace of a transformed model keeps its rules"),
        (function, "got function"),
        (None, "got NoneType"),
        ("relu", "got str"),
        (fg.RuleTable.of(TABLE), "got RuleTable"),
    ],
    ids=["class", "module", "container", "other backend", "trace", "function", "None", "str", "table"],
)  # fmt: skip
def test_anything_else_is_a_type_error_that_says_what_to_give(given: Any, words: str) -> None:
    with pytest.raises(TypeError, match=rf"(?s)^report\(\) takes the result of.*{words}"):
        fg.report(given)
