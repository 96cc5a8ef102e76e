"""The operands and the further arguments of a call that runs, for rules that use more than the first operand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import RuleError
from ..ops.gradients import copied
from ..plan import Decision
from ..vocabulary.calls import constants_of
from ..vocabulary.op import Spelling

__all__ = ["UsedCall", "used_call"]


@dataclass(frozen=True)
class UsedCall:
    """A call, as a rule uses it.

    Attributes:
        args: Positional arguments. The operands that the rule answers for are detached, besides the first one.
        kwargs: Keyword arguments.
        answers_first: Whether the rule answers for the first operand.
        operation: The canonical name of the operation.
        operands: The operands besides the first one, and the further arguments, as for `ops.decoupled`.
        native: Whether the call keeps its native backward.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    answers_first: bool
    operation: str
    operands: Mapping[str, Any]
    native: bool = False


def used_call(
    spelling: Spelling,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    decision: Decision,
) -> UsedCall | None:
    """What a rule that replaces the backward uses of a call; None if only the first operand and the output.

    Raises:
        RuleError: The rule computes the operation at other operands, and this call does not allow that.
    """
    (first, *others), op = spelling.operands, spelling.op
    names = (first.name, *(operand.name for operand in others))
    declaration = decision.rules[0].declaration
    uses = declaration.uses(names)
    if uses is None:
        return None
    constants: dict[str, Any] | None = {}
    if declaration.operation and declaration.packs is None:
        constants = constants_of(op, spelling.operands, function, args, kwargs)
    if constants is None:
        raise RuleError(
            f"rule {declaration.name!r} computes the operation at other operands, which is not possible for this call "
            f"of {op.name} at site {decision.site.name!r}. Give the site None, or a rule without `f`."
        )
    native = declaration.packs is not None or bool(constants.get(declaration.native_if))
    given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
    operands: dict[str, Any] = {n: None for n in op.operands if n != first.name}
    for operand in others:
        if operand.name not in uses.takes:
            continue
        value: Tensor = given[operand.key]
        copies = spelling.inplace and operand.name in uses.reads
        start = copied(value) if copies else value
        operands[operand.name] = start.transpose(-2, -1) if operand.transposed else start
        if operand.name in uses.answers and not native:
            given[operand.key] = value.detach()
    return UsedCall(
        tuple(given[index] for index in range(len(args))),
        {name: given[name] for name in kwargs},
        first.name in uses.answers,
        op.name,
        {**operands, **constants},
        native,
    )
