"""The lean form of a rule: the same gradients from less than the formula reads.

A lean form has two functions. `keep` runs in the forward, and returns what the backward needs; `formula` computes the
gradients from that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import RuleError
from .contract import OPERATION, Formula, arguments_of
from .text import shown

__all__ = ["KEPT", "Lean", "read_lean"]

KEPT = "kept"
"""The argument of a lean formula that is what `keep` returned."""


class Lean(NamedTuple):
    """The lean form of a rule.

    Attributes:
        keep: Called in the forward as ``keep(operands and y by name, [f=...], **parameters)``; returns a tuple.
        reads: What `keep` reads: operands and ``"y"``.
        formula: Called as ``formula(grad, kept, operands and y by name, [f=...], **parameters)``.
        saves: What `formula` reads besides the gradient and what was kept: operands and ``"y"``.
    """

    keep: Callable[..., tuple[Any, ...]]
    reads: tuple[str, ...]
    formula: Callable[..., Any]
    saves: tuple[str, ...]

    @property
    def uses(self) -> tuple[str, ...]:
        """Everything that is read in the forward."""
        return tuple(dict.fromkeys((*self.reads, *self.saves)))


def read_lean(name: str, given: Any, formula: Formula) -> Lean | None:
    """Read the argument `lean` of `register`.

    Args:
        name: The name of the rule, for errors.
        given: None, or the two functions.
        formula: The formula of the rule.

    Raises:
        RuleError: It is not two functions, or one does not have the arguments that it is given.
    """
    if given is None:
        return None
    if not isinstance(given, tuple) or len(given) != 2 or not all(map(callable, given)):
        raise RuleError(
            f"lean= of rule {name!r} must be two functions, lean=(keep, formula), got {given!r}."
        )
    keep, lean = given
    reads = _positional(name, "lean[0]", keep, formula)
    first = _positional(name, "lean[1]", lean, formula)
    if first[:2] != ("grad", KEPT):
        raise RuleError(
            f"lean[1]={shown(lean)} of rule {name!r} must begin with the arguments `grad` and `{KEPT}`, what "
            f"{shown(keep)} returned."
        )
    for what, names in (("lean[0]", reads), ("lean[1]", first[2:])):
        unknown = [n for n in names if n not in (*formula.inputs, "y")]
        if unknown:
            raise RuleError(
                f"{what} of rule {name!r} reads {unknown[0]!r}, which the formula does not read. Add it to the "
                f"signature of the rule."
            )
    return Lean(keep, reads, lean, first[2:])


def _positional(
    name: str, what: str, function: Callable[..., Any], formula: Formula
) -> tuple[str, ...]:
    """The positional arguments. Raises `RuleError` if the others are not `f` and the parameters of the rule."""
    arguments = arguments_of(name, what, function)
    keywords = {n for n, kind in arguments if kind is inspect.Parameter.KEYWORD_ONLY}
    expected = {*formula.parameters, *([OPERATION] if formula.operation else [])}
    if keywords != expected:
        raise RuleError(
            f"{what}={shown(function)} of rule {name!r} must take by keyword, after `*`, what the formula takes: "
            f"{', '.join(sorted(expected)) or 'nothing'}."
        )
    return tuple(n for n, _ in arguments if n not in keywords)
