"""Lists the registered rules by family and by what they can be used for."""

from __future__ import annotations

from ..core.rule import Rule, available, get
from ..errors import RuleError, TableError, unknown
from ..vocabulary.activations import GROUPS
from .fields import ALL, ALL_OPS, OP_NAMES, PARAMETERS

__all__ = ["list_rules"]


def list_rules(family: str | None = None, op: str | None = None) -> list[str]:
    """Return the names of the registered rules, in the order of registration.

    Args:
        family: Only those of a family, such as ``"surrogate"`` or ``"attribution"``, and of families whose names begin
            with it and an underscore. A rule of your own has the name of its module for its family.
        op: Only those that can serve an operation of this name, a group of operations, or with ``"params"`` parameters,
            without those that are meant for other operations.

    Raises:
        RuleError: There is no rule of that family.
        TableError: The operation is unknown.

    Example:
        >>> import freegrad_fx as fg
        >>> fg.list_rules(family="jamming")
        ['full_jam', 'positive_jam', 'rectangular_jam']
    """
    rules = [get(name) for name in available()]
    families = [rule.declaration.family for rule in rules]
    if family is not None and not any(_belongs(f, family) for f in families):
        raise RuleError(unknown("family of rules", family, families))
    if op is not None and op not in OP_NAMES:
        raise TableError(unknown("op or group", op, OP_NAMES, everything=ALL_OPS))
    return [
        rule.name
        for rule, found in zip(rules, families, strict=True)
        if (family is None or _belongs(found, family)) and (op is None or _serves(rule, op))
    ]


def _belongs(family: str, wanted: str) -> bool:
    return family == wanted or family.startswith(f"{wanted}_")


def _serves(rule: Rule, op: str) -> bool:
    if op == PARAMETERS:
        return "parameter" in rule.kinds
    if op == ALL:
        return True
    meant_for = rule.declaration.meant_for
    named = {op, *GROUPS.get(op, ())}
    return "operation" in rule.kinds and (not meant_for or not named.isdisjoint(meant_for))
