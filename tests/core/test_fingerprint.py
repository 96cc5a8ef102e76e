"""What a formula computes, as a text: equal texts must mean equal formulas, in this process and in every other."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, ops

import freegrad_fx as fg
from freegrad_fx.core.fingerprint import fingerprint
from freegrad_fx.core.rule import of_token

NUMBER = 2.0


def made(text: str) -> Callable[..., Tensor]:
    """A function from its source, with names that mean what they mean here."""
    namespace: dict[str, Any] = {}
    exec(text, {"torch": torch, "math": math, "F": F}, namespace)
    return next(iter(namespace.values()))


TOLD = [
    "lambda grad, x: grad * x.cos()",
    "lambda grad, x: grad * x.sin()",
    "lambda grad, x: x * grad.cos()",
    "lambda grad: grad * 2",
    "lambda grad: grad * 2.0",
    "lambda grad: grad * 3.0",
    "lambda grad: grad * True",
    "lambda grad: grad + 2.0",
    "lambda grad, x: grad.to(torch.float32)",
    "lambda grad, x: grad.to(torch.float64)",
    "lambda grad, x: torch.special.expit(x) * grad",
    "lambda grad, x: torch.where(x > 0, grad, 0)",
    "lambda grad, x: torch.where(x >= 0, grad, 0)",
    "lambda grad, x: grad * math.pi",
    "lambda grad, x: grad * math.e",
    "lambda grad, x: F.relu(grad) * max(1, 2)",
    "lambda grad, x: F.relu(grad) * min(1, 2)",
    "lambda grad, *, s=1.0: grad * s",
    "lambda grad, *, s=2.0: grad * s",
    "lambda grad: sum(g * 2 for g in (grad, grad))",
    "lambda grad: sum(g * 3 for g in (grad, grad))",
]


def test_different_formulas_have_different_fingerprints_and_equal_ones_the_same() -> None:
    first = [fingerprint(made(f"formula = {text}")) for text in TOLD]
    assert None not in first
    assert len({*first}) == len(TOLD)
    assert [fingerprint(made(f"\n\nother = {text}")) for text in TOLD] == first


def test_a_mask_belongs_to_it() -> None:
    gate = made("f = lambda grad, mask: grad * mask")
    above, below = (made(f"f = lambda x: x {sign} 0") for sign in "><")
    assert len({fingerprint(gate, mask) for mask in (above, below, None)}) == 3


act = F.relu
torch.my_constant, torch.my_function = 2.0, lambda x: x  # type: ignore[attr-defined]
Tensor.my_method = lambda x: x  # type: ignore[attr-defined]


def closure(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda grad: grad * factor


def helper(grad: Tensor) -> Tensor:
    return grad


class Factor:
    value = 2.0


@pytest.mark.parametrize(
    "formula",
    [
        lambda grad: grad * NUMBER,
        lambda grad: helper(grad),
        lambda grad: grad * Factor.value,
        lambda grad: grad * Factor().value,
        lambda grad: fg.get("scale").function(grad, s=2.0),
        lambda grad: torch.ops.freegrad_fx.heaviside(grad),
        lambda grad: ops.freegrad_fx.heaviside(grad),
        lambda grad: act(grad),
        lambda grad: torch.my_function(grad),  # type: ignore[attr-defined]
        lambda grad: torch.my_constant * grad,  # type: ignore[attr-defined]
        lambda grad: grad.my_method(),  # type: ignore[attr-defined]
        lambda grad: grad * torch.backends.cudnn.enabled,
        lambda grad: grad * torch._dynamo.config.recompile_limit,
        lambda grad: eval("grad"),
        lambda grad: grad * float(input()),
        lambda grad: grad * __import__("random").random(),
        closure(2.0),
        functools.partial(helper),
        Factor(),
        torch.relu,
        made("def formula(grad):\n    import random\n    return grad * random.random()"),
        made("def formula(grad):\n    global NUMBER\n    NUMBER = 2\n    return grad"),
    ],
)
def test_none_where_something_else_may_change_what_it_computes(formula: Any) -> None:
    assert fingerprint(formula) is None


def test_a_name_that_hides_a_builtin_or_a_module_is_no_builtin() -> None:
    for name, value in (("max", helper), ("torch", Factor), ("F", Factor())):
        assert fingerprint(eval(f"lambda grad: {name}(grad)", {name: value})) is None
        assert fingerprint(eval(f"lambda grad: {name}.relu(grad)", {name: value})) is None


def test_rules_know_their_formula_by_it() -> None:
    scale = fg.get("scale")
    assert of_token(scale.declaration.token) is scale
    told = fg.register("mine")(made("f = lambda grad: grad * 2"))
    again = fg.register("mine", overwrite=True)(made("f = lambda grad: grad * 3"))
    assert told.declaration.token != again.declaration.token
    assert of_token(told.declaration.token).function is told.function
    assert of_token(again.declaration.token).function is again.function
    assert fg.register("another")(closure(2.0)).declaration.token == ""


def test_a_formula_of_the_package_with_a_mask_of_the_user_s_is_no_formula_of_the_package() -> None:
    gate = fg.rules.d_relu.declaration.gate
    assert gate is not None
    for mask in (made("f = lambda x: x > 0.3"), lambda x: x < NUMBER):
        rule = fg.register("mine", overwrite=True, mask=mask)(gate)
        assert rule.declaration.token == ""
        assert not rule.declaration.own
    one = fg.register("other")(fg.rules.scale.function)
    another = fg.register("other", overwrite=True)(fg.rules.reverse.function)
    assert one.declaration.token != another.declaration.token
