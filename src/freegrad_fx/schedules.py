"""Schedules: values of rule parameters that change from step to step, as those of `torch.optim.lr_scheduler` do.

A schedule is any function from the number of the step to a value. This module has the usual ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from .errors import RuleError
from .rule_values import holder_of

__all__ = [
    "RuleScheduler",
    "Schedule",
    "chained",
    "constant",
    "cosine",
    "error_decay",
    "exponential",
    "linear",
    "piecewise",
    "warm_up",
]


def __dir__() -> list[str]:
    return __all__


Schedule: TypeAlias = Callable[[int], float]
"""The value of a parameter, given the number of the step; the first step is 0."""


# --- schedules ---


def constant(value: float) -> Schedule:
    """value

    Args:
        value: The value at every step.
    """
    return lambda step: value


def linear(start: float, end: float, steps: int) -> Schedule:
    """start + (end − start)·min(step/steps, 1)

    Args:
        start: The value at step 0.
        end: The value at step `steps` and after it.
        steps: The number of steps from `start` to `end`, at least 1.

    Raises:
        ValueError: `steps` is less than 1.
    """
    _check_steps("linear", steps)
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """end + (start − end)·(1 + cos(π·min(step/steps, 1)))/2

    Half a period of a cosine, as in Loshchilov & Hutter 2017 (arXiv:1608.03983), without restarts.

    Args:
        start: The value at step 0.
        end: The value at step `steps` and after it.
        steps: The number of steps from `start` to `end`, at least 1.

    Raises:
        ValueError: `steps` is less than 1.
    """
    _check_steps("cosine", steps)
    return lambda step: (
        end + (start - end) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2
        if step < steps
        else end
    )


def exponential(start: float, factor: float, *, limit: float | None = None) -> Schedule:
    """start·factor^step, but not beyond limit

    Args:
        start: The value at step 0.
        factor: What the value is multiplied with at each step, greater than 0.
        limit: The last value: the smallest if `factor` is less than 1, else the largest. Default: none.

    Raises:
        ValueError: `factor` is not greater than 0.
    """
    if not factor > 0:
        raise ValueError(f"exponential: factor must be greater than 0, got {factor!r}")
    shrinks = (factor < 1) == (start > 0)
    bounded = max if shrinks else min

    def value(step: int) -> float:
        try:
            found = start * factor**step
        except OverflowError:
            found = math.copysign(math.inf, start)
        return found if limit is None else bounded(found, limit)

    return value


def piecewise(values: Mapping[int, float]) -> Schedule:
    """values[the largest key that is at most step]

    Args:
        values: The value from each step on. One of the keys has to be 0.

    Raises:
        ValueError: `values` has no value for step 0, or a key is not a number of a step.

    Example:
        >>> from freegrad_fx import schedules
        >>> slope = schedules.piecewise({0: 1.0, 10: 5.0, 20: 25.0})
        >>> slope(9), slope(10), slope(100)
        (1.0, 5.0, 25.0)
    """
    starts = sorted(values)
    if starts[:1] != [0] or not all(isinstance(step, int) for step in starts):
        raise ValueError(
            f"piecewise: the keys are the steps from which the values hold, whole numbers, and begin with 0; got "
            f"{starts}"
        )
    given = dict(values)
    return lambda step: given[max(start for start in starts if start <= step)]


def warm_up(schedule: Schedule, steps: int, *, start: float = 0.0) -> Schedule:
    """start + (schedule(0) − start)·step/steps for the first steps, then schedule(step − steps)

    Args:
        schedule: What follows.
        steps: The number of steps of the warm-up, at least 1.
        start: The value at step 0.

    Raises:
        ValueError: `steps` is less than 1.
    """
    return chained((linear(start, schedule(0), steps), steps), schedule)


def chained(*parts: tuple[Schedule, int] | Schedule) -> Schedule:
    """Schedules one after the other; each counts its own steps from 0.

    Args:
        *parts: Pairs of a schedule and its number of steps, and at the end one schedule for all further steps.

    Raises:
        ValueError: A part before the last is not a pair, or the last is one.
    """
    *pairs, last = parts or (None,)
    if not callable(last) or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
        raise ValueError(
            "chained: give pairs of a schedule and its number of steps, and one schedule at the end: "
            "chained((linear(1, 5, 10), 10), constant(5))"
        )
    before: list[Any] = pairs
    for _, steps in before:
        _check_steps("chained", steps)

    def value(step: int) -> float:
        for schedule, steps in before:
            if step < steps:
                return schedule(step)  # type: ignore[no-any-return]
            step -= steps
        return last(step)

    return value


def error_decay(steps: int) -> dict[str, Schedule]:
    """t = 10^(−3 + 4·min(step/steps, 1)), k = max(1/t, 1)

    The schedules of both parameters of the rule ``error_decay`` (Qin et al. 2020, IR-Net, arXiv:1909.10788).

    Args:
        steps: The number of steps of the whole training, at least 1.

    Returns:
        The schedules, by the name of the parameter: ``RuleScheduler(model, schedules.error_decay(steps=90))``.

    Raises:
        ValueError: `steps` is less than 1.
    """
    _check_steps("error_decay", steps)

    def t(step: int) -> float:
        return math.pow(10.0, -3.0 + 4.0 * min(step / steps, 1.0))

    return {"t": t, "k": lambda step: max(1.0 / t(step), 1.0)}


def _check_steps(schedule: str, steps: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"{schedule}: steps must be a whole number from 1, got {steps!r}")


# --- the scheduler ---


class RuleScheduler:
    """Sets parameters of rules at each step, as a learning rate scheduler of PyTorch sets the learning rate.

    Formula: after n calls of `step`, each parameter has the value ``schedule(n)``.

    The value is kept in a tensor of zero dimensions, which is written into. Compiled code therefore uses the new value
    and is not compiled again. A parameter that has to be a whole number in Python is replaced by the new number, and
    compiled code is compiled again if the number changes.

    Args:
        target: One of the following.

            - A transformed model, or the result of `torch.compile` on one.
            - A `RuleTable`, for blocks of `use`, for `compile` and for `backend`. A table is immutable: use `target` of
              the scheduler, the table whose parameters follow the schedules, instead of the table that was given.
        schedules: The schedules, by the name of the parameter: functions from the number of the step to a value.
        entries: The sites of the model, as for `set_rule_parameter`; for a table, the entries as the report prints
            them (``"relu"``), or a pattern. Default: all that have these parameters.
        last_epoch: The number of the step to begin with, plus −1, as in PyTorch: −1 for a new training.

    Attributes:
        target (Any): The model, or the table whose parameters follow the schedules.
        last_epoch (int): The number of the step whose values are in force.

    Raises:
        PlanError: No site or entry matches.
        RuleError: No rule there has such a parameter, or a value does not satisfy the constraints of the rule.
        TypeError: `target` is neither a model nor a table, or a schedule is not a function that returns a number.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> gm = fg.transform(torch.nn.Sequential(torch.nn.ReLU()), {"relu": fg.rules.scale(s=1.0)})
        >>> scheduler = fg.RuleScheduler(gm, {"s": fg.schedules.linear(1.0, 3.0, steps=2)})
        >>> scheduler.step()
        >>> scheduler.get_last_value()
        {'s': 2.0}
    """

    def __init__(
        self,
        target: Any,
        schedules: Mapping[str, Schedule],
        *,
        entries: str = "*",
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(schedules, Mapping) or not schedules:
            raise TypeError(
                f"RuleScheduler takes the schedules as a dict from the name of a parameter to a function of the "
                f"number of the step: {{'slope': schedules.linear(1.0, 25.0, steps=10)}}; got {schedules!r}"
            )
        for name, schedule in schedules.items():
            if not callable(schedule):
                raise TypeError(
                    f"the schedule of {name!r} must be a function of the number of the step, got {schedule!r}. For a "
                    f"fixed value, use schedules.constant({schedule!r})."
                )
        self.schedules = dict(schedules)
        self.last_epoch = last_epoch + 1
        self._values = self._values_at(self.last_epoch)
        self._held = holder_of(target, self.schedules, entries, "RuleScheduler")
        self._held.begin(self._values)
        self.target: Any = self._held.target

    def step(self, epoch: int | None = None) -> None:
        """Set the values of the next step.

        Call it after the backward, where a scheduler of the learning rate is called.

        Args:
            epoch: The number of the step. Default: one more than `last_epoch`.

        Raises:
            RuleError: A value does not satisfy the constraints of a rule. No value is changed then.
            TypeError: A schedule does not return a number.
        """
        new = self.last_epoch + 1 if epoch is None else epoch
        values = self._values_at(new)
        self._held.set(values)
        self.last_epoch, self._values = new, values

    def get_last_value(self) -> dict[str, float]:
        """Return the values in force, by the name of the parameter."""
        return dict(self._values)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the step. The schedules are functions, and are not in it."""
        return {"last_epoch": self.last_epoch, "values": dict(self._values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the step of a `state_dict`, with the values of this scheduler's own schedules.

        Args:
            state: What `state_dict` returned.

        Raises:
            RuleError: It is the state of a scheduler of other parameters, or of one whose schedules have other values
                at that step. Nothing is changed then.
            TypeError: It is no state of a `RuleScheduler`.
        """
        if not isinstance(state, Mapping) or not {"last_epoch", "values"} <= {*state}:
            raise TypeError(f"load_state_dict takes what state_dict() returned, got {state!r}")
        values, saved = self._values_at(state["last_epoch"]), state["values"]
        if values != saved:
            raise RuleError(
                f"the state was saved by a scheduler with the values {saved} at step {state['last_epoch']}, where the "
                f"schedules of this one have {values}. Make it with the same schedules."
            )
        self.step(state["last_epoch"])

    def _values_at(self, step: int) -> dict[str, float]:
        values = {}
        for name, schedule in self.schedules.items():
            value = schedule(step)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(
                    f"the schedule of {name!r} returned {value!r} for step {step}; it must return a number"
                )
            values[name] = value
        return values

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self._values.items())
        return f"{type(self).__name__}({values}, last_epoch={self.last_epoch})"
