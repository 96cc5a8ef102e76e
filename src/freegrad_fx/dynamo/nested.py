"""Nested graphs, and the operators that run them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from .._torch.operators import GraphOperator, operator_name

__all__ = ["OPEN", "all_bodies", "graph_operator", "nodes_in_order"]


# These run their graph once, at their place in the outer graph.
OPEN = frozenset(
    {
        "tag_activation_checkpoint",
        "wrap",
        "wrap_activation_checkpoint",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    }
)


def nodes_in_order(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """The nodes of a graph and of its nested graphs that are run once, in the order in which the nodes run."""
    for node in gm.graph.nodes:
        if graph_operator(node) in OPEN:
            yield from (pair for body in _bodies(node, gm)[:1] for pair in nodes_in_order(body))
        yield node, gm


def graph_operator(node: fx.Node) -> str:
    """The name of the operator that a node calls, if the operator runs nested graphs; else ``""``."""
    return operator_name(node.target) if isinstance(node.target, GraphOperator) else ""


def _bodies(node: fx.Node, gm: fx.GraphModule) -> list[fx.GraphModule]:
    named = [a.target for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    found = [getattr(gm, str(name), None) for name in named]
    return [body for body in found if isinstance(body, fx.GraphModule)]


def all_bodies(node: fx.Node, gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The nested graphs that an operator runs, at all levels."""
    for body in _bodies(node, gm):
        yield body
        for inner in body.graph.nodes:
            if graph_operator(inner):
                yield from all_bodies(inner, body)
