"""Marks: where the calls of modules begin and end in a graph that has opened them.

A graph that was traced into a module no longer has its call. For hooks, the call has to be known: its arguments, its
result, and what reads the result. While a graph is traced and rewritten, marks are nodes:

    begin  = begins("layer", (x,), {})
    x_     = part(begin, 0)            # what the operations of the layer read as x
    ...
    end    = ends(begin, y, (x_,), {})
    y_     = part(end, 0)              # what the operations after the layer read as its result

`take_marks` replaces each part by the value that it stands for, removes the nodes, and returns plain data from which
`insert_marks` makes the same nodes again. A finished graph contains no marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..ops.hooked import values_in
from .nodes import called_path, first_argument, new_node
from .serialise import dump_value, load_value

__all__ = [
    "Mark",
    "Marks",
    "begins",
    "calls",
    "ends",
    "fix_arguments",
    "insert_marks",
    "inside",
    "is_mark",
    "is_part",
    "mark_call",
    "part",
    "parts_of",
    "same_value",
    "settle",
    "take_marks",
    "unclear",
]


def begins(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], /, *fixed: int) -> Any:
    """Stands where the call of a module begins. It is never run."""
    raise NotImplementedError


def ends(begin: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
    """Stands where the call of a module ends. It is never run."""
    raise NotImplementedError


def part(mark: Any, index: int, /) -> Any:
    """Stands for one value among the arguments or in the result of a call. It is never run."""
    raise NotImplementedError


_TARGETS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (begins, ends, part)}


@dataclass(frozen=True)
class Mark:
    """A mark as plain data.

    Attributes:
        target: The name of the function of this module.
        name: The name of the node.
        anchor: The name of the first node after it that is no mark.
        args: The arguments of the node, by names.
        uses: For a part, the nodes that read it: the name of each, and the position among the values in its arguments.
    """

    target: str
    name: str
    anchor: str
    args: tuple[Any, ...]
    uses: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Marks:
    """The marks of a graph, in its order.

    Attributes:
        marks: The marks.
        nodes: The names of all nodes of the graph. The marks hold as long as the graph has these nodes.
        unmarked: The paths of modules that the graph has opened without marks at some of their calls.
    """

    marks: tuple[Mark, ...] = ()
    nodes: tuple[str, ...] = ()
    unmarked: frozenset[str] = frozenset()

    @property
    def paths(self) -> frozenset[str]:
        """The paths of the modules whose calls are marked."""
        return frozenset(mark.args[0] for mark in self.marks if mark.target == begins.__name__)


def is_mark(node: fx.Node) -> bool:
    """Whether a node is a mark."""
    return node.op == "call_function" and node.target in (begins, ends, part)


def is_part(node: Any) -> bool:
    """Whether a value is a node that stands for a value of a marked call."""
    return isinstance(node, fx.Node) and node.target is part


def _values(mark: fx.Node) -> list[Any]:
    """The values of a call at its beginning or end: the leaves of its arguments or of its result."""
    if mark.target is begins:
        return values_in((mark.args[1], mark.args[2]))
    return values_in(mark.args[1])


def parts_of(mark: fx.Node) -> dict[int, fx.Node]:
    """The parts of a mark, by their index."""
    return {int(user.args[1]): user for user in mark.users if user.target is part}  # type: ignore[arg-type]


def _stands_for(node: fx.Node) -> Any:
    mark, index = node.args
    assert isinstance(mark, fx.Node)
    return _values(mark)[int(index)]  # type: ignore[arg-type]


def unclear(mark: fx.Node) -> tuple[int, ...]:
    """The indices of the values of a call that hooks cannot replace, because other code reads them too."""
    known = parts_of(mark)
    fixed: Any = mark.args[3:] if mark.target is begins else ()
    values = enumerate(_values(mark))
    return tuple(
        i for i, value in values if isinstance(value, fx.Node) and (i not in known or i in fixed)
    )


def fix_arguments(node: fx.Node) -> None:
    """Note that an operation has written into a value, and what reads it later by another name reads the result.

    The hooks of the calls that have the value as an argument then cannot replace it.
    """
    while _is_argument(node):
        mark, index = node.args
        assert isinstance(mark, fx.Node)
        mark.args = (*mark.args, index)
        node = _stands_for(node)


def calls(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """The beginnings and the ends of the marked calls, in the order of their beginnings."""
    return [(node, _end(node)) for node in graph.nodes if node.target is begins]


def _end(begin: fx.Node) -> fx.Node:
    return next(user for user in begin.users if user.target is ends)


def inside(begin: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """The nodes between the beginning and the end of a call."""
    node = begin.next
    while node is not end:
        following = node.next
        yield node
        node = following


def same_value(node: fx.Node) -> list[fx.Node]:
    """The nodes that have the same value as a node if no hook changes it: what it stands for, and all its parts."""
    while is_part(node):
        value = _stands_for(node)
        if not isinstance(value, fx.Node):
            break
        node = value
    found = [node]
    for value in found:
        for mark in value.users:
            if mark.target in (begins, ends):
                found += [
                    p for p in parts_of(mark).values() if _stands_for(p) is value and p not in found
                ]
    return found


def settle(graph: fx.Graph) -> None:
    """Add the parts to marks that a trace has recorded without them.

    The operations of a module read a value of its arguments through the call, and those after it read its result
    through the call. Not certain, and left out, are values that the call receives or returns twice, and results that
    the module has not computed, unless the trace has made the part.
    """
    for begin, end in calls(graph):
        values = _values(begin)
        for index, value in enumerate(values):
            if _once(value, values):
                users = [u for u in value.users if begin < u and (u < end or u is end)]
                _add_part(begin, index, value, users)
    for end in [node for node in graph.nodes if node.target is ends]:
        values, known, begin = _values(end), parts_of(end), end.args[0]
        for index, value in enumerate(values):
            if (
                _once(value, values)
                and index not in known
                and value > begin
                and not _is_argument(value)
            ):
                _add_part(end, index, value, [u for u in value.users if end < u])


def _is_argument(node: fx.Node) -> bool:
    return is_part(node) and node.args[0].target is begins  # type: ignore[union-attr]


def _once(value: Any, values: list[Any]) -> bool:
    return isinstance(value, fx.Node) and sum(other is value for other in values) == 1


def _add_part(mark: fx.Node, index: int, value: fx.Node, users: list[fx.Node]) -> fx.Node:
    with mark.graph.inserting_after(mark):
        new = new_node(mark.graph, "call_function", part, (mark, index))
    readers = set(users)
    value.replace_all_uses_with(new, delete_user_cb=readers.__contains__)
    return new


def mark_call(node: fx.Node) -> None:
    """Mark the call of a module that is one node, directly or through a function of `ops`."""
    graph, first = node.graph, first_argument(node)
    given: Any = (tuple(node.args[first:]), dict(node.kwargs))
    with graph.inserting_before(node):
        begin = new_node(graph, "call_function", begins, (called_path(node), *given))
    with graph.inserting_after(node):
        end = new_node(graph, "call_function", ends, (begin, node, *given))
    values = _values(begin)
    for index, value in enumerate(values):
        if _once(value, values):
            _add_part(begin, index, value, [node, end])
    _add_part(end, 0, node, [user for user in node.users if user is not end])


def take_marks(graph: fx.Graph, unmarked: frozenset[str] = frozenset()) -> Marks:
    """Remove the marks from a graph, and return them as plain data."""
    found: list[Mark] = []
    names: list[str] = []
    anchor, marks = "", []
    for node in reversed(graph.nodes):
        if is_mark(node):
            marks.append((node, anchor))
        else:
            anchor = node.name
            names.append(anchor)
    marks.reverse()
    for node, name in marks:
        uses = _uses(node) if node.target is part else ()
        args = fx.node.map_aggregate(node.args, dump_value)
        found.append(Mark(node.target.__name__, node.name, name, args, uses))
    for node, _ in marks:
        if node.target is part:
            node.replace_all_uses_with(_stands_for(node))
    for node, _ in reversed(marks):
        graph.erase_node(node)
    return Marks(tuple(found), tuple(reversed(names)), unmarked)


def insert_marks(graph: fx.Graph, marks: Marks) -> bool:
    """Insert marks that `take_marks` returned.

    Returns:
        False if the graph has other nodes than then, so that its calls are not known any more. It is then unchanged.
    """
    nodes = {node.name: node for node in graph.nodes}
    if not marks.marks:
        return True
    if tuple(nodes) != marks.nodes:
        return False
    known = dict(nodes)
    uses: dict[str, dict[int, fx.Node]] = {}
    for mark in marks.marks:
        args = fx.node.map_aggregate(mark.args, lambda value: load_value(value, known))
        with graph.inserting_before(nodes[mark.anchor]):
            known[mark.name] = node = new_node(graph, "call_function", _TARGETS[mark.target], args)
        for user, index in mark.uses:
            uses.setdefault(user, {})[index] = node
    for user, values in uses.items():
        _replace_values(nodes[user], values)
    return True


def _uses(node: fx.Node) -> tuple[tuple[str, int], ...]:
    return tuple(
        (user.name, index)
        for user in node.users
        if not is_mark(user)
        for index, value in enumerate(_read_by(user))
        if value is node
    )


def _read_by(node: fx.Node) -> list[Any]:
    """The values in the arguments of a node, each use once."""
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), found.append)
    return found


def _replace_values(node: fx.Node, values: dict[int, fx.Node]) -> None:
    counter = iter(range(len(_read_by(node))))

    def replaced(value: Any) -> Any:
        return values.get(next(counter), value)

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), replaced)
    node.args, node.kwargs = args, kwargs
