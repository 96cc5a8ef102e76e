"""The calls that belong to an operation of several calls: a rule of that operation acts instead of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeGuard

from torch import fx

from ..sites.site import REPLACE, Located, LocatedOperation
from .decision import Decided, Decision

__all__ = ["as_part", "is_part", "wholes_of", "without_parts"]


def wholes_of(decided: Decided) -> dict[fx.Node, str]:
    """The calls that are parts of an operation whose backward is replaced, each with the name of its site.

    Args:
        decided: The sites of a graph with their decisions.
    """
    return {
        part: place.site.name
        for place, decision in decided
        if isinstance(place, LocatedOperation) and place.compound is not None
        if place.site.at == REPLACE and decision.acts
        for part in place.compound.parts
    }


def without_parts(decided: Decided) -> Decided:
    """The decisions for one graph, in which the parts of an operation get no rule if its backward is replaced.

    Args:
        decided: The sites of the graph with their decisions.
    """
    wholes = wholes_of(decided)
    return [(p, as_part(d, wholes[p.node]) if is_part(p, d, wholes) else d) for p, d in decided]


def is_part(
    place: Located, decision: Decision, wholes: Mapping[fx.Node, str]
) -> TypeGuard[LocatedOperation]:
    """Whether a decision gives a rule to a call that is a part of an operation whose backward is replaced.

    Args:
        place: The call.
        decision: The decision.
        wholes: See `wholes_of`.
    """
    if not isinstance(place, LocatedOperation) or place.compound is not None:
        return False
    return place.node in wholes and decision.action != "native"


def as_part(decision: Decision, whole: str) -> Decision:
    """The decision for a part of an operation, to whose site a rule is given.

    Args:
        decision: The decision of the table.
        whole: The name of the site of the operation.
    """
    reason = f"it is a part of {whole}, whose rule replaces the backward of all parts"
    return replace(decision, action="native", rules=(), forward=None, reason=reason, remark="")
