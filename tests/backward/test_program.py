"""Programs of pointwise rules, run step by step with PyTorch's own operations instead of the C++ extension."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import freegrad_fx as fg
from built_in import EXAMPLES
from freegrad_fx.backward.program import Program, program_of

POINTWISE = [(name, values) for name, values in EXAMPLES if fg.get(name).declaration.pointwise]

NAMES = (
    *("add", "sub", "mul", "div", "neg", "abs", "lt", "le", "gt", "ge", "eq", "ne"),
    *("and", "or", "not", "where", "least", "most"),
)
OTHERS = {
    "and": torch.mul,
    "or": torch.maximum,
    "not": lambda a: 1 - a,
    "where": lambda a, b, c: torch.where(a != 0, b, c),
    "least": lambda a, b: torch.where(a < b, b, a),
    "most": lambda a, b: torch.where(a > b, b, a),
}
ONE, THREE = ("neg", "abs", "not"), ("where",)


def evaluated(program: Program, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    constants = [torch.full_like(grad, number) for number in program.constants]
    places = [grad, x, y, *constants]
    for number, (operation, to, *operands) in enumerate(program.steps):
        assert to == 3 + len(constants) + number
        name = NAMES[operation]
        count = 1 if name in ONE else 3 if name in THREE else 2
        step = OTHERS.get(name) or getattr(torch, name)
        result = step(*(places[place] for place in operands[:count]))
        places.append(result.to(grad.dtype))
    return places[program.result]


def program(rule: fg.Rule, dtype: torch.dtype = torch.float32) -> Program | None:
    return program_of(rule.declaration, rule.bound, dtype, evaluated)


@pytest.mark.parametrize(("name", "values"), POINTWISE, ids=str)
def test_a_pointwise_rule_has_a_program_of_its_formula(name: str, values: dict[str, Any]) -> None:
    rule = fg.get(name)(**values)
    grad, x, y = torch.randn(3, 500, dtype=torch.float64)
    found = program(rule, torch.float64)
    assert found is not None
    given = {"x": x, "y": y}
    expected = rule.backward(grad, **{name: given[name] for name in rule.inputs})
    torch.testing.assert_close(evaluated(found, grad, x, y), expected, rtol=0, atol=0)


def test_a_formula_that_is_not_pointwise_after_all_has_no_program() -> None:
    @fg.register("sorted", pointwise=True)
    def by_order(grad: Tensor) -> Tensor:
        return grad.sort().values

    @fg.register("averaged", pointwise=True)
    def averaged(grad: Tensor) -> Tensor:
        return grad - grad.mean()

    @fg.register("shaped", pointwise=True)
    def shaped(grad: Tensor) -> Tensor:  # the program is compared with the formula on another shape
        return grad * 2 if grad.dim() == 2 else grad * 3

    @fg.register("branching", pointwise=True)
    def branching(grad: Tensor, x: Tensor) -> Tensor:
        return grad if x.sum() > 0 else -grad

    for rule in (by_order, averaged, shaped, branching):
        assert program(rule) is None


def test_what_a_program_cannot_know_is_left_to_the_formula() -> None:
    factor = [2.0]

    @fg.register("reads a variable", pointwise=True)
    def reads(grad: Tensor) -> Tensor:
        return grad * factor[0]

    @fg.register("undeclared")
    def undeclared(grad: Tensor) -> Tensor:
        return grad * 2.0

    assert program(reads) is None
    assert program(undeclared) is None
    assert program(fg.rules.scale(s=torch.tensor(2.0))) is None
    assert (
        program(fg.rules.scale(s=1e300)) is None
    )  # PyTorch raises an error, as it does for the formula


def test_zeros_of_both_signs_are_two_programs() -> None:
    found = [program(fg.rules.scale(s=s)) for s in (0.0, -0.0)]
    assert [str(p.constants[0]) for p in found if p] == ["0.0", "-0.0"]
