"""`rule_parameters` and `set_parameters`, on models, compiled models and tables."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import freegrad_fx as fg


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.GELU())


def rows(target: Any) -> list[tuple[Any, ...]]:
    return [
        (
            one.site,
            one.entry,
            one.rule,
            one.name,
            float(torch.as_tensor(one.value).detach()),
            one.learnable,
            one.learnt,
        )
        for one in fg.rule_parameters(target)
    ]


def gradient(model: Any) -> Tensor:
    x = torch.linspace(-1, 1, 8).view(2, 4).requires_grad_()
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    return found


def shared() -> fg.RuleTable:
    rule = fg.rules.fast_sigmoid(slope=torch.tensor(25.0))
    return fg.RuleTable.of({"relu": rule, "gelu": rule})


def table(slope: Any = 25.0, alpha: Any = 2.0) -> fg.RuleTable:
    rules = {"relu": fg.rules.fast_sigmoid(slope=slope), "gelu": fg.rules.arctan(alpha=alpha)}
    return fg.RuleTable.of(rules)


def test_the_parameters_of_a_model_and_of_a_table_are_listed() -> None:
    alpha = nn.Parameter(torch.tensor(3.0))
    of_table = [
        ("", "relu", "fast_sigmoid", "slope", 25.0, True, False),
        ("", "gelu", "arctan", "alpha", 3.0, True, True),
    ]
    assert rows(table(alpha=alpha)) == of_table
    gm = fg.transform(make(), table(alpha=alpha))
    of_model = [
        (site, *row[1:]) for site, row in zip(["1:relu[0]", "3:gelu[0]"], of_table, strict=True)
    ]
    assert rows(gm) == of_model
    assert rows(torch.compile(gm, backend="eager")) == of_model
    text = str(fg.rule_parameters(gm))
    assert [line.split()[-1] for line in text.splitlines()[2:]] == ["no", "yes"]
    shown = fg.rule_parameters(gm)._repr_html_()
    assert all(f">{cell}</td>" in shown for cell in ("1:relu[0]", "arctan", "25.0", "yes"))
    with fg.use(table(alpha=alpha)) as block:
        make()(torch.ones(2, 4))
    assert [row[1:] for row in rows(block)] == [row[1:] for row in of_model]
    compiled = fg.compile(make(), table(alpha=alpha), backend="eager")
    compiled(torch.ones(2, 4))
    assert [row[1:] for row in rows(compiled)] == [row[1:] for row in of_model]


@pytest.mark.parametrize("way", ["transform", "compile", "backend", "use"])
def test_a_value_that_is_set_acts_and_compiles_nothing_again(way: str) -> None:
    counter, given = CompileCounter(), fg.set_parameters(table(), "relu", slope=1.0)
    if way == "transform":
        gm = fg.transform(make(), table())
        model = torch.compile(gm, backend=counter)
        assert fg.set_parameters(model, "relu", slope=1.0) is model
    elif way == "compile":
        model = fg.compile(make(), given, backend=counter)
    elif way == "backend":
        model = torch.compile(make(), backend=fg.backend(given, inner=counter))
    else:
        model = fg.use(given)(make().forward)
    for slope in (1.0, 2.5, 0.1):
        if way == "transform":
            fg.set_parameters(model, "relu", slope=slope)
        else:
            assert fg.set_parameters(given, "relu", slope=slope) == given
        expected = gradient(fg.transform(make(), table(slope=slope)))
        torch.testing.assert_close(gradient(model), expected)
    assert counter.frame_count == (way != "use")


def through_a_file(gm: Any) -> Any:
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file, lambda gm: gm])
def test_a_value_survives_copies_and_conversions_exactly(copied: Any, dtype: torch.dtype) -> None:
    gm = fg.set_parameters(fg.transform(make(), table()), "relu", slope=1e6)
    gm = copied(gm).to(dtype)
    assert rows(gm)[0][4] == 1e6  # infinite in half precision
    gm = fg.set_parameters(gm, "relu", slope=3.0)
    x = torch.linspace(-1, 1, 8, dtype=dtype).view(2, 4).requires_grad_()
    other = fg.transform(make().to(dtype), table(slope=3.0))
    found, expected = (torch.autograd.grad(m(x).sum(), x)[0] for m in (gm, other))
    assert torch.equal(found, expected)


def test_a_checkpoint_restores_a_value() -> None:
    gm = fg.set_parameters(fg.transform(make(), table()), "relu", slope=2.5)
    saved = copy.deepcopy(gm.rule_state_dict())
    other = fg.set_parameters(fg.transform(make(), table()), "relu", slope=1.0)
    other.load_rule_state_dict(saved)
    assert rows(other) == rows(gm)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_of_one_number_keeps_its_dtype(dtype: torch.dtype) -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x.sum())

    gm = fg.transform(Sum(), table()[:1])
    scheduler = fg.RuleScheduler(gm, {"slope": fg.schedules.constant(4.0)})
    x = torch.full((3,), 0.25, dtype=dtype, requires_grad=True)
    gm(x).backward()
    assert scheduler.get_last_value() == {"slope": 4.0}
    expected = torch.tensor(1.0 / (1 + 4.0 * 0.75) ** 2, dtype=dtype).expand(3)
    assert torch.equal(x.grad, expected)  # type: ignore[arg-type]


def test_a_number_of_a_double_model_is_exact() -> None:
    gm = fg.set_parameters(fg.transform(make().double(), table()), "relu", slope=0.1)
    assert rows(gm)[0][4] == 0.1


@pytest.mark.parametrize(
    ("target", "selector", "values", "error", "message"),
    [
        (make, "*", {"slope": 1.0}, TypeError, r"set_parameters takes .* Sequential.*use\(table\)"),
        (table, "tanh", {"slope": 1.0}, fg.PlanError, "tanh"),
        (table, "*", {"slop": 1.0}, fg.RuleError, "slope"),
        (table, "*", {"slope": -1.0}, fg.RuleError, "slope"),
        (table, "*", {"slope": "1"}, TypeError, "takes a number"),
        (table, "*", {"slope": torch.ones(3)}, TypeError, "takes a number"),
        (table, "*", {"slope": torch.tensor(-1.0)}, fg.RuleError, "slope"),
        (table, "*", {"slope": torch.tensor(torch.nan)}, fg.RuleError, "is NaN"),
        (
            shared,
            "relu",
            {"slope": 1.0},
            fg.RuleError,
            r"also 'slope' of entry 'gelu'\. Select both",
        ),
        (table, 3, {"slope": 1.0}, TypeError, "as text"),
        (lambda: fg.transform(make(), table()), "tanh", {"slope": 1.0}, fg.PlanError, "tanh"),
        (
            lambda: fg.transform(make(), table()),
            "*",
            {"slope": torch.tensor(-1.0)},
            fg.RuleError,
            "slope",
        ),
    ],
)
def test_what_cannot_be_set_is_refused(
    target: Any, selector: Any, values: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        fg.set_parameters(target(), selector, **values)
    with pytest.raises(TypeError, match="report"):
        fg.rule_parameters(make())
