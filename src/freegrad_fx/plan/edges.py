"""Checks the rules at the output and the operands of an operation, where they act around an identity."""

from __future__ import annotations

from ..errors import PlanError
from ..sites.outputs import returns_several
from ..sites.site import OUTPUT, Located, LocatedOperation
from ..table import Entry

__all__ = ["check_edge"]


def check_edge(place: Located, entry: Entry) -> None:
    """Raise `PlanError` if a rule of an entry cannot act at a place at an operation."""
    site = place.site
    where = f"site {site.name} ({site.spelling})"
    for rule in entry.rules or ():
        if "y" in rule.inputs and site.at != OUTPUT:
            raise PlanError(
                f"rule {rule.name!r} needs the output y of an operation, and an operand has none; at {where}. Leave "
                f"out at={site.at!r}, so that the rule replaces the backward, or choose a rule that does not read y."
            )
        if needed := rule.declaration.needs_operation:
            raise PlanError(
                f"rule {rule.name!r} needs {needed}, and at {site.at!r} it acts around an identity; at {where}. Leave "
                f"out at={site.at!r}, so that the rule replaces the backward."
            )
        if rule.declaration.of_op:
            raise PlanError(
                f"rule {rule.name!r} depends on the operation whose backward it replaces, and at {site.at!r} it "
                f"replaces none; at {where}. Leave out at={site.at!r}."
            )
        if {"x", "y"} <= {*rule.inputs}:
            raise PlanError(
                f"rule {rule.name!r} reads the input x and the output y of an operation, which are one tensor at its "
                f"output; at {where}. Leave out at={site.at!r}, so that the rule replaces the backward."
            )
    module = place.module if isinstance(place, LocatedOperation) and place.op is None else None
    if site.at == OUTPUT and module is not None and returns_several(module):
        raise PlanError(
            f"entry {entry.selector!r} gives a rule to the output of {type(module).__name__}, which returns a tuple. A "
            f"rule needs one tensor; at {where}. Give the rule to the modules inside of it."
        )
