"""What a rule requires of its parameters, written as mathematics: ``"a <= b"``, ``"max_norm >= 0, eps > 0"``.

Knows numbers and names; of rules and tensors nothing.
"""

from __future__ import annotations

import ast
import itertools
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import RuleError, unknown

__all__ = ["Constraint", "read_constraints"]

_Operand: TypeAlias = str | float

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.NotEq: operator.ne,
}

_FORM = 'A constraint compares parameters and numbers: requires="a <= b" or requires="0 <= p < 1, eps > 0".'


@dataclass(frozen=True)
class Constraint:
    """A chain of comparisons between parameters and numbers, all of which have to hold.

    Attributes:
        text: The chain as mathematics, ``0 <= p < 1``.
        names: The parameters in it.
    """

    text: str
    names: tuple[str, ...]
    _operands: tuple[_Operand, ...]
    _comparisons: tuple[Callable[[Any, Any], bool], ...]

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it holds for these values. It does where one of them is missing, or is no number."""
        if not all(isinstance(values.get(name), int | float) for name in self.names):
            return True
        operands = [values[o] if isinstance(o, str) else o for o in self._operands]
        pairs = itertools.pairwise(operands)
        return all(c(*pair) for c, pair in zip(self._comparisons, pairs, strict=True))


def read_constraints(rule: str, text: str, parameters: Collection[str]) -> tuple[Constraint, ...]:
    """Read what `register` is given as `requires`.

    Raises:
        RuleError: The text is no list of comparisons, or names what is no parameter of the rule.
    """
    if not isinstance(text, str):
        raise RuleError(f"rule {rule!r} requires {text!r}. {_FORM}")
    if not text.strip():
        return ()
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise RuleError(f"rule {rule!r} requires {text!r}. {_FORM}") from None
    chains = tree.elts if isinstance(tree, ast.Tuple) else [tree]
    return tuple(_read_chain(rule, chain, parameters) for chain in chains)


def _read_chain(rule: str, chain: ast.expr, parameters: Collection[str]) -> Constraint:
    text = ast.unparse(chain)
    if not isinstance(chain, ast.Compare) or any(type(c) not in _COMPARISONS for c in chain.ops):
        raise RuleError(f"rule {rule!r} requires {text!r}. {_FORM}")
    operands = tuple(_read_operand(rule, text, o) for o in (chain.left, *chain.comparators))
    names = tuple(dict.fromkeys(o for o in operands if isinstance(o, str)))
    for name in names:
        if name not in parameters:
            raise RuleError(unknown(f"parameter in what rule {rule!r} requires:", name, parameters))
    return Constraint(text, names, operands, tuple(_COMPARISONS[type(c)] for c in chain.ops))


def _read_operand(rule: str, text: str, node: ast.expr) -> _Operand:
    if isinstance(node, ast.Name):
        return node.id
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RuleError(f"rule {rule!r} requires {text!r}. {_FORM}")
    return value
