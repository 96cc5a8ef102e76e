"""Constraints on the parameters of a rule, written as mathematics: ``"a <= b"``, ``"max_norm >= 0, eps > 0"``.

Works on names and numbers. Does not know rules or tensors.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import RuleError, unknown

__all__ = ["Constraint", "read_constraints"]

_Operand: TypeAlias = str | float | tuple[str, float]
"""A parameter, a number, or a parameter plus a number."""

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.NotEq: operator.ne,
    ast.Eq: math.isclose,
}

_FORM = (
    'A constraint compares parameters and numbers with <, <=, >, >=, == or !=, for example requires="a <= b" or '
    'requires="0 <= p < 1, eps > 0".'
)


@dataclass(frozen=True)
class Constraint:
    """A chain of comparisons between parameters and numbers. All comparisons must hold.

    Attributes:
        text: The chain as mathematics, for example ``0 <= p < 1``.
        names: The parameters that the chain names.
    """

    text: str
    names: tuple[str, ...]
    _operands: tuple[_Operand, ...]
    _comparisons: tuple[Callable[[Any, Any], bool], ...]

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Return whether the constraint holds for these values.

        A constraint is not checked, and holds, if one of its parameters has no value or its value is not a number,
        for example a tensor.
        """
        if not all(isinstance(values.get(name), int | float) for name in self.names):
            return True
        operands = [_value(operand, values) for operand in self._operands]
        pairs = itertools.pairwise(operands)
        return all(c(*pair) for c, pair in zip(self._comparisons, pairs, strict=True))


def _value(operand: _Operand, values: Mapping[str, Any]) -> Any:
    if isinstance(operand, tuple):
        return values[operand[0]] + operand[1]
    return values[operand] if isinstance(operand, str) else operand


def read_constraints(rule: str, text: str, parameters: Collection[str]) -> tuple[Constraint, ...]:
    """Parse the argument `requires` of `register`.

    Args:
        rule: The name of the rule, for errors.
        text: Chains of comparisons, separated by commas.
        parameters: The names of the rule's parameters.

    Raises:
        RuleError: The text is not a list of comparisons, or it names an unknown parameter.
    """
    if not isinstance(text, str):
        raise RuleError(f"requires={text!r} of rule {rule!r} cannot be read. {_FORM}")
    if not text.strip():
        return ()
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise RuleError(f"requires={text!r} of rule {rule!r} cannot be read. {_FORM}") from None
    chains = tree.elts if isinstance(tree, ast.Tuple) else [tree]
    return tuple(_read_chain(rule, chain, parameters) for chain in chains)


def _read_chain(rule: str, chain: ast.expr, parameters: Collection[str]) -> Constraint:
    text = ast.unparse(chain)
    if not isinstance(chain, ast.Compare) or any(type(c) not in _COMPARISONS for c in chain.ops):
        raise RuleError(f"requires={text!r} of rule {rule!r} cannot be read. {_FORM}")
    operands = tuple(_read_operand(rule, text, o) for o in (chain.left, *chain.comparators))
    found = (o[0] if isinstance(o, tuple) else o for o in operands)
    names = tuple(dict.fromkeys(o for o in found if isinstance(o, str)))
    for name in names:
        if name not in parameters:
            raise RuleError(unknown(f"parameter in requires= of rule {rule!r}:", name, parameters))
    return Constraint(text, names, operands, tuple(_COMPARISONS[type(c)] for c in chain.ops))


def _read_operand(rule: str, text: str, node: ast.expr) -> _Operand:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = (_read_operand(rule, text, side) for side in (node.left, node.right))
        if isinstance(left, str) and isinstance(right, int | float):
            return left, right
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RuleError(f"requires={text!r} of rule {rule!r} cannot be read. {_FORM}")
    return value
