"""What a rule gives a gradient to: operands of the operation, and its own parameters.

A formula that returns a tensor answers for one operand. A formula that returns a dict answers for several values by
name. A parameter can also have a function of its own for its gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import RuleError, unknown
from .contract import OPERANDS, Formula, arguments_of
from .text import shown

__all__ = ["Learns", "read_answers", "read_learns", "several"]

Learns = Mapping[str, Callable[..., Tensor] | None]
"""The parameters that a rule gives a gradient to, each with the function that computes it.

None stands for the formula itself, which returns a dict.
"""


def several(name: str, argument: str, given: Any) -> tuple[str, ...]:
    """Return one name, or several, as a tuple. Raises `RuleError` if the argument is neither."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given, tuple | list | set | frozenset) and all(
        isinstance(one, str) for one in given
    ):
        return tuple(given)
    raise RuleError(
        f"{argument}= of rule {name!r} has to be a name or a tuple of names, got {given!r}"
    )


def read_answers(name: str, given: str | tuple[str, ...], formula: Formula) -> tuple[str, ...]:
    """Return the operands that a rule gives a gradient to; empty for the first operand of the operation.

    Args:
        name: The name of the rule, for errors.
        given: The argument `answers` of `register`. By default the first operand that the signature names.
        formula: The formula.

    Raises:
        RuleError: A name is not that of an operand.
    """
    answers = several(name, "answers", given)
    for answer in answers:
        if answer not in OPERANDS:
            raise RuleError(unknown(f"operand in answers= of rule {name!r}:", answer, OPERANDS))
    if not answers:
        answers = tuple(n for n in formula.inputs if n in OPERANDS)[:1]
        # a rule of x is for the first operand, also of an operation that calls it otherwise
        answers = () if answers == ("x",) else answers
    return answers


def read_learns(
    name: str, given: str | tuple[str, ...] | Mapping[str, Callable[..., Tensor]], formula: Formula
) -> Learns:
    """Return the parameters that a rule gives a gradient to.

    Args:
        name: The name of the rule, for errors.
        given: The argument `learns` of `register`.
        formula: The formula.

    Raises:
        RuleError: A name is not that of a parameter, or a function does not have the signature of the formula.
    """
    learns: dict[str, Callable[..., Tensor] | None] = (
        dict(given) if isinstance(given, Mapping) else dict.fromkeys(several(name, "learns", given))
    )
    for parameter, function in learns.items():
        if parameter not in formula.parameters:
            known = list(formula.parameters)
            raise RuleError(unknown(f"parameter in learns= of rule {name!r}:", parameter, known))
        if function is not None:
            _check_signature(name, parameter, function, formula)
    return learns


def _check_signature(name: str, parameter: str, function: Any, formula: Formula) -> None:
    what = f"learns[{parameter!r}]"
    if not callable(function):
        raise RuleError(
            f"{what}={function!r} of rule {name!r} must be the function that computes the gradient of {parameter!r}, "
            f"with the signature of the formula. If the formula returns a dict with this gradient, write "
            f"learns=({parameter!r},)."
        )
    if arguments_of(name, what, function) != arguments_of(name, "formula", formula.function):
        raise RuleError(
            f"{what}={shown(function)} of rule {name!r} has the signature {inspect.signature(function)}; it must have "
            f"the arguments of the formula, {inspect.signature(formula.function)}."
        )
