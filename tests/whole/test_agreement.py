"""Every spelling of every activation, transformed, agrees with a hand-written operation around the same spelling.

The forward is bit-identical, what is written in place included; the gradient of the input is the rule's; the gradient
of what the activation learns is its native one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import freegrad_fx as fg
import reference
from spellings import OUT_SPELLINGS, SPELLINGS, Spell, quick

Naive = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(name: str, **parameters: float) -> Naive:
    formula = reference.ENTRYWISE[name]
    return lambda grad, x, y: reference.entrywise(formula, grad, x, **parameters)


# The factor is exact in every float type, so that the naive double precision rounds like the rule.
RULES: dict[str, tuple[fg.Rule, Naive]] = {
    "d(Linear)": (fg.rules.d_linear, naive("d(Linear)")),
    "rectangular": (fg.rules.rectangular, naive("rectangular")),
    "scale": (fg.rules.scale(s=-1.5), naive("scale", s=-1.5)),
}


# --- inputs: every layout in float32, some in the other types ---


def marked(spell: Spell, shape: tuple[int, ...]) -> Tensor:
    """Values on both sides of every kink, and some exactly on the bounds of the rectangle."""
    x = spell.sample(shape)
    x.view(-1)[: min(2, x.numel())] = torch.tensor([0.5, -0.5])[: min(2, x.numel())]
    return x


def inputs(spell: Spell) -> Iterator[tuple[str, Tensor]]:
    plain = marked(spell, (2, 4, 3, 2))
    yield "contiguous", plain
    yield "channels-last", plain.to(memory_format=torch.channels_last)
    yield "transposed", marked(spell, (2, 2, 3, 4)).transpose(1, 3)
    yield "sliced", marked(spell, (2, 4, 3, 4))[..., ::2]
    yield "expanded", marked(spell, (2, 4, 1, 2)).expand(2, 4, 3, 2)
    yield "double", plain.double()
    yield "double, transposed", marked(spell, (2, 2, 3, 4)).double().transpose(1, 3)
    yield "bfloat16", plain.bfloat16()
    yield "bfloat16, sliced", marked(spell, (2, 4, 3, 4)).bfloat16()[..., ::2]
    if spell.any_shape:
        yield "0-dim", marked(spell, ())
        yield "0-dim, bfloat16", marked(spell, ()).bfloat16()
        yield "empty", marked(spell, (0,))
        yield "empty, double", marked(spell, (2, 0, 3)).double()


# --- running a model ---


class Run:
    """The outputs of a model and the gradients that it hands on.

    Not the `Run` of `runs`, which copies its inputs: here their own memory layout is what is tested.
    """

    refused = False
    grad: Tensor | None = None
    learnt: tuple[Tensor | None, ...] = ()

    def __init__(self, model: Callable[[Tensor], Any], x: Tensor, backward: bool = True) -> None:
        learnt = list(model.parameters()) if isinstance(model, nn.Module) else []
        leaf = x.detach().requires_grad_()
        torch.default_generator.manual_seed(11)  # torch.manual_seed takes longer than all the rest
        result = model(leaf)
        self.outputs = list(result) if isinstance(result, tuple) else [result]
        if not backward:
            return
        grads = [torch.randn(y.shape).to(y.dtype) for y in self.outputs]
        wanted = [leaf, *learnt]
        try:
            found = torch.autograd.grad(self.outputs, wanted, grads, allow_unused=True)
        except RuntimeError as error:
            # Natively so where an operation's result, which its backward needs, is overwritten.
            if "modified by an inplace operation" not in str(error):
                raise
            self.refused = True
        else:
            self.grad, self.learnt = found[0], found[1:]


def assert_same(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    if expected is None or actual is None:
        assert actual is expected, what
        return
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def assert_forward_agrees(actual: Run, expected: Run, what: str) -> None:
    for a, e in zip(actual.outputs, expected.outputs, strict=True):
        assert_same(a, e, f"{what}: forward")
        assert a.stride() == e.stride(), what


# What an in-place call leaves behind does not depend on all that `inputs` varies.
FEW = ("contiguous", "sliced", "bfloat16", "0-dim", "empty")


def check(
    spell: Spell,
    model: nn.Module,
    hand_written: Callable[[Any], Any],
    layouts: Container[str] | None = None,
) -> None:
    """Compare a model that holds one spelling with the spelling by hand, under every rule, on every input.

    Args:
        spell: The spelling.
        model: The model.
        hand_written: From the naive operation to the model around it.
        layouts: The inputs to try; all if None.
    """
    native = fg.transform(model, {spell.op: None})
    transformed = {name: fg.transform(model, {spell.op: rule}) for name, (rule, _) in RULES.items()}
    for layout, x in inputs(spell):
        if layouts is not None and layout not in layouts:
            continue
        for module in (model, native, *transformed.values()):
            module.to(x.dtype)
        before = x.clone()
        expected = Run(model, x, backward=spell.differentiable)

        what = f"{spell.id}, native, {layout}"
        actual = Run(native, x, backward=spell.differentiable)
        assert actual.refused == expected.refused, what
        assert_forward_agrees(actual, expected, what)
        for a, e in zip(
            (actual.grad, *actual.learnt), (expected.grad, *expected.learnt), strict=True
        ):
            assert_same(a, e, what)

        for name, gm in transformed.items():
            what = f"{spell.id}, {name}, {layout}"
            actual = Run(gm, x)
            assert not actual.refused, what
            assert_forward_agrees(actual, expected, what)
            oracle = reference.oracle(alone(spell, x.dtype), RULES[name][1])
            assert_same(actual.grad, Run(hand_written(oracle), x).grad, what)
            for a, e in zip(actual.learnt, expected.learnt, strict=bool(expected.learnt)):
                assert_same(a, e, what)
        assert_same(x, before, f"{spell.id}: the caller's input")


def alone(spell: Spell, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return spell.make().to(dtype)


def by_id(spell: Spell) -> str:
    return spell.id


@pytest.mark.thinned(4)
@pytest.mark.sampled(6)
@pytest.mark.parametrize("spell", quick(s for s in SPELLINGS if s.op != "glu"))
def test_a_transformed_activation_agrees_with_the_hand_written_one(spell: Spell) -> None:
    check(spell, spell.make(), lambda oracle: oracle)


# --- what an in-place call leaves behind ---


class Watched(nn.Module):
    """Hands back what the call returns, and what it left in its argument."""

    def __init__(self, spell: Spell) -> None:
        super().__init__()
        self.call = spell.make()
        self.call.inplace = False  # it is to write into what it is given, and not into a copy

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 1
        result = self.call(y)
        return result, y


class Viewed(Watched):
    """Hands back what the call left in a view that was taken before."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 1
        view = y.view_as(y)
        result = self.call(y)
        return result * 2, view


class OnView(Watched):
    """Calls on a view, and hands back what that left in its base."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 1
        result = self.call(y.view_as(y))
        return result, y


class Later(Watched):
    """Writes into the result afterwards."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 1
        result = self.call(y)
        result += 1
        return result, y


def later(oracle: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        y = oracle(x) + 1
        return y, y

    return model


INPLACE = [s for s in SPELLINGS if s.inplace and "; return x" not in s.id]

HAND_WRITTEN: dict[type[Watched], Callable[[Any], Any]] = {
    Watched: lambda oracle: lambda x: (oracle(x),) * 2,
    Viewed: lambda oracle: lambda x: (lambda y: (y * 2, y))(oracle(x)),
    OnView: lambda oracle: lambda x: (oracle(x),) * 2,
    Later: later,
}


@pytest.mark.thinned(3)
@pytest.mark.sampled(6)
@pytest.mark.parametrize("spell", quick(INPLACE))
def test_what_is_written_in_place_is_seen_under_the_input_s_name(spell: Spell) -> None:
    check(spell, Watched(spell), HAND_WRITTEN[Watched], FEW)


# One of each op and callable: what other arguments there are makes no difference to who sees the result.
CALLED = {spell.id.partition("(")[0]: spell for spell in INPLACE}


@pytest.mark.thinned(3)
@pytest.mark.sampled(6)
@pytest.mark.parametrize("surroundings", [Viewed, OnView, Later], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("called", CALLED)
def test_what_is_written_in_place_is_seen_by_views_and_written_over(
    called: str, surroundings: type[Watched]
) -> None:
    spell = CALLED[called]
    check(spell, surroundings(spell), HAND_WRITTEN[surroundings], FEW)


@pytest.mark.thinned(3)
@pytest.mark.sampled(6)
@pytest.mark.parametrize("spell", quick(INPLACE))
def test_what_is_written_into_the_caller_s_tensor_is_seen_by_the_caller(spell: Spell) -> None:
    model = spell.make()
    model.inplace = False

    def from_outside(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
        def run(leaf: Tensor) -> tuple[Tensor, Tensor]:
            x = leaf * 1
            return module(x), x

        return run

    for name, (rule, formula) in RULES.items():
        gm = fg.transform(model, {spell.op: rule})
        x = marked(spell, (2, 4, 3, 2))
        expected = Run(from_outside(model), x, backward=False)
        oracle = reference.oracle(alone(spell, x.dtype), formula)
        by_hand = Run(HAND_WRITTEN[Watched](oracle), x)
        actual = Run(from_outside(gm), x)
        assert_forward_agrees(actual, expected, f"{spell.id}, {name}")
        assert_same(actual.grad, by_hand.grad, f"{spell.id}, {name}")


# --- ops of their own kind ---


@pytest.mark.parametrize("spell", [s for s in SPELLINGS if s.op == "glu"], ids=by_id)
def test_an_elementwise_rule_on_glu_is_an_error_when_planning(spell: Spell) -> None:
    for rule, _ in RULES.values():
        with pytest.raises(fg.PlanError, match="of the output, but glu changes the shape") as error:
            fg.transform(spell.make(), {"glu": rule})
        assert f"rule {rule.name!r} returns" in str(error.value)
    native, x = fg.transform(spell.make(), {"glu": None}), spell.sample()
    expected, actual = Run(spell.make(), x), Run(native, x)
    assert_forward_agrees(actual, expected, spell.id)
    assert_same(actual.grad, expected.grad, spell.id)


@pytest.mark.parametrize("spell", OUT_SPELLINGS, ids=by_id)
def test_a_result_written_into_an_out_tensor_is_skipped_with_the_reason(spell: Spell) -> None:
    model, x = spell.make(), spell.sample()
    with pytest.warns(fg.FreegradWarning, match="out= tensor, which autograd does not support"):
        gm = fg.transform(model, {spell.op: "rectangular"})
    (decision,) = fg.report(gm).decisions
    assert decision.action == "skip"
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))
    with pytest.raises(fg.PlanError, match="out= tensor"):
        fg.transform(model, {spell.op: "rectangular"}, strict=True)


# --- any values ---

PLAIN = {s.op: s for s in reversed(SPELLINGS) if s.any_shape and not s.inplace}


@functools.cache
def transformed_once(op: str) -> tuple[nn.Module, dict[str, nn.Module]]:
    model = PLAIN[op].make()
    return model, {name: fg.transform(model, {op: rule}) for name, (rule, _) in RULES.items()}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("op", PLAIN)
@settings(max_examples=40)
@given(data=st.data())
def test_an_activation_agrees_on_any_values(op: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    special = st.sampled_from([0.0, -0.0, 0.5, -0.5, math.inf, -math.inf, math.nan])
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    n = math.prod(shape)
    values = data.draw(st.lists(special | st.floats(width=32), min_size=n, max_size=n))
    x = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)
    model, transformed = transformed_once(op)
    expected = Run(model.to(dtype), x, backward=False)
    for name, gm in transformed.items():
        actual = Run(gm.to(dtype), x)
        by_hand = Run(reference.oracle(alone(PLAIN[op], dtype), RULES[name][1]), x)
        assert_forward_agrees(actual, expected, f"{op}, {name}")
        assert_same(actual.grad, by_hand.grad, f"{op}, {name}")
