"""Puts the hooks of a module into a graph: around a rule, or around the operations of the module."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator

from torch import fx

from ..ops.calls import call_with
from ..ops.functions import apply_forward
from ..ops.gradients import decoupled, kept, stop_gradient
from ..ops.hooked import (
    call_without_hooks,
    enter_call,
    forward_of,
    leave_call,
    run_hooks,
    run_pre_hooks,
)
from ..ops.joint import gathered, scattered
from .marks import inside, parts_of, unclear
from .nodes import called_path, first_argument

__all__ = ["open_call", "read_parameters_late", "run_hooks_at"]


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


def read_parameters_late(graph: fx.Graph, paths: Collection[str]) -> None:
    """Read the parameters of some modules, and apply their rules, where the results are first used.

    A graph does so at its beginning, when modules that gather their parameters in a pre-hook have not done it yet.

    Args:
        graph: The graph. It is changed in place.
        paths: The paths of the modules.
    """
    below = tuple(f"{path}." for path in paths)
    moved: dict[fx.Node, bool] = {}  # whether a node depends on a parameter of the modules
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            moved[node] = str(node.target).startswith(below)
        elif inputs and all(n in moved for n in inputs) and _is_of_rules(node):
            moved[node] = any(moved[n] for n in inputs)
    for node in reversed([node for node, depends in moved.items() if depends]):
        if node.users:
            first = next(n for n in _following(node) if n in node.users)
            first.prepend(node)


_OF_RULES = frozenset([stop_gradient, decoupled, kept, apply_forward, gathered, scattered])


def _is_of_rules(node: fx.Node) -> bool:
    """Whether a node, which depends only on parameters, belongs to their rules or their replaced forward."""
    if node.target in _OF_RULES or node.target is operator.getitem:
        return True
    return [n.target for n in node.all_input_nodes] == [stop_gradient]


def _following(node: fx.Node) -> Iterator[fx.Node]:
    while node.op != "output":
        node = node.next
        yield node
