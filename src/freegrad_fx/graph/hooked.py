"""Puts the hooks of a module into a graph: around a rule, or around the operations of the module."""

from __future__ import annotations

import operator

from torch import fx

from ..ops.calls import call_with
from ..ops.hooked import (
    call_without_hooks,
    enter_call,
    forward_of,
    leave_call,
    run_hooks,
    run_pre_hooks,
)
from .marks import inside, parts_of, unclear
from .nodes import called_path, first_argument

__all__ = ["open_call", "run_hooks_at"]


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


def run_hooks_at(begin: fx.Node, end: fx.Node) -> None:
    """Run the hooks of a module where its call begins and ends, instead of within nodes that call it.

    Args:
        begin: The mark at the beginning of the call. It is replaced.
        end: The mark at the end of the call. It is replaced.
    """
    graph, path = begin.graph, str(begin.args[0])
    with graph.inserting_before(begin):
        module = graph.create_node("get_attr", path)
        entered = graph.call_function(enter_call, (module, *begin.args[1:3], unclear(begin)))
        _take_values(entered, begin)
    for node in list(inside(begin, end)):
        if (node.op == "call_module" or node.target is call_with) and called_path(node) == path:
            first = first_argument(node)
            given = (module, node.args[1] if first else {}, *node.args[first:])
            with graph.inserting_before(node):
                call = graph.call_function(forward_of, given, dict(node.kwargs))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
    with graph.inserting_before(end):
        result, args, kwargs = end.args[1:]
        left = graph.call_function(
            leave_call, (module, entered, result, args, kwargs, unclear(end))
        )
        _take_values(left, end)
    graph.erase_node(end)
    graph.erase_node(begin)


def _take_values(values: fx.Node, mark: fx.Node) -> None:
    """Read the values of a call from the tuple that a node returns, in place of the parts of a mark."""
    for index, node in parts_of(mark).items():
        value = values.graph.call_function(operator.getitem, (values, index))
        node.replace_all_uses_with(value)
        values.graph.erase_node(node)
