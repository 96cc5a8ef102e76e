"""Opens the call of a module with forward hooks, so that a rule can be put around its forward alone."""

from __future__ import annotations

import operator

from torch import fx

from ..ops.hooked import call_without_hooks, run_hooks, run_pre_hooks
from .nodes import called_path, first_argument

__all__ = ["open_call"]


def open_call(node: fx.Node, key: int | str) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Replace the call of a module by calls of its pre-hooks, its forward and its hooks; see `ops.hooked`.

    Args:
        node: The call, directly or through `call_with`. It is erased.
        key: The position or keyword of the activated tensor in the node.

    Returns:
        The nodes that call the pre-hooks, the forward and the hooks. The activated tensor is the argument 2 of the
        second.
    """
    graph, first = node.graph, first_argument(node)
    parameters = node.args[1] if first else {}
    place = key - first if isinstance(key, int) else key
    with graph.inserting_before(node):
        module = graph.create_node("get_attr", called_path(node))
        given = graph.call_function(
            run_pre_hooks, (module, parameters, place, *node.args[first:]), dict(node.kwargs)
        )
        x = graph.call_function(operator.getitem, (given, 0))
        y = graph.call_function(call_without_hooks, (module, parameters, x, given))
        result = graph.call_function(run_hooks, (module, parameters, y, given))
    for part in (module, given, x, y, result):
        part.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return given, y, result
