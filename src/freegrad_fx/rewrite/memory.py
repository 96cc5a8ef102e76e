"""What a site needs because operations work in place or share memory: copies, and a write into its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from ..backward.functions import OVERWRITTEN
from ..core.contract import SAVES
from ..core.rule import Rule
from ..graph.aliasing import Aliasing
from ..graph.nodes import operand_node
from ..plan import Decision
from ..sites.site import OUTPUT, REPLACE, LocatedOperation
from .operands import uses_at

__all__ = ["Memory", "memory_at"]


@dataclass(frozen=True)
class Memory:
    """What a site needs because of in-place operations and shared memory.

    Attributes:
        keep_x: Whether a rule needs a copy of `x`, because `x` is overwritten before the backward.
        write_back: Whether the result has to be written into the memory of `x`, because that memory is read later
            through another node.
        on_copy: Whether the operation has to run on a copy of `x`, because it may return `x` itself and its result is
            written into later.
        save: The `save` option for `decoupled`; ``""`` for the rule's own.
        watched: Whether the operation is code of the user that could write into `x` without saying so.
        keep_operands: The other operands of which rules need a copy, because they are overwritten before the backward.
        keep_y: Whether rules that read the output need a copy, because it is overwritten before the backward.
    """

    keep_x: bool
    write_back: bool
    on_copy: bool
    save: str
    watched: bool
    keep_operands: frozenset[str]
    keep_y: bool


def memory_at(
    place: LocatedOperation, decisions: Mapping[str, Decision], aliasing: Aliasing
) -> Memory:
    """What a site needs because of in-place operations and shared memory.

    A rule that reads only where `x` is positive can read the output of some operations instead, for example of ReLU.
    The next layer usually saves the output anyway. If the operation works in place, `x` already holds the output when
    it is saved. Module calls are excluded, because forward hooks can replace the output.

    Args:
        place: The operation.
        decisions: The decisions that act at it, by placement.
        aliasing: The memory that the nodes of the graph share.
    """
    decisions = {at: d for at, d in decisions.items() if not d.packs}
    if not decisions:  # the operation stays as it is
        return Memory(False, False, False, "", False, frozenset(), False)
    x, node = place.input, place.node
    replaces, output = decisions.get(REPLACE), decisions.get(OUTPUT)
    at_x = [d for at, d in decisions.items() if at == place.first.name]
    first, *others = (replaces.rules if replaces else ()) or (None,)
    forward = None if replaces is None else replaces.forward
    overwrites = place.inplace and forward is None
    write_back = place.inplace and aliasing.read_elsewhere_after(x, node)
    ambient = replaces is not None and first is None
    others_read_x = ambient or any(d.reads("x") for d in at_x)
    others_read_x = others_read_x or any("x" in rule.inputs for rule in others)
    save = ""
    if _reads_where_positive(first, place) and forward is None:
        if overwrites:
            save = "" if write_back or others_read_x else OVERWRITTEN
        elif node.op != "call_module" and not aliasing.written_after(node, node):
            save = "y"
    uses = uses_at(place, replaces)
    read = frozenset({"x"} & {*first.inputs} if first else ()) if uses is None else uses.reads
    reads_first = "x" in read if uses is None else place.first.name in read
    needs_x = others_read_x or (reads_first and save != "y")
    overwritten = write_back or (overwrites and save != OVERWRITTEN)
    lost = overwritten or aliasing.written_after(x, node)
    may_return_x = place.op is None or place.op.may_return_x
    on_copy = may_return_x and aliasing.written_after(node, node, certainly=True)
    watched = (replaces is not None or bool(at_x)) and forward is None and _is_watched(place)
    reads_y = output is not None and (output.reads("x") or output.reads("y"))
    if replaces is not None:
        reads_y = reads_y or replaces.reads("y")  # also where the rule comes from a block
        reads_y = reads_y or any(rule.declaration.reads_output for rule in replaces.rules)
    keep_y = reads_y and aliasing.written_after(node, node)
    elsewhere = {at for at in decisions if at not in (REPLACE, OUTPUT, place.first.name)}
    elsewhere |= {o.name for o in place.arguments[1:] if uses is not None and o.name in read}
    overwritten_too = frozenset(
        at
        for at in elsewhere
        if (decisions[at].reads("x") if at in decisions else at in read)
        and (place.inplace or aliasing.written_after(_operand(place, at), node))
    )
    return Memory(needs_x and lost, write_back, on_copy, save, watched, overwritten_too, keep_y)


def _operand(place: LocatedOperation, at: str) -> fx.Node:
    value = operand_node(place.node, place.operand(at))
    assert value is not None
    return value


def _reads_where_positive(rule: Rule | None, place: LocatedOperation) -> bool:
    """Whether a rule reads only where `x` is positive, and the output is positive exactly where `x` is."""
    usual = rule is not None and rule.declaration.reads_sign and rule.save == SAVES[0]
    return usual and place.op is not None and place.op.keeps_positive


def _is_watched(place: LocatedOperation) -> bool:
    called = place.called
    if called is None or called.__module__.startswith("torch."):
        return False
    return place.op is None and not place.inplace
