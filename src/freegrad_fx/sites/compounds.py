"""Finds the operations that a model computes by several calls."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import fx, nn

from ..graph.aliasing import Aliasing, may_write
from ..graph.provenance import origin
from .compound import Compound, changes_grad_mode, is_cast, nodes_between
from .gelus import gelu_at
from .merged import MERGED, merged_at
from .norms import norm_at

__all__ = ["NORMS", "find_compounds"]

NORMS = frozenset({"layer_norm", "rms_norm"})
"""The norms that models compute in separate operations."""

_COMPOUND = NORMS | {*MERGED.values()}


def find_compounds(
    graph: fx.Graph, root: nn.Module, wanted: Collection[str] = ()
) -> dict[fx.Node, list[Compound]]:
    """List the operations that a graph computes by several calls, by the first of these calls.

    Args:
        graph: A captured graph.
        root: The module whose submodules the graph calls.
        wanted: The ops that are sites only for tables that name them, and that the table names.
    """
    found: dict[fx.Node, list[Compound]] = {}
    aliasing: Aliasing | None = None
    wanted_here = _COMPOUND & {*wanted}
    for node in graph.nodes:
        compound = gelu_at(node)
        if compound is None and wanted_here:
            compound = norm_at(node, root) or merged_at(node, root, wanted_here)
        if compound is None or origin(node).function:
            continue
        if compound.op.on_demand and compound.op.name not in wanted:
            continue
        if compound.merged is None and not _is_of_one_module(compound):
            continue
        inside = nodes_between(compound.parts[0], _last_reader(compound))
        if any(may_write(n, root) for n in inside if n not in compound.parts):
            # Rarely needed, and slow: it looks at the whole graph
            aliasing = aliasing or Aliasing(graph, root)
            compound = _if_not_written(compound, aliasing)
        found.setdefault(compound.parts[0], []).append(compound)
    return found


def _is_of_one_module(compound: Compound) -> bool:
    """Whether the forward of one module makes all calls, in one grad mode.

    Where the call of a module begins or ends, hooks can run, also such as are registered later.
    """
    owners = {origin(part).owner for part in compound.parts}
    return len(owners) == 1 and not changes_grad_mode(compound.parts[0], compound.node)


def _last_reader(compound: Compound) -> fx.Node:
    """The last part that reads the first operand, directly or converted."""
    values, last = {compound.operand("x")}, compound.parts[0]
    for part in compound.parts:
        if not values.isdisjoint(part.all_input_nodes):
            last = part
            if is_cast(part):  # it can return the same tensor
                values.add(part)
    return last


def _if_not_written(compound: Compound, aliasing: Aliasing) -> Compound:
    """The operation, with an obstacle if its input has other values for its later parts than for the first."""
    x = compound.operand("x")
    if compound.obstacle or not aliasing.written_between(
        x, compound.parts[0], _last_reader(compound)
    ):
        return compound
    reason = (
        "its input is written into between the calls that read it, so that they are no operation of one input. Write "
        "into a copy, or give the rule to the operations that it consists of"
    )
    return replace(compound, obstacle=reason)
