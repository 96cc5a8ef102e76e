"""The finder of operations, on graphs that are made by hand: names, order, obstacles, and classes as sites."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import freegrad_fx as fg
from freegrad_fx.sites.operations import find_sites
from freegrad_fx.sites.site import LocatedOperation


class Swish(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer10 = (nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2))
        self.written = nn.ReLU(inplace=True)
        self.swish, self.written_swish = Swish(), Swish(inplace=True)


def found(
    build: Callable[[fx.Graph, fx.Node], Any], *types: type, root: nn.Module | None = None
) -> list[LocatedOperation]:
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return find_sites(graph, root or Root(), types)


def names(places: list[LocatedOperation]) -> list[str]:
    return [place.site.name for place in places]


def test_sites_are_listed_in_execution_order_and_counted_for_each_owner_and_op() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        x = g.call_module("layer10.1", (x,))
        x = g.call_module("layer1.1", (x,))
        x = g.call_module("layer10.1", (x,))
        x = g.call_function(torch.relu, (x,))
        x = g.call_function(torch.tanh, (x,))
        return g.call_method("relu", (x,))

    places = found(build)
    assert names(places) == [
        "layer10.1:relu[0]", "layer1.1:relu[0]", "layer10.1:relu[1]",
        "<root>:relu[0]", "<root>:tanh[0]", "<root>:relu[1]",
    ]  # fmt: skip
    assert [place.site.spelling for place in places] == [
        *["nn.ReLU()"] * 3, "torch.relu", "torch.tanh", "Tensor.relu",
    ]  # fmt: skip
    assert [place.site.type for place in places[:1]] == ["torch.nn.modules.activation.ReLU"]
    assert [place.owners for place in places] == [*[(nn.ReLU,)] * 3, *[(Root,)] * 3]
    assert not any(place.obstacle for place in places)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "key", "inplace"),
    [
        (torch.relu, ("x",), {}, 0, False),
        (F.relu, (), {"input": "x"}, "input", False),
        (F.relu, ("x",), {"inplace": True}, 0, True),
        (F.relu, ("x", True), {}, 0, True),
        (torch.relu_, ("x",), {}, 0, True),
        (F.leaky_relu, ("x", 0.1, True), {}, 0, True),
    ],
    ids=["plain", "keyword", "inplace", "positional inplace", "twin", "third argument"],
)  # fmt: skip
def test_the_activated_tensor_and_what_is_written_are_known(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, inplace: bool
) -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        given = tuple(x if value == "x" else value for value in args)
        named = {name: x if value == "x" else value for name, value in kwargs.items()}
        return g.call_function(function, given, named)

    (place,) = found(build)
    assert (place.key, place.inplace, place.input.name) == (key, inplace, "x")


def test_other_operations_are_no_sites() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        x = g.call_module("layer1.0", (x,))
        x = g.call_module("swish", (x,))
        return g.call_function(operator.add, (x, 1))

    assert found(build) == []


def test_the_calls_of_a_class_are_sites_if_it_is_asked_for() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        return g.call_module("written_swish", (g.call_module("swish", (x,)),))

    places = found(build, Swish)
    assert names(places) == ["swish:Swish[0]", "written_swish:Swish[0]"]
    assert [(place.inplace, place.called, place.op) for place in places] == [
        (False, Swish, None),
        (True, Swish, None),
    ]


def test_an_op_of_the_vocabulary_keeps_its_name_if_its_class_is_asked_for() -> None:
    (place,) = found(lambda g, x: g.call_module("written", (x,)), nn.ReLU)
    assert (place.site.name, place.called) == ("written:relu[0]", nn.ReLU)


def test_an_out_argument_is_an_obstacle() -> None:
    (place,) = found(lambda g, x: g.call_function(torch.sigmoid, (x,), {"out": x}))
    assert place.obstacle.startswith("it writes its result into an out= tensor")


@pytest.mark.parametrize("name", ["written", "layer1.1"])
def test_forward_hooks_are_no_obstacle(name: str) -> None:
    root = Root()
    root.get_submodule(name).register_forward_hook(lambda *_: None)
    (place,) = found(lambda g, x: g.call_module(name, (x,)), root=root)
    assert not place.obstacle


# --- what an earlier transform left ---


def decoupled_with(y: fx.Node, x: fx.Node, **how: Any) -> fx.Node:
    return y.graph.call_function(fg.ops.decoupled, (y, x), how)


def stopped(x: fx.Node) -> fx.Node:
    return x.graph.call_function(fg.ops.stop_gradient, (x,))


def test_what_is_decoupled_already_is_an_obstacle_that_names_the_rule() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        return decoupled_with(g.call_function(torch.relu, (stopped(x),)), x, rule="scale")

    (place,) = found(build)
    assert place.obstacle.startswith("already decoupled, with the rule 'scale'")


def test_the_input_of_another_site_that_is_decoupled_is_not_decoupled() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        h = g.call_function(torch.relu, (x,))
        return decoupled_with(g.call_function(torch.tanh, (stopped(h),)), h, rule="scale")

    relu, tanh = found(build)
    assert relu.obstacle == ""
    assert "'scale'" in tanh.obstacle


def test_a_detached_input_without_a_rule_is_an_obstacle() -> None:
    (place,) = found(lambda g, x: g.call_function(torch.relu, (stopped(x),)))
    assert place.obstacle == "its input is already detached from the autograd graph"


def test_what_dynamo_makes_of_a_rule_is_seen_too() -> None:
    seen: list[list[LocatedOperation]] = []

    def backend(graph_module: fx.GraphModule, _: Any) -> fx.GraphModule:
        seen.append(find_sites(graph_module.graph, graph_module))
        return graph_module

    gm = fg.transform(nn.Sequential(nn.ReLU(), nn.Tanh()), {"relu": fg.rules.scale(s=2.0)})
    torch.compile(gm, backend=backend, fullgraph=True)(torch.ones(3, requires_grad=True))
    relu, tanh = seen[0]
    assert relu.obstacle.startswith("already decoupled, with the rule 'scale'")
    assert tanh.obstacle == ""
