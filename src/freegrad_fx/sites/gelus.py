"""Finds GELUs in separate operations, such as those of GPT-2, by their dataflow and their values."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..vocabulary.activations import OPS
from .alone import Alone
from .compound import Compound, is_number, name_of, obstacle_inside, uses_of

__all__ = ["STEPS", "gelu_at"]

STEPS = ("tanh", "erf", "sigmoid")
"""The functions in the middle of a GELU."""

_ARITHMETIC = ("add", "sub", "mul", "div", "pow", "neg", "square")


def _quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_FORMS: tuple[Alone, ...] = (functools.partial(F.gelu, approximate="tanh"), F.gelu, _quick)


def gelu_at(node: fx.Node) -> Compound | None:
    """The GELU whose tanh, erf or sigmoid a node computes; None if it is in none."""
    if name_of(node) not in STEPS or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    for x, parts in _regions(node):
        form = _form(x, parts)
        if form is not None:
            reader = next(part for part in parts if x in part.args)
            names = dict.fromkeys(map(name_of, parts))
            return Compound(
                OPS["gelu"],
                parts,
                {"x": (reader, reader.args.index(x))},
                spelling=", ".join(names),
                obstacle=obstacle_inside(parts, parts[-1]),
                alone=form,
            )
    return None


def _regions(step: fx.Node) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """The possible inputs, each with the calls that lead from it to a product with the step."""
    behind, node = [step], step
    while (user := _only_user(node)) is not None and _with_number(user) is node:
        behind.append(user)
        node = user
    if user is None or name_of(user) != "mul" or len(user.args) != 2 or user.kwargs:
        return
    factor = user.args[0] if user.args[1] is node else user.args[1]
    ends = [user]
    while (more := _only_user(ends[-1])) is not None and _with_number(more) is ends[-1]:
        ends.append(more)  # 0.5 can be the last factor
    scaled: list[fx.Node] = []
    while isinstance(factor, fx.Node):
        before = _before(step, factor)
        if before is not None:
            inner = {*before, *scaled, *behind}
            for count in range(1, len(ends) + 1):
                yield factor, tuple(sorted({*inner, *ends[:count]}))
        scaled.append(factor)
        factor = _with_number(factor)


def _only_user(node: fx.Node) -> fx.Node | None:
    uses = uses_of(node)
    return uses[0] if len(uses) == 1 else None


def _with_number(node: fx.Node) -> Any:
    """The other operand, if a node adds a number, or multiplies or divides by one; else None."""
    if name_of(node) not in ("add", "mul", "div") or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if is_number(right):
        return left
    return right if is_number(left) and name_of(node) != "div" else None


def _before(step: fx.Node, x: fx.Node) -> set[fx.Node] | None:
    """The calls that compute the argument of a step from a tensor and numbers alone; None if there is more."""
    found: set[fx.Node] = set()
    waiting = [step.args[0]]
    while waiting:
        node = waiting.pop()
        if node is x or not isinstance(node, fx.Node) or node in found:
            continue
        if name_of(node) not in _ARITHMETIC or node.kwargs or len(found) > 8:
            return None
        found.add(node)
        waiting += node.args
    return found


def _form(x: fx.Node, parts: tuple[fx.Node, ...]) -> Alone | None:
    """The GELU whose values some calls compute; None if they compute something else."""
    points = torch.linspace(-5, 5, 21, dtype=torch.float64)
    values: dict[fx.Node, Any] = {x: points}
    with torch.no_grad():
        for part in parts:
            given = fx.map_arg(part.args, values.get)
            function: Any = part.target
            if part.op == "call_method":
                function = getattr(Tensor, str(part.target), None)
            try:
                values[part] = function(*given, **part.kwargs)
            except (TypeError, RuntimeError, AttributeError):
                return None
        result = values[parts[-1]]
        for form in _FORMS:
            if isinstance(result, Tensor) and torch.allclose(result, form(points), 0, 1e-6):
                return form
    return None
