"""`graph/nodes.py`: what a node of a graph calls and reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from freegrad_fx.graph.nodes import (
    argument,
    attribute,
    called_module,
    called_path,
    first_argument,
    hooked_module,
    spelled,
    submodule,
    takes_parameters,
)
from freegrad_fx.ops import call_with, call_without_hooks, run_hooks, run_pre_hooks


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


@pytest.fixture
def root() -> nn.Module:
    root = nn.Module()
    root.layer = nn.Module()
    root.layer.act = nn.ReLU(inplace=True)
    root.layer.linear = nn.Linear(2, 2)
    root.layer.register_buffer("mean", torch.zeros(2))
    root.act = nn.GELU()
    root.nothing = None
    root.register_module("absent", None)
    root.text = "not a module"
    return root


# --- attribute ---


@pytest.mark.parametrize("name", ["layer.linear.weight", "layer.mean", "text", "layer"])
def test_attribute_follows_a_dotted_name(root: nn.Module, name: str) -> None:
    expected: Any = root
    for part in name.split("."):
        expected = getattr(expected, part)
    assert attribute(fx.Graph().get_attr(name), root) is expected


@pytest.mark.parametrize("name", ["nothing", "other", "layer.other", "other.weight", "nothing.x"])
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_attribute_is_none_where_there_is_nothing(root: nn.Module, name: str) -> None:
    assert attribute(fx.Graph().get_attr(name), root) is None


def test_attribute_is_none_for_other_nodes(root: nn.Module) -> None:
    graph = fx.Graph()
    x = graph.placeholder("text")  # the name of an attribute, too
    assert attribute(x, root) is None
    assert attribute(graph.call_module("layer", (x,)), root) is None
    assert attribute(graph.call_function(torch.relu, (x,)), root) is None


# --- submodule ---


@pytest.mark.parametrize("path", ["", "act", "layer", "layer.act", "layer.linear"])
def test_submodule_is_what_get_submodule_returns(root: nn.Module, path: str) -> None:
    assert submodule(root, path) is root.get_submodule(path)


@pytest.mark.parametrize(
    "path", ["other", "layer.other", "act.other", "text", "absent", "absent.x"]
)
def test_submodule_raises_what_get_submodule_raises(root: nn.Module, path: str) -> None:
    with pytest.raises(AttributeError) as expected:
        root.get_submodule(path)
    with pytest.raises(AttributeError) as actual:
        submodule(root, path)
    assert str(actual.value) == str(expected.value)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. :DeprecationWarning")
def test_submodule_goes_into_torchscript(root: nn.Module) -> None:
    root.scripted = torch.jit.script(Scripted())
    assert submodule(root, "scripted") is root.scripted
    assert torch.equal(submodule(root, "scripted.inside").weight, root.scripted.inside.weight)


# --- what is called ---


def test_a_module_that_is_called_plainly(root: nn.Module) -> None:
    graph = fx.Graph()
    node = graph.call_module("layer.act", (graph.placeholder("x"),))
    assert called_module(node, root) is root.layer.act
    assert called_path(node) == "layer.act"
    assert first_argument(node) == 0


def test_a_module_that_is_called_with_parameters(root: nn.Module) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(call_with, (graph.get_attr("layer.linear"), {"weight": x}, x))
    assert called_module(node, root) is root.layer.linear
    assert called_path(node) == "layer.linear"
    assert first_argument(node) == 2
    assert node.args[first_argument(node)] is x


def test_the_parts_of_a_call_with_hooks(root: nn.Module) -> None:
    graph = fx.Graph()
    x, module = graph.placeholder("x"), graph.get_attr("layer.act")
    before = graph.call_function(run_pre_hooks, (module, {}, 0, x))
    inside = graph.call_function(call_without_hooks, (module, {}, x, before))
    after = graph.call_function(run_hooks, (module, {}, inside, before))
    act = root.layer.act
    assert [called_module(node, root) for node in (before, inside, after)] == [None, act, None]
    assert [hooked_module(node, root) for node in (before, inside, after)] == [act, None, act]
    assert all(takes_parameters(node) for node in (before, inside, after))
    assert [called_path(node) for node in (before, inside, after)] == ["layer.act"] * 3
    assert [spelled(node, root) is None for node in (before, inside, after)] == [True, False, True]
    assert inside.args[first_argument(inside)] is x


def test_other_calls_have_no_module(root: nn.Module) -> None:
    graph = fx.Graph()
    x = graph.placeholder("act")
    nodes = [
        x,
        graph.get_attr("layer"),
        graph.call_function(torch.relu, (x,)),
        graph.call_method("relu", (x,)),
        graph.call_function(call_with, (graph.get_attr("text"), {}, x)),
    ]
    for node in nodes:
        assert called_module(node, root) is None
        assert hooked_module(node, root) is None
    assert not any(map(takes_parameters, nodes[:-1]))
    assert first_argument(nodes[2]) == 0
    assert called_path(nodes[3]) == "relu"


def test_an_argument_by_position_and_by_keyword() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    node = graph.call_function(torch.add, (x, y), {"alpha": 2})
    assert argument(node, 0) is x
    assert argument(node, 1) is y
    assert argument(node, "alpha") == 2


# --- spelled ---


def test_an_activation_is_recognised_by_module_function_and_method(root: nn.Module) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    cases: list[tuple[fx.Node, str, int | str, bool]] = [
        (graph.call_module("layer.act", (x,)), "relu", 0, True),
        (graph.call_module("act", (x,)), "gelu", 0, False),
        (graph.call_module("act", (), {"input": x}), "gelu", "input", False),
        (graph.call_function(call_with, (graph.get_attr("act"), {}, x)), "gelu", 2, False),
        (graph.call_function(F.relu, (x,)), "relu", 0, False),
        (graph.call_function(F.relu, (), {"input": x, "inplace": True}), "relu", "input", True),
        (graph.call_method("tanh_", (x,)), "tanh", 0, True),
        (graph.call_function(torch.ops.aten.relu.default, (x,)), "relu", 0, False),
    ]
    for node, op, key, inplace in cases:
        spelling = spelled(node, root)
        assert spelling is not None
        assert (spelling.op.name, spelling.key, spelling.inplace) == (op, key, inplace)
        assert argument(node, spelling.key) is x


def test_a_parametrized_module_is_recognised_by_its_own_class(root: nn.Module) -> None:
    root.prelu = nn.PReLU(2)
    parametrizations.weight_norm(root.prelu, "weight", dim=0)
    graph = fx.Graph()
    spelling = spelled(graph.call_module("prelu", (graph.placeholder("x"),)), root)
    assert spelling is not None
    assert spelling.op.name == "prelu"


def test_what_is_not_an_activation_is_not_recognised(root: nn.Module) -> None:
    graph = fx.Graph()
    x = graph.placeholder("relu")
    for node in (
        x,
        graph.call_module("layer.linear", (x,)),
        graph.call_function(torch.add, (x, x)),
        graph.call_method("view", (x, -1)),
        graph.call_function(F.relu, (1.0,)),
        graph.output(x),
    ):
        assert spelled(node, root) is None
