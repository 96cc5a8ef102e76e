"""`schedules`: the values of each schedule, and `RuleScheduler` on models, compiled models and tables."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import freegrad_fx as fg
from freegrad_fx import schedules


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU()).double()


def sample() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double()


def gradient(model: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    return found


def by_hand(slope: float, x: Tensor) -> Tensor:
    """The gradient of `make` with grad/(1 + slope·|x|)² in the place of the derivative of ReLU."""
    first, _, second, _ = make()
    a = first(x)
    b = second(a.relu())
    g = 2 * b.relu() / (1 + slope * b.abs()) ** 2
    g = (g @ second.weight) / (1 + slope * a.abs()) ** 2
    return (g @ first.weight).detach()


# --- schedules ---


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (schedules.constant(2.0), [2.0, 2.0, 2.0]),
        (schedules.linear(1.0, 3.0, 2), [1.0, 2.0, 3.0, 3.0]),
        (schedules.cosine(1.0, 0.0, 2), [1.0, 0.5, 0.0, 0.0]),
        (schedules.exponential(8.0, 0.5), [8.0, 4.0, 2.0, 1.0]),
        (schedules.exponential(8.0, 0.5, limit=3.0), [8.0, 4.0, 3.0, 3.0]),
        (schedules.exponential(1.0, 2.0, limit=3.0), [1.0, 2.0, 3.0, 3.0]),
        (schedules.exponential(-1.0, 2.0, limit=-3.0), [-1.0, -2.0, -3.0, -3.0]),
        (schedules.piecewise({0: 1.0, 2: 5.0}), [1.0, 1.0, 5.0, 5.0]),
        (schedules.warm_up(schedules.exponential(4.0, 0.5), 2), [0.0, 2.0, 4.0, 2.0]),
        (
            schedules.chained((schedules.linear(0.0, 2.0, 2), 2), schedules.constant(7.0)),
            [0.0, 1.0, 7.0, 7.0],
        ),
        (schedules.error_decay(4)["t"], [1e-3, 1e-2, 1e-1, 1.0, 10.0, 10.0]),
        (schedules.error_decay(4)["k"], [1e3, 1e2, 10.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_values_of_a_schedule(schedule: Any, expected: list[float]) -> None:
    assert [schedule(step) for step in range(len(expected))] == pytest.approx(expected, abs=1e-12)


def test_the_cosine_is_that_of_pytorch() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7, eta_min=0.5)
    ours = schedules.cosine(2.0, 0.5, 7)
    for step in range(8):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("make_schedule", "message"),
    [
        (lambda: schedules.linear(1.0, 2.0, 0), "linear: steps must be a whole number from 1"),
        (lambda: schedules.cosine(1.0, 2.0, True), "cosine: steps must be"),
        (lambda: schedules.warm_up(schedules.constant(1.0), -1), "steps must be"),
        (lambda: schedules.error_decay(0), "error_decay: steps must be"),
        (lambda: schedules.exponential(1.0, 0.0), "factor must be greater than 0"),
        (lambda: schedules.piecewise({1: 2.0}), "begin with 0"),
        (lambda: schedules.piecewise({}), "begin with 0"),
        (lambda: schedules.chained(), "one schedule at the end"),
        (lambda: schedules.chained((schedules.constant(1.0), 2)), "one schedule at the end"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(make_schedule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule()


# --- models ---

SLOPE = {"slope": schedules.piecewise({0: 1.0, 1: 2.5, 2: 8.0})}


def test_a_model_has_the_value_of_each_step() -> None:
    gm = fg.transform(make(), "fast_sigmoid")
    scheduler = fg.RuleScheduler(gm, SLOPE)
    for slope in (1.0, 2.5, 8.0):
        assert scheduler.get_last_value() == {"slope": slope}
        torch.testing.assert_close(gradient(gm, sample()), by_hand(slope, sample()))
        scheduler.step()


def test_compiled_code_is_compiled_once_for_all_steps() -> None:
    gm = fg.transform(make(), "fast_sigmoid")
    counter = CompileCounter()
    compiled = torch.compile(gm, backend=counter)
    scheduler = fg.RuleScheduler(compiled, SLOPE)
    for slope in (1.0, 2.5, 8.0):
        torch.testing.assert_close(gradient(compiled, sample()), by_hand(slope, sample()))
        scheduler.step()
    assert counter.frame_count == 1


@pytest.mark.parametrize("door", ["use", "compile", "backend", "transform"])
def test_a_table_has_the_value_of_each_step_wherever_it_is_used(door: str) -> None:
    scheduler = fg.RuleScheduler(fg.RuleTable.of("fast_sigmoid"), SLOPE)
    counter = CompileCounter()
    model = make()
    if door == "compile":
        model = fg.compile(model, scheduler.target, backend=counter)
    elif door == "backend":
        model = torch.compile(model, backend=fg.backend(scheduler.target, inner=counter))
    elif door == "transform":
        model = fg.transform(model, scheduler.target)
    for slope in (1.0, 2.5, 8.0):
        if door == "use":
            with fg.use(scheduler.target):
                found = gradient(model, sample())
        else:
            found = gradient(model, sample())
        torch.testing.assert_close(found, by_hand(slope, sample()))
        scheduler.step()
    assert counter.frame_count == (door in ("compile", "backend"))


def test_the_table_that_was_given_is_as_before() -> None:
    table = fg.RuleTable.of({"relu": fg.rules.fast_sigmoid(slope=3.0), "gelu": "arctan"})
    before = repr(table)
    scheduler = fg.RuleScheduler(table, SLOPE)
    assert repr(table) == before
    assert [e.selector for e in scheduler.target] == [e.selector for e in table]
    assert scheduler.target[1] == table[1]


def test_a_tensor_in_a_table_is_the_one_that_is_written_into() -> None:
    slope = torch.tensor(3.0)
    table = fg.RuleTable.of({"relu": fg.rules.fast_sigmoid(slope=slope)})
    scheduler = fg.RuleScheduler(table, SLOPE)
    assert scheduler.target == table
    scheduler.step()
    assert slope.item() == 2.5


def test_only_the_entries_that_are_named_change() -> None:
    rules = {"relu": fg.rules.fast_sigmoid(slope=3.0), "gelu": fg.rules.fast_sigmoid(slope=3.0)}
    gm = fg.transform(nn.Sequential(nn.ReLU(), nn.GELU()), rules)
    fg.RuleScheduler(gm, SLOPE, entries="gelu")
    values = [float(d.rules[0].bound["slope"]) for d in fg.report(gm).decisions]
    assert values == [3.0, 1.0]
    table = fg.RuleScheduler(fg.RuleTable.of(rules), SLOPE, entries="gelu").target
    assert [float(entry.rules[0].bound["slope"]) for entry in table] == [3.0, 1.0]


def test_all_rules_of_a_composition_are_reached() -> None:
    rules = fg.compose("fast_sigmoid", fg.rules.scale(s=2.0))
    table = fg.RuleTable.of({"relu": rules})
    scheduler = fg.RuleScheduler(table, {"s": schedules.linear(1.0, 2.0, 1)})
    assert float(scheduler.target[0].rules[1].bound["s"]) == 1.0
    gm = fg.transform(nn.Sequential(nn.ReLU()), table)
    fg.RuleScheduler(gm, {"s": schedules.constant(5.0)})
    assert float(fg.report(gm).decisions[0].rules[1].bound["s"]) == 5.0


def test_a_whole_number_stays_one() -> None:
    gm = fg.transform(nn.Sequential(nn.Linear(2, 2)), {"params": fg.rules.stochastic_round(bits=8)})
    scheduler = fg.RuleScheduler(gm, {"bits": schedules.piecewise({0: 8, 1: 4})})
    scheduler.step()
    assert fg.report(gm).decisions[0].rules[0].bound["bits"] == 4
    with pytest.raises(TypeError, match="'bits' of rule 'stochastic_round' is a whole number"):
        fg.RuleScheduler(
            fg.RuleTable.of({"params": "stochastic_round"}), {"bits": schedules.constant(4)}
        )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gm: gm.half(), lambda gm: gm.float()])
def test_copies_and_conversions_keep_the_value(copied: Any) -> None:
    gm = fg.transform(make(), "fast_sigmoid")
    fg.RuleScheduler(gm, SLOPE).step()
    other = copied(gm)
    assert {float(d.rules[0].bound["slope"]) for d in fg.report(other).decisions} == {2.5}
    assert fg.RuleScheduler(other, SLOPE, last_epoch=1).get_last_value() == {"slope": 8.0}
    assert {float(d.rules[0].bound["slope"]) for d in fg.report(other).decisions} == {8.0}


def train(steps: int, gm: Any, scheduler: Any, optimizer: Any) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        gm(sample()).square().sum().backward()
        optimizer.step()
        scheduler.step()


def test_a_resumed_training_is_bit_identical() -> None:
    def start() -> tuple[Any, Any, Any]:
        gm = fg.transform(make(), "fast_sigmoid")
        scheduler = fg.RuleScheduler(gm, {"slope": schedules.linear(1.0, 9.0, 5)})
        return gm, scheduler, torch.optim.Adam(gm.parameters(), lr=0.1)

    whole = start()
    train(6, *whole)
    first = start()
    train(3, *first)
    saved = [part.state_dict() for part in first]
    second = start()
    for part, state in zip(second, copy.deepcopy(saved), strict=True):
        part.load_state_dict(state)
    assert second[1].last_epoch == 3
    train(3, *second)
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_other_schedules_is_refused() -> None:
    gm = fg.transform(make(), "fast_sigmoid")
    scheduler = fg.RuleScheduler(gm, SLOPE)
    scheduler.step()
    other = fg.RuleScheduler(gm, {"slope": schedules.constant(4.0)})
    with pytest.raises(fg.RuleError, match=r"values \{'slope': 2.5\} at step 1"):
        other.load_state_dict(scheduler.state_dict())
    assert other.get_last_value() == {"slope": 4.0}


def test_a_step_can_be_named() -> None:
    gm = fg.transform(make(), "fast_sigmoid")
    scheduler = fg.RuleScheduler(gm, SLOPE)
    scheduler.step(2)
    assert (scheduler.last_epoch, scheduler.get_last_value()) == (2, {"slope": 8.0})
    assert repr(scheduler) == "RuleScheduler(slope=8.0, last_epoch=2)"


@pytest.mark.parametrize(
    ("target", "values", "entries", "error", "message"),
    [
        (make, SLOPE, "*", TypeError, "a transformed model or a RuleTable, got Sequential"),
        (lambda: {"relu": "fast_sigmoid"}, SLOPE, "*", TypeError, "give RuleTable.of"),
        ("model", {}, "*", TypeError, "takes the schedules as a dict"),
        ("model", {"slope": 3.0}, "*", TypeError, r"use schedules.constant\(3.0\)"),
        ("model", {"slope": lambda step: None}, "*", TypeError, "returned None for step 0"),
        ("model", {"slop": SLOPE["slope"]}, "*", fg.RuleError, "slope"),
        ("model", SLOPE, "gelu", fg.PlanError, "no site matches 'gelu'"),
        ("model", {"slope": schedules.constant(-1.0)}, "*", fg.RuleError, "slope"),
        ("model", {"slope": schedules.constant(math.nan)}, "*", fg.RuleError, "NaN"),
        ("table", {"slop": SLOPE["slope"]}, "*", fg.RuleError, "slope"),
        ("table", SLOPE, "gelu", fg.PlanError, "gelu"),
        ("table", {"slope": schedules.constant(-1.0)}, "*", fg.RuleError, "slope"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(
    target: Any, values: Any, entries: str, error: Any, message: str
) -> None:
    table = fg.RuleTable.of("fast_sigmoid")
    gm = fg.transform(make(), table)
    given = {"model": gm, "table": table}.get(target) if isinstance(target, str) else target()
    with pytest.raises(error, match=message):
        fg.RuleScheduler(given, values, entries=entries)
    assert {d.rules[0].bound["slope"] for d in fg.report(gm).decisions} == {25.0}


def test_a_value_that_a_rule_refuses_leaves_the_values_of_before() -> None:
    for target in (fg.RuleTable.of("fast_sigmoid"), fg.transform(make(), "fast_sigmoid")):
        scheduler = fg.RuleScheduler(target, {"slope": schedules.piecewise({0: 1.0, 1: -1.0})})
        with pytest.raises(fg.RuleError, match="slope"):
            scheduler.step()
        assert (scheduler.last_epoch, scheduler.get_last_value()) == (0, {"slope": 1.0})
        if isinstance(target, fg.RuleTable):
            assert float(scheduler.target[0].rules[0].bound["slope"]) == 1.0


@pytest.mark.parametrize("state", [3, {"steps": 3}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    scheduler = fg.RuleScheduler(fg.transform(make(), "fast_sigmoid"), SLOPE)
    with pytest.raises(TypeError, match="takes what state_dict"):
        scheduler.load_state_dict(state)


def test_a_limit_holds_where_the_numbers_overflow() -> None:
    assert schedules.exponential(1.0, 2.0, limit=25.0)(2000) == 25.0
    assert schedules.exponential(-1.0, 2.0, limit=-25.0)(2000) == -25.0


def test_a_chain_of_whole_numbers_has_whole_numbers() -> None:
    bits = schedules.chained((schedules.constant(8), 2), schedules.constant(4))
    gm = fg.transform(nn.Sequential(nn.Linear(2, 2)), {"params": fg.rules.stochastic_round(bits=8)})
    scheduler = fg.RuleScheduler(gm, {"bits": bits})
    scheduler.step(2)
    assert fg.report(gm).decisions[0].rules[0].bound["bits"] == 4
