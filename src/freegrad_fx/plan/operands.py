"""Checks the rules that use operands of an operation besides the first one."""

from __future__ import annotations

from ..core.contract import INPUTS
from ..core.rule import Rule
from ..errors import PlanError
from ..sites.site import Located, LocatedOperation
from ..table import Entry
from ..vocabulary.operands import NOT_COMPUTED, operation_of

__all__ = ["check_operands", "native_at"]


def check_operands(place: Located, entry: Entry, rule: Rule, where: str) -> None:
    """Raise `PlanError` if a rule that uses operands of an operation cannot act at a site.

    Args:
        place: The site.
        entry: The entry that gives it the rule.
        rule: The rule.
        where: The site, as text.
    """
    declaration, op = rule.declaration, place.op
    needed = declaration.needs_operation
    if op is None:
        raise PlanError(
            f"rule {rule.name!r} needs {needed} of an operation of the vocabulary, which {where} is not. Give it to "
            f"the operation inside, such as on('linear'), with module= or type= to narrow it."
        )
    names = [n for n in (*declaration.inputs, *declaration.answers) if n not in INPUTS]
    missing = [name for name in names if name not in op.operands]
    if missing:
        raise PlanError(
            f"rule {rule.name!r} needs the operand {missing[0]!r}, which {op.name} does not have, at {where}. Its "
            f"operands: {', '.join(op.operands)}. Give the rule to an operation with this operand."
        )
    merged = isinstance(place, LocatedOperation) and place.compound and place.compound.merged
    others = [name for name in declaration.answers if name not in ("x", op.operands[0])]
    if merged and others:
        raise PlanError(
            f"rule {rule.name!r} gives a gradient to the operand {others[0]!r}, which {op.name} computes from the "
            f"parameters of two layers, at {where}. Give the rule to {op.name.removesuffix('_bn')!r}."
        )
    if len(entry.rules or ()) > 1 or entry.forward is not None:
        what = "a composition" if entry.forward is None else "an entry with forward="
        raise PlanError(
            f"rule {rule.name!r} uses the operands of an operation, so {what} cannot contain it, at {where}. Give the "
            f"other rules to the edges of the operation, in entries with at='output' or at={op.operands[0]!r}."
        )
    if declaration.packs is not None:
        if isinstance(place, LocatedOperation) and place.compound is not None:
            raise PlanError(
                f"rule {rule.name!r} packs what one call has saved, and {op.name} is computed by several calls, at "
                f"{where}. Give it None in an entry before {entry.selector!r}."
            )
        return
    if not declaration.operation:
        return
    known = operation_of(op.name) is not None
    if not known or (isinstance(place, LocatedOperation) and place.constants() is None):
        reason = f": {NOT_COMPUTED[op.name]}" if op.name in NOT_COMPUTED else ""
        raise PlanError(
            f"rule {rule.name!r} computes the operation at other operands, which is not possible for this call of "
            f"{op.name}{reason}; at {where}. Give it None in an entry before {entry.selector!r}, or a rule without `f`."
        )


def native_at(place: Located, rule: Rule) -> str:
    """The reason why a rule does nothing at any call of a site; ``""`` if it does.

    A rule with `again` is at work in calls that keep their native backward, too.

    Args:
        place: The site.
        rule: The rule.
    """
    argument = rule.declaration.native_if
    if not argument or rule.declaration.again or not isinstance(place, LocatedOperation):
        return ""
    always = (place.constants() or {}).get(argument) is True
    return f"rule {rule.name!r} leaves calls with {argument}=True native" if always else ""
