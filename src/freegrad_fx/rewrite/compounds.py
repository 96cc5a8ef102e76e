"""Puts rules around an operation that a model computes by several calls, which all stay in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ..graph.aliasing import Aliasing
from ..plan import Decision
from ..sites.site import OUTPUT, REPLACE, LocatedOperation
from .operands import constants_at, uses_at
from .surgery import Surgery

__all__ = ["copies_at", "operate_compound"]


def copies_at(
    place: LocatedOperation, decisions: Mapping[str, Decision], aliasing: Aliasing
) -> frozenset[str]:
    """The operands, or the output, of which rules need a copy, because they are overwritten before the backward.

    Args:
        place: The operation.
        decisions: The decisions that act at it, by placement.
        aliasing: The memory that the nodes of the graph share.
    """
    compound = place.compound
    assert compound is not None
    found = set()
    for name in compound.reads:
        read = (name in decisions and decisions[name].reads("x")) or _reads(place, decisions, name)
        if read and aliasing.written_after(compound.operand(name), compound.parts[0]):
            found.add(name)
    output, replaces = decisions.get(OUTPUT), decisions.get(REPLACE)
    reads = output is not None and (output.reads("x") or output.reads("y"))
    if replaces is not None:
        reads = reads or replaces.reads("y")
        reads = reads or any(rule.declaration.reads_output for rule in replaces.rules)
    if reads:
        found |= {OUTPUT} if aliasing.written_after(place.node, place.node) else set()
    return frozenset(found)


def _reads(place: LocatedOperation, decisions: Mapping[str, Decision], name: str) -> bool:
    """Whether the rules that replace the backward read an operand."""
    decision = decisions.get(REPLACE)
    if decision is None:
        return False
    uses = uses_at(place, decision)
    if uses is not None:
        return name in uses.reads
    return name == place.first.name and decision.reads("x")


def operate_compound(
    graph: fx.Graph,
    root: nn.Module,
    place: LocatedOperation,
    decisions: Mapping[str, Decision],
    copies: frozenset[str],
) -> None:
    """Rewrite one operation of several calls.

    With a rule that replaces its backward, the calls read ``stop_gradient(x)``, and `decoupled` replaces every use of
    the result. The rules at an operand and at the output are around identities on these edges.

    Args:
        graph: The graph; it is changed in place.
        root: The module whose submodules the graph calls.
        place: The operation.
        decisions: The decisions that act at it, by placement.
        copies: See `copies_at`.
    """
    compound, node = place.compound, place.node
    assert compound is not None

    def surgery_at(at: str) -> Surgery:
        ambient = at in decisions and decisions[at].action == "ambient"
        return Surgery(graph, root, place.edge(at).site, node.meta, ambient)

    surgery, replaces = surgery_at(REPLACE), decisions.get(REPLACE)
    first, *others = (replaces.rules if replaces is not None else ()) or (None,)
    uses = uses_at(place, replaces)
    answers = {place.first.name} if uses is None else uses.answers
    start: dict[str, fx.Node] = {}
    given = place.input
    for name in compound.reads:
        value, readers = compound.operand(name), compound.readers(name)
        with graph.inserting_before(readers[0]):
            start[name] = given = value
            if name in copies:
                start[name] = surgery_at(name if name in decisions else REPLACE).keep(value)
            if name in decisions:
                edge = surgery_at(name)
                start[name] = given = edge.edge(value, start[name], decisions[name].rules)
            if replaces is not None and name in answers:
                given = surgery.stop(given)
        for reader in readers:
            reader.replace_input_with(value, given)
    users = set(node.users)
    with graph.inserting_before(node.next):
        result = node
        if replaces is not None:
            if replaces.forward is not None:
                result = surgery.forward(given, replaces)
            x = start[place.first.name]
            call: dict[str, Any] = {}
            if uses is not None and first is not None:
                others_of_op = (n for n in compound.op.operands if n != place.first.name)
                operands = {n: start.get(n, compound.computed.get(n)) for n in others_of_op}
                constants = constants_at(place, first, surgery)
                call = {"operation": compound.op.name, "operands": {**operands, **constants}}
            result = surgery.decoupled(result, surgery.chain(x, others), x, first, call=call)
        if OUTPUT in decisions:
            result = surgery_at(OUTPUT).edge(result, result, decisions[OUTPUT].rules)
        if OUTPUT in copies:
            result = surgery_at(OUTPUT if OUTPUT in decisions else REPLACE).keep(result)
    node.replace_all_uses_with(result, delete_user_cb=users.__contains__)
    for part in reversed(compound.parts):
        if replaces is not None and replaces.forward is not None and not part.users:
            graph.erase_node(part)
