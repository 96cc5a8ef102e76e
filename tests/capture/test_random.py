"""Random small modules: whatever a user writes, the capture means the same.

Forward, native gradients and a rule's gradients, in training, in evaluation and with some parts in each, call after
call. The original is the oracle; under a rule it runs under an interception that knows nothing of the product.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import freegrad_fx as fg
from random_modules import SIMPLE, WIDTH, Kept, Program, programs
from runs import call
from side_by_side import (
    RULE,
    InterceptionOutside,
    contents,
    difference,
    what_plain_tracing_gets_wrong,
)
from sweep import NATIVE

EXAMPLES = 30


def sample(seed: int) -> Tensor:
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x.double()


CALLS = (call(sample(2)), call(sample(3)))
MODES = ("train", "eval", "some of both")


def make(program: Any) -> Program:
    torch.manual_seed(0)
    return Program(program).double()


def set_mode(model: nn.Module, mode: str, flags: Sequence[bool]) -> None:
    if mode != "some of both":
        model.train(mode == "train")
        return
    for index, module in enumerate(m for _, m in model.named_modules()):
        module.training = flags[index % len(flags)]


def transformed(model: nn.Module, rules: Any) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.FreegradWarning)
        return fg.transform(model, rules)


def check(program: Any, captured_in: str, flags: Sequence[bool]) -> list[fx.GraphModule]:
    """Hold the module of a program against itself, transformed; return what it was transformed into."""
    results = []
    for rules in (NATIVE, RULE):
        model = make(program)
        set_mode(model, captured_in, flags[::-1])
        before = contents(model)
        gm = transformed(model, rules)
        results.append(gm)
        assert contents(model) == before, "the original was changed"
        assert not fg.report(gm).with_action("skip")
        for mode in MODES:
            original = make(program)
            kept = [path for path, m in original.named_modules() if isinstance(m, Kept)]
            reference = None if rules is NATIVE else InterceptionOutside(original, kept)
            # each mode with buffers and parameters of its own
            actual = copy.deepcopy(gm)
            actual.load_state_dict(original.state_dict())
            for m in (original, actual):
                set_mode(m, mode, flags)
            found = difference(original, actual, CALLS, reference)
            assert not found, f"{mode}, {rules}: {found}"
            if reference is not None:
                sites = sum(node.target is fg.ops.decoupled for node in actual.graph.nodes)
                assert sites * len(CALLS) == len(reference.calls), "an activation is not a site"
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    "examples", [EXAMPLES // 10, pytest.param(EXAMPLES, marks=pytest.mark.slow)]
)
def test_a_random_module(examples: int) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(
        program=programs,
        captured_in=st.sampled_from(MODES),
        flags=st.lists(st.booleans(), min_size=2, max_size=7),
    )
    def any_module(program: Any, captured_in: str, flags: list[bool]) -> None:
        native, _ = check(program, captured_in, flags)
        event(f"graphs: {len(native.variants)}")

    any_module()


PLAINLY_WRONG = {
    "functional dropout, captured in the other mode": (("F.dropout(x, 0.4, self.training)",),),
    "a branch on training": (("if training", (("F.relu(x)",),), (("F.silu(x, True)",),)),),
    "a counted buffer": (("counted",),),
    "a function's own backward": (("x + Spike.apply(x)",),),
    "in place, the result thrown away": (("thrown away", "F.relu_(x)"),),
    "a part that branches on data": (("self.kept(x)",),),
    "random numbers of its own": (("x + torch.rand(x.shape[0], 1)",),),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", PLAINLY_WRONG)
def test_a_plain_trace_is_wrong_about_such_modules(name: str) -> None:
    program = (("self.f(x)",), *PLAINLY_WRONG[name], ("F.relu(x)",))
    assert what_plain_tracing_gets_wrong(lambda: make(program), *CALLS)
    check(program, "train", [True, False, True])


@pytest.mark.slow
def test_random_modules_have_everything_in_them() -> None:
    """The strategy reaches what it is there for; without this, the test above could be about nothing."""
    seen: set[str] = set()

    def names(steps: Any) -> None:
        for name, *args in steps:
            seen.add(name)
            for arg in args:
                names(arg) if isinstance(arg, tuple) else None

    @settings(max_examples=360, derandomize=True, deadline=None, database=None)
    @given(programs)
    def collect(program: Any) -> None:
        names(program)

    collect()
    nested = {"residual", "residual in place", "both", "if training", "without grad", "part"}
    discarded = {"part, twice", "thrown away", "on a view"}
    assert seen == {*SIMPLE, *nested, *discarded}
