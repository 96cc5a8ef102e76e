"""The calls that belong to an operation of several calls: a rule of that operation acts instead of theirs."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..sites.site import REPLACE, LocatedOperation
from .decision import Decided, Decision

__all__ = ["as_part", "without_parts"]


def without_parts(decided: Decided) -> Decided:
    """The decisions for one graph, in which the parts of an operation get no rule if its backward is replaced.

    Args:
        decided: The sites of the graph with their decisions.
    """
    whole: dict[fx.Node, str] = {
        part: place.site.name
        for place, decision in decided
        if isinstance(place, LocatedOperation) and place.compound is not None
        if place.site.at == REPLACE and decision.acts
        for part in place.compound.parts
    }
    if not whole:
        return decided
    return [
        (place, as_part(decision, whole[place.node]))
        if isinstance(place, LocatedOperation)
        and place.compound is None
        and place.node in whole
        and decision.action != "native"
        else (place, decision)
        for place, decision in decided
    ]


def as_part(decision: Decision, whole: str) -> Decision:
    """The decision for a part of an operation, to whose site a rule is given.

    Args:
        decision: The decision of the table.
        whole: The name of the site of the operation.
    """
    reason = f"it is a part of {whole}, whose rule replaces the backward of all parts"
    return replace(decision, action="native", rules=(), forward=None, reason=reason, remark="")
