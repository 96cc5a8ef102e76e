"""The finder of parameters, on graphs that are made by hand: names, uses, ties, and what is out of reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import freegrad_fx as fg
from freegrad_fx.sites.parameters import find_parameters, unused_parameters
from freegrad_fx.sites.site import LocatedParameter


class Holds(nn.Module):
    """Keeps a parameter in a list besides."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.kept = [parameter]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept[0]


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.table = nn.Embedding(4, 3, sparse=True)
        self.scale, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1))
        self.tied = self.second.weight
        self.holds = Holds(self.scale)


def found(build: Callable[[fx.Graph, fx.Node], Any], root: nn.Module) -> list[LocatedParameter]:
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return find_parameters(graph, root)


def test_reads_and_calls_are_listed_in_the_order_of_named_parameters() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        x = g.call_module("second", (x,))
        x = g.call_module("first", (x,))
        return g.call_function(torch.mul, (g.call_module("first", (x,)), g.get_attr("scale")))

    root = Root()
    places = found(build, root)
    assert [place.site.name for place in places] == ["scale", "tied", "first.weight", "first.bias"]
    scale, tied, weight, _ = places
    assert [node.name for node in scale.reads] == ["scale"]
    assert scale.calls == ()
    assert [(node.name, inside) for node, inside in weight.calls] == [
        ("first", ("weight",)),
        ("first_1", ("weight",)),
    ]
    assert weight.tensor is root.first.weight
    assert tied.site.names == ("tied", "second.weight")
    assert tied.owners == (Root, nn.Linear)
    assert [place.site.spelling for place in places] == [
        "Root.scale", "Root.tied", "nn.Linear.weight", "nn.Linear.bias",
    ]  # fmt: skip


def test_a_parameter_that_is_read_and_called_has_both_uses() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        return g.call_function(F.linear, (g.call_module("second", (x,)), g.get_attr("tied")))

    (place,) = found(build, Root())
    assert [node.name for node in place.reads] == ["tied"]
    assert [inside for _, inside in place.calls] == [("weight",)]


def test_the_table_of_an_embedding_is_told_from_its_other_uses() -> None:
    root = Root()
    (place,) = found(lambda g, x: g.call_module("table", (x,)), root)
    assert place.embeds == (root.table,)
    (read,) = found(lambda g, x: g.call_function(F.linear, (x, g.get_attr("table.weight"))), root)
    assert read.embeds == ()


def test_a_parameter_that_a_called_module_holds_otherwise_is_out_of_reach() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        return g.call_module("holds", (g.call_function(torch.mul, (x, g.get_attr("scale"))),))

    (place,) = found(build, Root())
    assert place.obstacle.startswith("holds (Holds, kept as one opaque call) holds it in a list")


def test_what_no_graph_uses_is_listed_with_that_reason() -> None:
    root = Root()
    used = found(lambda g, x: g.call_module("first", (x,)), root)
    rest = unused_parameters(root, used)
    assert [place.site.name for place in rest] == ["scale", "unused", "tied", "table.weight"]
    assert {place.obstacle for place in rest} == {"no graph of the model uses it"}


def test_a_parameter_that_is_decoupled_already_is_an_obstacle_that_names_the_rule() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        weight = g.get_attr("scale")
        stopped = g.call_function(fg.ops.stop_gradient, (weight,))
        how = {"rule": "clip_norm", "site": "scale"}
        return g.call_function(
            torch.mul, (x, g.call_function(fg.ops.decoupled, (stopped, weight), how))
        )

    (place,) = found(build, Root())
    assert place.obstacle.startswith("already decoupled, with the rule 'clip_norm'")


def test_a_parameter_that_is_the_input_of_a_decoupled_operation_is_not_decoupled() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        weight = g.get_attr("scale")
        stopped = g.call_function(fg.ops.stop_gradient, (weight,))
        how = {"rule": "clip_norm", "site": "<root>:relu[0]"}
        relu = g.call_function(torch.relu, (stopped,))
        return g.call_function(
            torch.mul, (x, g.call_function(fg.ops.decoupled, (relu, weight), how))
        )

    (place,) = found(build, Root())
    assert place.obstacle == ""
