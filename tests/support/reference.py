"""The expected values: a naive formula for every built-in rule, and the plainest decoupled operation.

Nothing here comes from the package. A formula is Python arithmetic in double precision, and its signature states what
the tests check: what the rule reads (`g`, then any of `x`, `y` and `draw`), its parameters, and their defaults.

This is the only place in the tests to edit for a new rule. Add one function:

    @entry("my_rule")
    def my_rule(g: float, x: float, *, slope: float = 1.0) -> float:
        return g * slope * x
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

__all__ = [
    "DRAWS",
    "ENTRYWISE",
    "EXACT",
    "RANDOM",
    "WHOLE_TENSOR",
    "defaults_of",
    "entry",
    "entrywise",
    "inputs_of",
    "of",
    "oracle",
    "whole_tensor",
]

Forward: TypeAlias = Callable[[Tensor], Tensor]
Backward: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
_F = TypeVar("_F", bound=Callable[..., Any])

ENTRYWISE: dict[str, Callable[..., float]] = {}
"""Formulas of one entry of the gradient, from the entries at the same place."""

RANDOM: dict[str, Callable[..., float]] = {}
"""The same with a random number, `draw`."""

WHOLE_TENSOR: dict[str, Callable[..., Tensor]] = {}
"""Formulas of the whole gradient."""

EXACT: set[str] = set()
"""The rules that round at most once, so that the gradient is the formula's bit for bit."""

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {}
"""The random numbers of a rule, from a tensor of their shape and dtype."""


def entry(
    name: str, *, exact: bool = False, draw: Callable[[Tensor], Tensor] | None = None
) -> Callable[[_F], _F]:
    """Declare the formula of a rule that computes each entry from the entries at the same place.

    Args:
        name: The name of the rule.
        exact: Whether the rule rounds at most once. The gradient is then compared bit for bit.
        draw: For a random rule, the function that its `draw` comes from.
    """

    def declare(formula: _F) -> _F:
        (RANDOM if draw else ENTRYWISE)[name] = formula
        EXACT.update([name] if exact else [])
        DRAWS.update({name: draw} if draw else {})
        return formula

    return declare


def whole_tensor(name: str) -> Callable[[_F], _F]:
    """Declare the formula of a rule that reads the whole gradient, and returns a tensor in double precision."""

    def declare(formula: _F) -> _F:
        WHOLE_TENSOR[name] = formula
        return formula

    return declare


def of(name: str) -> Callable[..., Any]:
    """The formula of a rule."""
    for formulas in (ENTRYWISE, RANDOM, WHOLE_TENSOR):
        if name in formulas:
            return formulas[name]
    raise LookupError(
        f"the tests have no expected values for rule {name!r}. Add its naive formula to tests/support/reference.py, "
        f"decorated with @entry({name!r}) or @whole_tensor({name!r}). No other file of the tests has to change."
    )


def inputs_of(name: str) -> tuple[str, ...]:
    """Which of x and y a rule reads."""
    return tuple(n for n in inspect.signature(of(name)).parameters if n in ("x", "y"))


def defaults_of(name: str) -> dict[str, Any]:
    """The parameters of a rule, with their defaults."""
    parameters = inspect.signature(of(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def entrywise(
    formula: Callable[..., float],
    grad: Tensor,
    x: Tensor | None = None,
    y: Tensor | None = None,
    draw: Tensor | None = None,
    **parameters: Any,
) -> Tensor:
    """Apply a formula to each entry of `grad` and to the entries at the same place of what else it reads."""
    given = {"x": x, "y": y, "draw": draw}
    read = [given[n] for n in inspect.signature(formula).parameters if n in given]
    entries = [t.reshape(-1).double().tolist() for t in (grad, *read)]
    values = [formula(*numbers, **parameters) for numbers in zip(*entries, strict=True)]
    return torch.tensor(values, dtype=torch.float64).reshape(grad.shape).to(grad.dtype)


# --- one entry of the gradient ---
# g·1[...] is 0 where the condition does not hold, also for an infinite g, as in PyTorch's derivative of relu.


@entry("d(ReLU)", exact=True)
def d_relu(g: float, x: float) -> float:
    return g if x > 0 else 0.0


@entry("d(Linear)", exact=True)
def d_linear(g: float) -> float:
    return g


@entry("rectangular", exact=True)
def rectangular(g: float, x: float, *, a: float = -0.5, b: float = 0.5) -> float:
    return g if a <= x <= b else 0.0


@entry("triangular")
def triangular(g: float, x: float, *, width: float = 1.0) -> float:
    slope = 1 - abs(x) / (1e-6 if width < 1e-6 else width)
    return g * (0.0 if slope < 0 else slope)


@entry("scale", exact=True)
def scale(g: float, *, s: float = 1.0) -> float:
    return s * g


@entry("reverse", exact=True)
def reverse(g: float, *, alpha: float = 1.0) -> float:
    return -alpha * g


@entry("clip_value", exact=True)
def clip_value(g: float, *, max_value: float = 1.0) -> float:
    if g > max_value:
        return max_value
    return -max_value if g < -max_value else g


@entry("straight_through", exact=True)
def straight_through(g: float) -> float:
    return g


@entry("clipped_straight_through", exact=True)
def clipped_straight_through(g: float, x: float, *, bound: float = 1.0) -> float:
    return g if abs(x) <= bound else 0.0


@entry("fast_sigmoid")
def fast_sigmoid(g: float, x: float, *, slope: float = 25.0) -> float:
    d = 1 + slope * abs(x)
    return g / (d * d)


@entry("arctan")
def arctan(g: float, x: float, *, alpha: float = 2.0) -> float:
    z = math.pi * alpha * x / 2
    return g * ((alpha / 2) / (1 + z * z))


@entry("guided", exact=True)
def guided(g: float, x: float) -> float:
    return (0.0 if g < 0 else g) if x > 0 else 0.0


# --- one entry of the gradient, with a random number ---


@entry("noise", draw=torch.randn_like)
def noise(g: float, draw: float, *, sigma: float = 0.1) -> float:
    return g + sigma * draw


@entry("full_jam", exact=True, draw=torch.rand_like)
def full_jam(g: float, draw: float) -> float:
    return g * draw


@entry("positive_jam", exact=True, draw=torch.rand_like)
def positive_jam(g: float, x: float, draw: float) -> float:
    return g * draw if x >= 0 else 0.0


@entry("rectangular_jam", exact=True, draw=torch.rand_like)
def rectangular_jam(g: float, x: float, draw: float, *, a: float = -5.0, b: float = 5.0) -> float:
    return g * draw if a <= x <= b else 0.0


# --- the whole gradient ---


@whole_tensor("clip_norm")
def clip_norm(grad: Tensor, *, max_norm: float = 1.0, eps: float = 1e-12) -> Tensor:
    entries = grad.reshape(-1).double().tolist()
    norm = math.sqrt(sum(g * g for g in entries))
    factor = max_norm / (eps if norm < eps else norm)
    factor = 1.0 if factor > 1 else factor
    return torch.tensor([g * factor for g in entries], dtype=torch.float64).reshape(grad.shape)


@whole_tensor("centralize")
def centralize(grad: Tensor, *, dim: int | tuple[int, ...] = -1) -> Tensor:
    if grad.dim() == 0:
        return grad.double() - grad.double()
    dims = {d % grad.dim() for d in (dim if isinstance(dim, tuple) else (dim,))}
    result = grad.double().clone()
    # one slice for every choice of the indices that are kept
    kept = [[slice(None)] if d in dims else range(n) for d, n in enumerate(grad.shape)]
    for index in itertools.product(*kept):
        entries = result[index].reshape(-1).tolist()
        if entries:
            result[index] -= sum(entries) / len(entries)
    return result


# --- the plainest decoupled operation ---


class Decoupled(torch.autograd.Function):
    """One class for all oracles: a transform looks at every class of Functions that is alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Forward, rule: Backward) -> Tensor:
        y = forward(x.clone())  # it may write into its argument
        ctx.save_for_backward(x, y)
        ctx.rule = rule
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, y = ctx.saved_tensors
        return ctx.rule(grad, x, y), None, None


def oracle(forward: Forward, rule: Backward) -> Forward:
    """The operation with `forward` as its forward and ``rule(grad, x, y)`` as its backward, written by hand."""
    return lambda x: Decoupled.apply(x, forward, rule)
