"""Finds the operations that a model computes by several calls."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from ..graph.provenance import origin
from .compound import Compound
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
    wanted_here = _COMPOUND & {*wanted}
    for node in graph.nodes:
        compound = gelu_at(node)
        if compound is None and wanted_here:
            compound = norm_at(node, root) or merged_at(node, root, wanted_here)
        if compound is None or origin(node).function:
            continue
        if not compound.op.on_demand or compound.op.name in wanted:
            found.setdefault(compound.parts[0], []).append(compound)
    return found
