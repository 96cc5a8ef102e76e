"""Puts the rules of the places at one operation around its node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import fx, nn

from ..graph.marks import fix_arguments, is_mark, same_value
from ..graph.nodes import operand_node, set_operand
from ..ops.checks import require_result, require_unwritten, write_count
from ..ops.gradients import written_back
from ..plan import Decided, Decision
from ..sites.site import OUTPUT, REPLACE, LocatedOperation
from .memory import Memory
from .operands import constants_at, given_operands, uses_at
from .surgery import Surgery

__all__ = ["Decisions", "at_operations", "operate"]

Decisions: TypeAlias = Mapping[str, Decision]
"""The decisions that act at one operation, by placement."""


def at_operations(decided: Decided) -> Sequence[tuple[LocatedOperation, Decisions]]:
    """The operations at which a decision acts, each with the decisions for the places at it.

    Args:
        decided: The sites of a graph with their decisions. Those of the places at an operation follow the operation.
    """
    found: list[tuple[LocatedOperation, dict[str, Decision]]] = []
    for place, decision in decided:
        if isinstance(place, LocatedOperation):
            if place.site.at == REPLACE:
                found.append((place, {}))
            if decision.acts:
                found[-1][1][place.site.at] = decision
    return [(place, decisions) for place, decisions in found if decisions]


def operate(
    graph: fx.Graph,
    root: nn.Module,
    place: LocatedOperation,
    decisions: Decisions,
    memory: Memory,
) -> None:
    """Rewrite one operation.

    With a rule that replaces its backward, the operation runs on `stop_gradient(x)`, and `decoupled` replaces every
    later use of its result, and every later use of `x` if the operation works in place. The rules at an operand and at
    the output are around identities on these edges. If the memory of `x` is read later through another node, such as a
    view, the operation runs on a copy instead, and the result is written back into `x`, so that autograd tracks the
    views. A rule that packs what the operation has saved only gets its result: `decoupled` follows the operation.
    """
    replaces = decisions.get(REPLACE)
    packs = replaces.rules[0] if replaces is not None and replaces.packs else None
    replaces = None if packs is not None else replaces
    forward = None if replaces is None else replaces.forward
    node, x = place.node, place.input

    def surgery_at(at: str) -> Surgery:
        ambient = at in decisions and decisions[at].action == "ambient"
        return Surgery(graph, root, place.site_at(at), node.meta, ambient)

    surgery = surgery_at(REPLACE)
    # Rules of the table and of `use` blocks act independently of each other, and each makes the copies that it needs
    copying = {d.action: surgery_at(at) for at, d in decisions.items()}.values()

    def keep(value: fx.Node) -> fx.Node:
        for one in copying:
            value = one.keep(value)
        return value

    first, *others = (replaces.rules if replaces else ()) or (None,)
    uses = uses_at(place, replaces)
    answers_first = uses is None or place.first.name in uses.answers
    call: dict[str, Any] = {}
    native: Any = False
    with graph.inserting_before(node):
        if memory.write_back and forward is not None:
            start = given = surgery.node(
                "call_method", "clone", (x,)
            )  # the new forward can save it
        else:
            start, given = keep(x) if memory.keep_x else x, x
        for at in (at for at in decisions if at not in (REPLACE, OUTPUT)):
            edge = surgery_at(at)
            operand = place.operand(at)
            if operand != place.first:
                value = operand_node(node, operand)
                assert value is not None  # a held one was put among the arguments
                copy = keep(value) if at in memory.keep_operands else value
                set_operand(node, operand, edge.edge(value, copy, decisions[at].rules))
                continue
            start = edge.edge(given if replaces is None else start, start, decisions[at].rules)
            given = start if replaces is None else given  # the operation can write into its memory
        if uses is not None and first is not None:
            copied = (o for o in place.arguments[1:] if o.name in memory.keep_operands)
            copies = {o.name: keep(n) for o in copied if (n := operand_node(node, o)) is not None}
            constants = constants_at(place, first, surgery)
            native = constants.get(first.declaration.native_if, False)
            call = given_operands(place, uses, surgery, copies, constants, native)
        if replaces is not None:
            source = surgery.chain(start, others)
            given = surgery.stop(given, native) if answers_first else given
        if memory.on_copy or (memory.write_back and forward is None):
            given = keep(given)
        operation = node
        if forward is not None and replaces is not None:
            operation = surgery.forward(given, replaces)
        if memory.watched:
            writes = surgery.node("call_function", write_count, (given,))
    if forward is not None:
        node.replace_all_uses_with(operation)
        graph.erase_node(node)
    else:
        set_operand(node, place.first, given)
    users = set(operation.users)
    result = operation
    with graph.inserting_before(operation.next):
        if memory.watched:
            name = place.site.name
            surgery.node("call_function", require_unwritten, (given, writes, name))
        if replaces is not None:
            result = surgery.decoupled(operation, source, start, first, memory.save, call)
        if packs is not None:
            result = surgery.decoupled(operation, given, given, packs, call={"native": True})
        if OUTPUT in decisions:
            at_output = surgery_at(OUTPUT)
            if place.op is None and "example_value" not in node.meta:  # a class can return anything
                name = at_output.site.name
                at_output.node("call_function", require_result, (result, name))
            result = at_output.edge(result, result, decisions[OUTPUT].rules)
        result = keep(result) if memory.keep_y else result
        if memory.write_back and forward is not None:
            result = surgery.node("call_method", "copy_", (x, result))
        elif memory.write_back:
            # writes only where a rule acts: without one, the operation has changed `x` itself
            for one in copying:
                result = one.node("call_function", written_back, (x, result), one.ambient)
    operation.replace_all_uses_with(result, delete_user_cb=users.__contains__)
    if place.inplace and not memory.write_back:
        for same in same_value(x):
            later = {user for user in same.users if user > result}
            if same is not x and not all(map(is_mark, later)):
                fix_arguments(x)
            same.replace_all_uses_with(result, delete_user_cb=later.__contains__)
