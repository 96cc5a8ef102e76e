"""Fast forms of rules: the same bits as the formula, in fewer passes, and only where they can replace it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import freegrad_fx as fg
from built_in import EXAMPLES, MASKED
from freegrad_fx.core import rule as rule_module

FAST = [(name, values) for name, values in EXAMPLES if fg.get(name).declaration.fast is not None]
NAMES = [name for name, values in FAST if not values]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Entries at which a formula can jump, or a kernel overflow
EDGES = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 0.3, -0.3, math.inf, -math.inf, 1e-45, -1e-45, 1e38]


def samples(dtype: torch.dtype, bounds: list[float]) -> tuple[Tensor, Tensor]:
    """A gradient and an input, with entries on the bounds of a rule and next to them."""
    torch.manual_seed(0)
    edges = torch.tensor(EDGES, dtype=torch.float64).to(dtype)
    ends = torch.tensor([*bounds, *(-b for b in bounds)], dtype=torch.float64).to(dtype)
    edges = torch.cat([edges, ends])
    if dtype is not torch.float16:  # torch has no nextafter of it
        edges = torch.cat([edges, *(ends.nextafter(ends + s) for s in (1, -1))])
    x = torch.cat([edges, torch.randn(1001, dtype=torch.float64).to(dtype)])
    return torch.randn_like(x), x


def given_to(rule: fg.Rule, x: Tensor) -> tuple[Tensor, ...]:
    return (x,) if rule.inputs else ()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "values"), FAST, ids=str)
def test_the_fast_form_is_the_formula_bit_for_bit(
    name: str, values: dict[str, Any], dtype: torch.dtype
) -> None:
    rule = fg.get(name)(**values)
    numbers = [v for v in rule.bound.values() if isinstance(v, float) and math.isfinite(v)]
    grad, x = samples(dtype, numbers)
    before = grad.clone(), x.clone()
    torch.manual_seed(1)
    expected = rule.function(grad, *given_to(rule, x), **rule.bound)
    torch.manual_seed(1)
    actual = rule.declaration.fast(grad, *given_to(rule, x), **rule.bound)
    if actual is not NotImplemented:
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(grad, before[0])
    assert torch.equal(x, before[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_fast_form_serves_the_usual_case(name: str) -> None:
    rule = fg.get(name)
    grad, x = torch.randn(3, 4), torch.randn(3, 4)
    assert isinstance(rule.declaration.fast(grad, *given_to(rule, x), **rule.bound), Tensor)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_passes_where_x_is_not_a_number(name: str) -> None:
    rule = fg.get(name)
    x = torch.tensor([math.nan, 0.25, -math.nan, 2.0])
    grad = torch.tensor([1.0, 2.0, -3.0, 4.0])
    torch.manual_seed(1)
    actual = rule.declaration.fast(grad, *given_to(rule, x), **rule.bound)
    torch.manual_seed(1)
    expected = rule.function(grad, *given_to(rule, x), **rule.bound)
    if actual is NotImplemented:
        assert name in MASKED, "only forms that read a mask leave a NaN in x to the formula"
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@given(
    st.floats(-3, 3, width=32),
    st.floats(0, 3, width=32),
    st.lists(st.floats(width=32, allow_nan=False), max_size=8),
)
def test_any_window_has_its_ends(a: float, width: float, entries: list[float]) -> None:
    rule = fg.rules.rectangular(a=a, b=a + width)
    x = torch.tensor([*entries, a, a + width, -a])
    grad = torch.ones_like(x)
    expected = rule.function(grad, x, **rule.bound)
    actual = rule.declaration.fast(grad, x, **rule.bound)
    assert torch.equal(actual, expected)


def test_every_dimension_and_layout() -> None:
    rule = fg.rules.rectangular
    for x in (torch.tensor(0.2), torch.empty(0), torch.empty(2, 0, 3), torch.randn(5, 6).t()):
        grad = torch.randn_like(x)
        for g in (grad, torch.ones(()).expand(x.shape)):
            assert torch.equal(
                rule.declaration.fast(g, x, **rule.bound), rule.function(g, x, **rule.bound)
            )


# --- when it runs ---


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A rule whose formula and fast form record that they ran."""
    monkeypatch.setattr(rule_module, "_registry", dict(rule_module._registry))
    ran: list[str] = []

    def fast(grad: Tensor, x: Tensor, *, s: float) -> Tensor:
        ran.append("fast")
        return grad * x * s if s < 10 else NotImplemented

    @fg.register("counted", fast=fast)
    def formula(grad: Tensor, x: Tensor, *, s: float = 2.0) -> Tensor:
        ran.append("formula")
        return grad * x * s

    return ran


def site(x: Tensor, **values: Any) -> Tensor:
    y = torch.relu(fg.ops.stop_gradient(x))
    return fg.ops.decoupled(y, x, rule="counted", **values)


def test_it_runs_in_a_plain_backward(counted: list[str]) -> None:
    x = torch.randn(4, requires_grad=True)
    (grad,) = torch.autograd.grad(site(x).sum(), x)
    assert counted == ["fast"]
    assert torch.equal(grad, 2 * x)


def vectors_at_once(x: Tensor) -> Any:
    y = site(x)
    return torch.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True))(torch.eye(4))


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda x: torch.autograd.grad(site(x).sum(), x, create_graph=True),
        lambda x: torch.func.grad(lambda x: site(x).sum())(x),
        lambda x: torch.func.jacrev(site)(x),
        lambda x: torch.autograd.grad(site(x), x, torch.eye(4), is_grads_batched=True),
        vectors_at_once,
        lambda x: torch.autograd.grad(site(x, s=torch.tensor(2.0)).sum(), x),
    ],
    ids=["create_graph", "func.grad", "jacrev", "batched", "vmap", "tensor parameter"],
)
def test_the_formula_runs_wherever_more_is_asked(counted: list[str], differentiate: Any) -> None:
    differentiate(torch.randn(4, requires_grad=True))
    assert set(counted) == {"formula"}


def test_what_it_declines_the_formula_computes(counted: list[str]) -> None:
    x = torch.randn(4, requires_grad=True)
    (grad,) = torch.autograd.grad(site(x, s=11.0).sum(), x)
    assert counted == ["fast", "formula"]
    assert torch.equal(grad, 11 * x)


def test_it_is_given_the_input_and_never_a_mask_that_was_saved_instead() -> None:
    def fast(grad: Tensor, x: Tensor) -> Tensor:
        return grad * (x + 1 > 1)

    @fg.register("gated", fast=fast, mask=lambda x: x > 0)
    def gated(grad: Tensor, mask: Tensor) -> Tensor:
        ran.append(mask.dtype)
        return grad * mask

    ran: list[torch.dtype] = []
    x = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    for save, expected in (("x", []), ("mask", [torch.bool])):
        y = fg.ops.decoupled(torch.relu(fg.ops.stop_gradient(x)), x, rule=gated(save=save))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.tolist() == [0, 0, 1]
        assert ran == expected


def test_it_has_the_arguments_of_its_rule() -> None:
    with pytest.raises(fg.RuleError, match=r"fast=.* of rule 'other' .* must have the arguments"):

        @fg.register("other", fast=lambda grad: grad)
        def other(grad: Tensor, x: Tensor) -> Tensor:
            return grad * x
