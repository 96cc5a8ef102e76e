"""The operands and the further arguments of a call, for rules that use more than the first operand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from ..core.declaration import Uses
from ..core.rule import Rule
from ..graph.nodes import called_path, operand_node, set_operand
from ..plan import Decision
from ..sites.site import LocatedOperation
from ..vocabulary.calls import Held
from .surgery import Surgery

__all__ = ["constants_at", "given_operands", "uses_at"]


def uses_at(place: LocatedOperation, decision: Decision | None) -> Uses | None:
    """What the rule that replaces the backward uses of a call; None if only the first operand and the output."""
    if decision is None or place.op is None or not decision.uses_operands:
        return None
    return decision.rules[0].declaration.uses((place.first.name, *place.operands))


def constants_at(place: LocatedOperation, rule: Rule, surgery: Surgery) -> dict[str, Any]:
    """The arguments of a call that are no operands, for a rule that uses them.

    Args:
        place: The call.
        rule: The rule.
        surgery: Inserts nodes before the call, which read what the called module holds.
    """
    found = (place.constants() or {}) if rule.declaration.operation else {}

    def read(value: Any) -> Any:
        if not isinstance(value, Held):
            return value
        return surgery.node("get_attr", f"{called_path(place.node)}.{value.name}")

    return {name: read(value) for name, value in found.items()}


def given_operands(
    place: LocatedOperation,
    uses: Uses,
    surgery: Surgery,
    copies: Mapping[str, fx.Node],
    constants: Mapping[str, Any],
    native: Any = False,
) -> dict[str, Any]:
    """The arguments of `decoupled` that describe a call. The operands that the rule answers for are detached in it.

    Args:
        place: The call.
        uses: What the rule uses of it.
        surgery: Inserts nodes before the call.
        copies: Copies of the operands that are overwritten later.
        constants: The arguments that are no operands.
        native: Where the call keeps its native backward: True, or a node.
    """
    assert place.op is not None
    node = place.node
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
            set_operand(node, operand, surgery.stop(value, native))
    described = {"operation": place.op.name, "operands": {**given, **constants}}
    return {**described, **({"native": native} if native else {})}
