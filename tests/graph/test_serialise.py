"""`graph/serialise.py`: graphs that are copied, turned into plain data and back, and into code."""

from __future__ import annotations

import copy
import math
import operator
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

import freegrad_fx as fg
from freegrad_fx.graph.provenance import META, Origin
from freegrad_fx.graph.serialise import (
    copy_graph,
    dump_graph,
    keywords_as_names,
    load_graph,
)


def described(graph: fx.Graph) -> list[Any]:
    """A graph as text, with nothing of it left out."""
    return [
        (n.op, str(n.target), n.format_node(), str(n.args), str(n.kwargs), n.name, n.type)
        for n in graph.nodes
    ]


def through_pickle(graph: fx.Graph) -> fx.Graph:
    return load_graph(pickle.loads(pickle.dumps(dump_graph(graph))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((), 3.0))

    def forward(self, x: Tensor, y: Any = 2.0) -> Any:
        h = F.relu(self.linear(x), inplace=True)
        pooled = F.max_pool1d(h.view(1, -1, 4), 2)
        parts = h.chunk(2, dim=-1)
        return {"a": pooled * self.scale, "b": [parts[0][:, 0:1], parts[1] + y]}


def run(graph: fx.Graph, root: nn.Module, *args: Any) -> Any:
    return fx.GraphModule(root, graph)(*args)


def assert_same_values(actual: Any, expected: Any) -> None:
    assert torch.equal(actual["a"], expected["a"])
    for a, b in zip(actual["b"], expected["b"], strict=True):
        assert torch.equal(a, b)


# --- copies ---


def test_a_copy_is_equal_and_of_other_nodes() -> None:
    net = Net()
    graph = fx.symbolic_trace(net).graph
    new = copy_graph(graph)
    assert described(new) == described(graph)
    assert {*new.nodes}.isdisjoint(graph.nodes)
    new.lint()
    x = torch.randn(2, 4)
    assert_same_values(run(new, net, x), net(x))


def test_a_copy_has_what_is_written_on_the_nodes_and_a_dict_of_its_own() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(x)
    value = [1]
    x.meta.update({"val": value, META: Origin("layer")})
    first, *_ = copy_graph(graph).nodes
    assert first.meta == x.meta
    assert first.meta["val"] is value
    first.meta["other"] = 1
    assert "other" not in x.meta


def nested_graph() -> tuple[nn.Module, fx.Graph]:
    """A graph whose input is a dict."""

    class Nested(nn.Module):
        def forward(self, x: Any) -> Any:
            return [x["a"] + x["b"]]

    net = Nested()
    graph = fx.Tracer().trace(net, {"x": {"a": fx.PH, "b": fx.PH}})
    return net, graph


def test_a_copy_takes_nested_inputs_as_the_original_does() -> None:
    net, graph = nested_graph()
    generator = graph._codegen
    new = copy_graph(graph)
    assert graph._codegen is generator
    assert new._codegen is generator
    (result,) = run(new, net, {"a": torch.ones(1), "b": torch.ones(1)})
    assert result.item() == 2


def test_a_copy_that_fails_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph = nested_graph()
    generator = graph._codegen

    def fails(*_: Any) -> None:
        raise ValueError("no copy")

    monkeypatch.setattr(copy, "deepcopy", fails)
    with pytest.raises(ValueError, match="no copy"):
        copy_graph(graph)
    assert graph._codegen is generator
    assert type(generator) is not CodeGen


# --- plain data ---


def test_a_graph_comes_back_from_plain_data() -> None:
    net = Net()
    graph = fx.symbolic_trace(net).graph
    new = through_pickle(graph)
    assert described(new) == described(graph)
    assert [n.target for n in new.nodes] == [n.target for n in graph.nodes]
    new.lint()
    x = torch.randn(2, 4)
    assert_same_values(run(new, net, x), net(x))
    assert_same_values(run(new, net, x, 5.0), net(x, 5.0))


def test_users_and_order_of_the_nodes_come_back() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    both = graph.call_function(torch.cat, ([x, y],), {"dim": 0})
    graph.output((both, {"slice": slice(x, None, y)}))
    new = through_pickle(graph)
    a, b, cat, output = new.nodes
    assert list(a.users) == [cat, output]
    assert cat.args == ([a, b],)
    assert cat.kwargs == {"dim": 0}
    assert output.args == ((cat, {"slice": slice(a, None, b)}),)


def test_only_the_origin_of_the_meta_is_kept() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta.update({META: Origin("layer", "model.py:1", nn.ReLU), "val": threading.Lock()})
    graph.output(x)
    first, output = through_pickle(graph).nodes
    assert first.meta == {META: Origin("layer", "model.py:1", nn.ReLU)}
    assert META not in output.meta


def test_names_types_and_defaults_of_inputs_come_back() -> None:
    graph = fx.Graph()
    graph.placeholder("x", Tensor)
    second = graph.placeholder("y", float, 2.0)
    graph.create_node("call_function", operator.neg, (second,), name="an_own_name")
    graph.output(None)
    new = through_pickle(graph)
    x, y, neg, _ = new.nodes
    assert (x.type, y.type) == (Tensor, float)
    assert (x.args, y.args) == ((), (2.0,))
    assert neg.name == "an_own_name"
    # later nodes get names that are not taken
    assert new.create_node("call_function", operator.neg, (y,), name="x").name != "x"


@pytest.mark.parametrize(
    "function",
    [
        F.max_pool1d,  # it chooses between two when it is called
        F.relu,
        F.linear,
        torch.relu,
        torch.ops.aten.relu.default,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.add,
        torch.ops.freegrad_fx.heaviside.default,
        operator.getitem,
        operator.add,
        getattr,
        math.sqrt,
        torch._C._nn.gelu,
        torch._C._set_grad_enabled,
        Tensor.add,
        fg.ops.stop_gradient,
        fg.ops.decoupled,
        fg.ops.call_with,
        fg.ops.run_pre_hooks,
        fg.ops.call_without_hooks,
        fg.ops.run_hooks,
    ],
    ids=lambda function: getattr(function, "__name__", str(function)),
)
def test_functions_come_back_as_themselves(function: Any) -> None:
    graph = fx.Graph()
    graph.call_function(function, (graph.placeholder("x"),))
    _, node = through_pickle(graph).nodes
    assert node.target is function or node.target == function  # methods are made at each access


def test_a_function_without_a_name_is_kept_as_it_is() -> None:
    graph = fx.Graph()
    functions = [lambda x: x, lambda x: x + 1]
    for function in functions:
        graph.call_function(function, (graph.placeholder("x"),))
    loaded = load_graph(dump_graph(graph))
    assert [n.target for n in loaded.nodes if n.op == "call_function"] == functions


def test_a_function_whose_name_leads_to_another_is_kept_as_it_is() -> None:
    def impostor(x: Any) -> Any: ...

    impostor.__module__, impostor.__name__, impostor.__qualname__ = "torch", "relu", "relu"
    graph = fx.Graph()
    graph.call_function(impostor, (graph.placeholder("x"),))
    *_, node = load_graph(dump_graph(graph)).nodes
    assert node.target is impostor


def test_a_function_that_is_gone_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.Graph()
    graph.call_function(F.max_pool1d, (graph.placeholder("x"),))
    dump = dump_graph(graph)
    monkeypatch.delattr(F, "max_pool1d")
    with pytest.raises(
        AttributeError, match=r"calls 'torch\.nn\.functional\.max_pool1d', which cannot be imported"
    ):
        load_graph(dump)


def test_a_deep_graph_pickles() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    for _ in range(3000):
        node = graph.call_function(torch.relu, (node,))
    graph.output(node)
    assert len(through_pickle(graph).nodes) == 3002


def test_an_old_option_of_a_rule_is_read_under_the_name_of_now() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(fg.ops.decoupled, (x, x), {"rule": "scale", "fuse": True, "s": 2.0})
    graph.call_function(users_function, (x,), {"fuse": True})
    _, rule, other = load_graph(dump_graph(graph)).nodes
    assert rule.kwargs == {"rule": "scale", "compile": True, "s": 2.0}
    assert other.kwargs == {"fuse": True}


def users_function(x: Any, **options: Any) -> Any:
    return x


def test_nested_inputs_come_back() -> None:
    net, graph = nested_graph()
    new = through_pickle(graph)
    assert new._codegen is not graph._codegen
    (result,) = run(new, net, {"a": torch.ones(1), "b": torch.ones(1)})
    assert result.item() == 2
    assert isinstance(run(new, net, {"a": torch.ones(1), "b": torch.ones(1)}), list)


def test_flat_inputs_keep_the_code_generator_of_the_graph() -> None:
    class Own(CodeGen):
        pass

    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    graph.set_codegen(Own())
    assert type(load_graph(dump_graph(graph))._codegen) is Own


# --- code ---


def code_of(*names: str) -> str:
    """The code of a graph that calls a submodule."""
    graph = fx.Graph()
    graph.output(graph.call_module(".".join(names), (graph.placeholder("x"),)))
    return graph.python_code("self").src


def test_keywords_are_written_as_text() -> None:
    with keywords_as_names():
        assert 'getattr(self, "in")(x)' in code_of("in")
        assert 'getattr(getattr(getattr(self, "a"), "in"), "b")(x)' in code_of("a", "in", "b")


def test_other_names_are_written_as_usual() -> None:
    usual = code_of("inner"), code_of("a", "b", "0")
    with keywords_as_names():
        assert (code_of("inner"), code_of("a", "b", "0")) == usual
    assert "self.inner(x)" in usual[0]


def test_the_usual_code_is_written_afterwards_also_after_an_error() -> None:
    before = code_of("in")

    def fails() -> None:
        with keywords_as_names():
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails()
    assert code_of("in") == before


def test_a_module_with_a_keyword_for_a_name_runs() -> None:
    root = nn.Module()
    root.add_module("in", nn.ReLU())
    graph = fx.Graph()
    graph.output(graph.call_module("in", (graph.placeholder("x"),)))
    with keywords_as_names():
        gm = fx.GraphModule(root, graph)
    assert gm(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


def test_one_thread_at_a_time_writes_keywords_as_text() -> None:
    entered = threading.Event()

    def other() -> None:
        with keywords_as_names():
            entered.set()

    thread = threading.Thread(target=other)
    with keywords_as_names(), keywords_as_names():  # the same thread can enter twice
        thread.start()
        assert not entered.wait(0.1)
    thread.join()
    assert entered.is_set()
