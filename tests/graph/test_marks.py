"""Marks of calls: they are taken from a graph and inserted again without a change."""

from __future__ import annotations

import torch
from torch import fx

from freegrad_fx.graph.marks import (
    Marks,
    begins,
    calls,
    ends,
    insert_marks,
    inside,
    mark_call,
    part,
    parts_of,
    same_value,
    settle,
    take_marks,
    unclear,
)


def graph() -> fx.Graph:
    """``y = block(x, x2); return y + x`` where the block calls another, which is a layer."""
    new = fx.Graph()
    x, other = new.placeholder("x"), new.placeholder("other")
    begin = new.call_function(begins, ("block", (x,), {"other": other}))
    double = new.call_function(torch.mul, (x, other))
    inner = new.call_function(begins, ("block.layer", (double,), {}))
    act = new.call_function(torch.relu, (double,))
    new.call_function(ends, (inner, act, (double,), {}))
    new.call_function(ends, (begin, [act, x], (x,), {"other": other}))
    new.output(new.call_function(torch.add, (act, x)))
    settle(new)
    return new


def structure(of: fx.Graph) -> list[tuple[object, ...]]:
    place = {node: number for number, node in enumerate(of.nodes)}
    return [(n.op, n.target, fx.map_arg((n.args, n.kwargs), place.get)) for n in of.nodes]


def test_marks_are_inserted_as_they_were_taken() -> None:
    marked = graph()
    before = structure(marked)
    marks = take_marks(marked, frozenset({"other"}))
    assert not any(node.target in (begins, ends, part) for node in marked.nodes)
    assert [n.name for n in marked.nodes] == ["x", "other", "mul", "relu", "add", "output"]
    assert (marks.paths, marks.unmarked) == ({"block", "block.layer"}, {"other"})
    assert insert_marks(marked, marks)
    assert structure(marked) == before
    again = take_marks(marked)
    assert insert_marks(marked, again)
    assert structure(marked) == before


def test_a_graph_with_other_nodes_has_no_marks() -> None:
    marked = graph()
    marks = take_marks(marked)
    before = structure(marked)
    with marked.inserting_before(next(n for n in marked.nodes if n.op == "output")):
        marked.call_function(torch.neg, (next(iter(marked.nodes)),))
    assert not insert_marks(marked, marks)
    assert [row[1] for row in structure(marked) if row[1] is not torch.neg] == [
        r[1] for r in before
    ]
    assert insert_marks(marked, Marks())


def test_the_parts_are_what_is_read_through_the_call() -> None:
    (outer, end), (inner, inner_end) = calls(graph())
    assert [n.target for n in inside(inner, inner_end) if n.target is not part] == [torch.relu]
    (add,) = [n for n in end.graph.nodes if n.target is torch.add]
    assert add.args[0] is parts_of(end)[0], "the result is read through the call"
    assert add.args[1].name == "x", "the model reads its own input"
    assert (unclear(outer), unclear(end)) == ((), (1,)), "the block returns its argument"
    (mul,) = [n for n in end.graph.nodes if n.target is torch.mul]
    assert set(mul.args) == set(parts_of(outer).values())
    assert {n.name for n in same_value(mul.args[0])} >= {"x", mul.args[0].name}


def test_the_call_of_a_layer_is_marked() -> None:
    new = fx.Graph()
    x = new.placeholder("x")
    call = new.call_module("layer", (x,), {"by": 2.0})
    new.output((call, x))
    mark_call(call)
    ((begin, end),) = calls(new)
    assert begin.args[0] == "layer"
    assert call.args == (parts_of(begin)[0],)
    (output,) = [n for n in new.nodes if n.op == "output"]
    assert output.args[0] == (parts_of(end)[0], x)
    take_marks(new)
    assert (call.args, output.args[0]) == ((x,), (call, x))
