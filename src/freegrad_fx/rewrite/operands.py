"""The operands and the further arguments of a call, for rules that use more than the first operand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from ..core.declaration import Uses
from ..core.rule import Rule
from ..graph.nodes import operand_node, set_operand
from ..sites.site import LocatedOperation
from .surgery import Surgery

__all__ = ["given_operands", "uses_at"]


def uses_at(place: LocatedOperation, rule: Rule | None) -> Uses | None:
    """What a rule that replaces the backward uses of a call; None if only the first operand and the output."""
    if rule is None or place.op is None:
        return None
    return rule.declaration.uses((place.first.name, *place.operands))


def given_operands(
    place: LocatedOperation,
    uses: Uses,
    rule: Rule,
    surgery: Surgery,
    copies: Mapping[str, fx.Node],
) -> dict[str, Any]:
    """The arguments of `decoupled` that describe a call. The operands that the rule answers for are detached in it.

    Args:
        place: The call.
        uses: What the rule uses of it.
        rule: The rule.
        surgery: Inserts nodes before the call.
        copies: Copies of the operands that are overwritten later.
    """
    assert place.op is not None
    node = place.node
    constants = place.constants() if rule.declaration.operation else {}
    given: dict[str, Any] = dict.fromkeys(place.op.operands)
    del given[place.first.name]
    for operand in place.arguments:
        value = operand_node(node, operand)
        if operand == place.first or operand.name not in uses.takes or value is None:
            continue
        kept = copies.get(operand.name, value)
        if operand.transposed:
            kept = surgery.node("call_method", "transpose", (kept, -2, -1))
        given[operand.name] = kept
        if operand.name in uses.answers:
            set_operand(node, operand, surgery.stop(value))
    return {"operation": place.op.name, "operands": {**given, **(constants or {})}}
