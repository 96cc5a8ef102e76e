"""What is drawn of a model: a row for each operation and each parameter with a rule, and which rows a row reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import fx, nn

from .. import ops
from ..capture.captured import CapturedModule
from ..graph.provenance import origin
from ..plan import Decision, Plan
from ..sites.site import OUTPUT

__all__ = ["Row", "folded", "rows_of_graph", "rows_of_plan"]

_GIVEN_RULES = ("rewrite", "ambient")
# Functions of this package that stand for an operation of the model; the others belong to the row that they are given
_OPERATIONS = ("apply_forward", "apply_function", "call_with", "call_without_hooks", "forward_of")
_OF_MODULES = _OPERATIONS[2:]
# The argument that holds the row; of others, all arguments do
_HOLDS = {
    "decoupled": 0,
    "stop_gradient": 0,
    "kept": 0,
    "written_back": 1,
    "run_hooks": 2,
    "leave_call": 2,
}
_READS = ("getattr", "getitem")


@dataclass(frozen=True)
class Row:
    """A box of a drawing.

    Attributes:
        kind: ``"operation"``, ``"parameter"``, ``"input"``, ``"output"`` or ``"folded"``.
        path: The path of the module that it belongs to, or the name of the parameter; ``""`` for the root.
        name: What it does, for example ``relu``; for a folded row, the number of operations.
        decisions: The decisions that act there.
        sources: The rows whose results it reads, by number.
    """

    kind: str
    path: str
    name: str
    decisions: tuple[Decision, ...] = ()
    sources: frozenset[int] = frozenset()


class _Rows:
    """Makes the rows of a graph."""

    def __init__(self, root: nn.Module, plan: Plan) -> None:
        self.root = root
        self.rows: list[Row] = []
        self._of: dict[fx.Node, frozenset[int]] = {}
        self._before: dict[fx.Node, tuple[Decision, ...]] = {}
        self._parameters: dict[str, int] = {}
        acting = [d for d in plan.decisions if d.action in _GIVEN_RULES or d.forward is not None]
        self._decisions = {d.site.name: d for d in acting if d.site.kind != "parameter"}
        self._of_parameter = {
            name: d for d in acting if d.site.kind == "parameter" for name in d.site.names
        }

    def add(self, node: fx.Node) -> None:
        """Make the row of a node, or let it belong to the row of another one."""
        read = self._read(node.all_input_nodes)
        function = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        inserted = bool(function) and getattr(ops, function, None) is node.target
        if node.op == "get_attr":
            self._of[node] = self._parameter(str(node.target))
        elif inserted and function not in _OPERATIONS:
            self._of[node] = self._belongs(node, function, read)
        elif (function in _READS or self._of_one_parameter(read)) and node.op != "output":
            self._of[node] = read
        elif (
            node.op == "call_module" and not node.users
        ):  # the guards of a graph from example inputs
            self._of[node] = frozenset()
        else:
            before = [d for n in node.all_input_nodes for d in self._before.get(n, ())]
            decisions = tuple({d.site.name: d for d in before}.values())
            self._of[node] = self._new(self._row(node, function, decisions, read))

    def _read(self, nodes: Iterable[fx.Node]) -> frozenset[int]:
        return frozenset(row for node in nodes for row in self._of.get(node, ()))

    def _new(self, row: Row) -> frozenset[int]:
        self.rows.append(row)
        return frozenset({len(self.rows) - 1})

    def _parameter(self, name: str) -> frozenset[int]:
        if (decision := self._of_parameter.get(name)) is None:
            return frozenset()
        if decision.site.name not in self._parameters:  # a graph can read it more than once
            row = Row("parameter", decision.site.name, "parameter", (decision,))
            (self._parameters[decision.site.name],) = self._new(row)
        return frozenset({self._parameters[decision.site.name]})

    def _of_one_parameter(self, read: frozenset[int]) -> bool:
        """Whether a node only computes what is read of a parameter, for example by a replaced forward."""
        return len(read) == 1 and all(self.rows[row].kind == "parameter" for row in read)

    def _belongs(self, node: fx.Node, function: str, read: frozenset[int]) -> frozenset[int]:
        inputs = node.all_input_nodes
        first = self._read(inputs[:1])
        decision = self._decisions.get(str(node.kwargs.get("site", "")))
        carried = self._before.get(inputs[0], ()) if inputs else ()
        if decision is not None and function == "decoupled":
            # A pair around the identity is at what comes after it, except at an output
            before = inputs[0].target is ops.stop_gradient and decision.site.at != OUTPUT
            if not before:
                # What is before an operand, and not in what the operation itself gets
                given = [d for n in inputs[1:] for d in self._before.get(n, ())]
                for row in first:
                    self._decide(row, [*given, decision])
            carried = (*carried, decision) if before else carried
        if carried:
            self._before[node] = carried
        if function not in _HOLDS:
            return read
        held: list[fx.Node] = []
        fx.node.map_arg(node.args[_HOLDS[function]], held.append)
        return self._read(held)

    def _decide(self, number: int, decisions: Iterable[Decision]) -> None:
        row = self.rows[number]
        by_name = {d.site.name: d for d in (*row.decisions, *decisions)}
        self.rows[number] = replace(row, decisions=tuple(by_name.values()))

    def _row(
        self,
        node: fx.Node,
        function: str,
        decisions: tuple[Decision, ...],
        read: frozenset[int],
    ) -> Row:
        if node.op == "placeholder":
            return Row("input", "", str(node.target))
        if node.op == "output":
            return Row("output", "", "output", (), read)
        called = node.args[0] if function in _OF_MODULES else None
        path = str(node.target) if node.op == "call_module" else _owner(node)
        if isinstance(called, fx.Node) and called.op == "get_attr":
            path = str(called.target)
            name = _class_at(self.root, path)
        elif node.op == "call_module":
            name = _class_at(self.root, path)
        elif function in _OPERATIONS:  # with the name of what it calls
            texts = [a for a in node.args if isinstance(a, str)]
            name = texts[0].rpartition(".")[2].rpartition(":")[2] if texts else function
        else:
            name = (function or str(node.target)).partition(".")[0]  # without the overload
        return Row("operation", path, name, decisions, read)


def rows_of_graph(model: CapturedModule, plan: Plan) -> list[Row]:
    """The rows of a transformed model, in the order of its graph in the present mode."""
    made = _Rows(model, plan)
    for node in model.graph.nodes:
        made.add(node)
    return _ordered(made.rows)


def rows_of_plan(plan: Plan) -> list[Row]:
    """The sites of a plan that get a rule, in execution order. It is not known what they read."""
    rows: list[Row] = []
    for decision in plan.decisions:
        if decision.action not in _GIVEN_RULES and decision.forward is None:
            continue
        site = decision.site
        if site.kind == "parameter":
            rows.append(Row("parameter", site.name, "parameter", (decision,)))
            continue
        same = [
            number
            for number, row in enumerate(rows)
            if row.kind == "operation" and _call(row.decisions[0]) == _call(decision)
        ][-1:]
        if same:
            rows[same[0]] = replace(rows[same[0]], decisions=(*rows[same[0]].decisions, decision))
        else:
            rows.append(Row("operation", site.path, site.op, (decision,)))
    return rows


def _call(decision: Decision) -> tuple[str, str, int]:
    return decision.site.path, decision.site.op, decision.site.call


def _ordered(rows: Sequence[Row]) -> list[Row]:
    """The rows without what leads nowhere, each parameter just before the first row that reads it."""
    read = {source for row in rows for source in row.sources}
    kept = [n for n, row in enumerate(rows) if n in read or row.decisions or row.kind == "output"]
    places = {n: (n, 1) for n in kept}
    for n in kept:
        if rows[n].kind == "parameter":
            readers = [reader for reader in kept if n in rows[reader].sources]
            places[n] = (min(readers), 0) if readers else (len(rows), 0)
    order = sorted(kept, key=lambda n: (*places[n], n))
    return _renumbered([rows[n] for n in order], {n: number for number, n in enumerate(order)})


def _renumbered(rows: Iterable[Row], numbers: Mapping[int, int]) -> list[Row]:
    found = []
    for number, row in enumerate(rows):
        sources = frozenset(numbers[s] for s in row.sources if s in numbers) - {number}
        found.append(replace(row, sources=sources))
    return found


def folded(rows: Sequence[Row], depth: int) -> list[Row]:
    """Rows in which operations that follow each other are one, if they are inside of the same module at a depth.

    Operations without rules that the code of one module further up calls in a row are one, too.

    Args:
        rows: The rows.
        depth: How many parts the path of a module has that is one row: 1 for ``layer1``, 2 for ``layer1.0``.
    """
    groups: list[list[int]] = []
    for _, group in groupby(range(len(rows)), lambda n: _module(rows[n], n, depth)):
        members = list(group)
        alone = sum(rows[n].kind == "operation" for n in members) < 2
        groups += [[n] for n in members] if alone else [members]
    numbers = {n: number for number, group in enumerate(groups) for n in group}
    made = [
        rows[group[0]] if len(group) == 1 else _as_one([rows[n] for n in group], depth)
        for group in groups
    ]
    return _renumbered(made, numbers)


def _module(row: Row, number: int, depth: int) -> tuple[Any, ...]:
    """What rows that become one have in common; for a row that stays, its number."""
    parts = row.path.split(".") if row.path else []
    if row.kind == "parameter":
        parts = parts[:-1]
    if row.kind in ("operation", "parameter") and len(parts) >= depth:
        return (*parts[:depth],)
    # What the code of a module further up computes in between, such as masks
    return (None, row.path) if row.kind == "operation" and not row.decisions else (number,)


def _as_one(rows: Sequence[Row], depth: int) -> Row:
    path = ".".join(rows[0].path.split(".")[:depth])
    operations = sum(row.kind == "operation" for row in rows)
    return Row(
        "folded",
        path,
        f"{operations} operation{'s' * (operations != 1)}",
        tuple(d for row in rows for d in row.decisions),
        frozenset(source for row in rows for source in row.sources),
    )


def _owner(node: fx.Node) -> str:
    return origin(node).owner


def _class_at(root: nn.Module, path: str) -> str:
    try:
        return type(root.get_submodule(path)).__name__
    except AttributeError:
        return path.rpartition(".")[2]
