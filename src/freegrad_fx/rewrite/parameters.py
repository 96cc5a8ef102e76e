"""Inserts the rules for parameters: for each by itself, or for several together."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from ..core.contract import OVER
from ..core.rule import Rule
from ..ops.joint import gathered, scattered
from ..plan import Decision
from ..plan.groups import acts_together, groups
from ..sites.site import LocatedParameter
from .surgery import Surgery

__all__ = ["Wanted", "decouple"]

Wanted = tuple[LocatedParameter, Decision, bool]
"""A parameter, its decision, and whether the graph writes into it."""


@dataclass
class _Part:
    """A parameter while its rules are inserted.

    Attributes:
        surgery: Inserts nodes for its site.
        path: The path of the module that holds it.
        parameter: The node that reads it.
        before: The nodes that read it before.
        start: What the rules read.
        value: What the model computes with.
        source: What the next rule gives a gradient.
    """

    surgery: Surgery
    path: str
    parameter: fx.Node
    before: set[fx.Node]
    start: fx.Node
    value: fx.Node
    source: fx.Node


def decouple(
    graph: fx.Graph, root: nn.Module, wanted: Sequence[Wanted]
) -> list[tuple[fx.Node, set[fx.Node]]]:
    """Insert the rules for parameters.

    Args:
        graph: The graph; it is changed in place, at its insertion point.
        root: The module whose parameters the graph uses.
        wanted: The parameters.

    Returns:
        For each, the node to use instead of it, and the inserted nodes that read the parameter itself.
    """
    parts = [_begun(graph, root, *each) for each in wanted]
    entries: dict[int | None, list[_Part]] = {}
    rules: dict[int | None, tuple[Rule, ...]] = {}
    for part, (_, decision, _) in zip(parts, wanted, strict=True):
        if acts_together(decision.rules):
            entries.setdefault(decision.entry, []).append(part)
            rules[decision.entry] = decision.rules
        else:
            _apply([part], decision.rules or (None,))
    for entry, together in entries.items():
        _apply(together, rules[entry])
    return [(part.source, set(part.parameter.users) - part.before) for part in parts]


def _begun(
    graph: fx.Graph, root: nn.Module, place: LocatedParameter, decision: Decision, written: bool
) -> _Part:
    surgery = Surgery(graph, root, place.site, {}, decision.action == "ambient")
    parameter = surgery.read(place)
    before = set(parameter.users)
    # A rule reads the value that the parameter has at the beginning of the forward
    copied = written and decision.reads("x")
    start = surgery.keep(parameter) if copied else parameter
    value = surgery.stop(parameter)
    if decision.forward is not None:
        value = surgery.forward(value, decision)
    return _Part(surgery, place.site.path, parameter, before, start, value, start)


def _apply(parts: Sequence[_Part], rules: Sequence[Rule | None]) -> None:
    """Insert the rules of an entry. The last rule is nearest to the parameters; the first is around the values."""
    for number, rule in reversed([*enumerate(rules)]):
        values = [p.value if number == 0 else p.surgery.stop(p.source) for p in parts]
        for group in groups([p.path for p in parts], OVER[0] if rule is None else rule.over):
            if len(group) > 1:
                _join([parts[i] for i in group], [values[i] for i in group], rule)
                continue
            (index,) = group
            part = parts[index]
            part.source = part.surgery.decoupled(values[index], part.source, part.start, rule)


def _join(group: Sequence[_Part], values: Sequence[fx.Node], rule: Rule | None) -> None:
    """Insert one rule for several parameters, named by the first of them."""
    surgery = group[0].surgery
    flat = surgery.node("call_function", gathered, tuple(part.source for part in group))
    flat = surgery.decoupled(surgery.stop(flat), flat, flat, rule)
    sites = {"sites": tuple(part.surgery.site.name for part in group)}
    both = surgery.node("call_function", scattered, (flat, *values), sites)
    for index, part in enumerate(group):
        part.source = part.surgery.node("call_function", operator.getitem, (both, index))
