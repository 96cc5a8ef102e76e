"""`graph/aliasing.py`: which nodes share memory, and which of them write into it.

PyTorch is the oracle: a graph is run, and storages and version counters are compared before and after each node.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import freegrad_fx as fg
from freegrad_fx.graph.aliasing import Aliasing, named_in_place, of_library, written_argument
from freegrad_fx.ops import apply_function, call_with, function_key, run_hooks, run_pre_hooks

aten = torch.ops.aten


def users_function(x: Any) -> Any:
    return x


class Users(nn.Module):
    """A module of the user's, which stays one opaque call."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class UsersInplace(nn.Module):
    inplace = True

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: output)
    return module


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.ModuleDict(
            {
                "linear": nn.Linear(4, 4),
                "conv": nn.Conv1d(4, 4, 1),
                "norm": nn.BatchNorm1d(4),
                "layer_norm": nn.LayerNorm(4),
                "pool": nn.MaxPool1d(2),
                "pool_indices": nn.MaxPool1d(2, return_indices=True),
                "average": nn.AvgPool1d(2),
                "embedding": nn.Embedding(4, 4),
                "identity": nn.Identity(),
                "flatten": nn.Flatten(0),
                "sequential": nn.Sequential(),
                "dropout": nn.Dropout(0.5),
                "dropout_": nn.Dropout(0.5, inplace=True),
                "relu": nn.ReLU(),
                "relu_": nn.ReLU(inplace=True),
                "prelu": nn.PReLU(),
                "gru": nn.GRU(4, 4),
                "gru_cell": nn.GRUCell(4, 4),
                "users": Users(),
                "users_": UsersInplace(),
                "hooked": with_hook(nn.Linear(4, 4)),
                "hooked_identity": with_hook(nn.ReLU()),
            }
        )
        self.register_buffer("kept", torch.ones(4, 4))
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.name = "a text"


class Built:
    """A graph that is written by hand, of which the first two inputs are x and y."""

    def __init__(self) -> None:
        self.root = Root()
        self.graph = fx.Graph()
        self.x = self.graph.placeholder("x")
        self.y = self.graph.placeholder("y")

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if isinstance(target, str) and target.startswith("part."):
            return self.graph.call_module(target, args, kwargs)
        if isinstance(target, str):
            return self.graph.call_method(target, args, kwargs)
        return self.graph.call_function(target, args, kwargs)

    def fresh(self, x: fx.Node | None = None) -> fx.Node:
        """A tensor of its own, as the aliasing can know."""
        return self.call("part.linear", self.x if x is None else x)

    def get_attr(self, name: str) -> fx.Node:
        return self.graph.get_attr(name)

    def aliasing(self, *outputs: Any) -> Aliasing:
        self.graph.output(outputs)
        return Aliasing(self.graph, self.root)


def may_share(build: Callable[[Built, fx.Node, fx.Node], Any]) -> bool:
    """Whether the aliasing says that what `build` makes may share memory with its first argument.

    Both arguments are tensors of their own. A write into one is a write into the other if they may share memory.
    """
    built = Built()
    a, b = built.fresh(), built.fresh(built.y)
    result = build(built, a, b)
    built.call("add_", result, 1)
    return built.aliasing(a, result).written_after(a, result)


def shares(build: Callable[[Built, fx.Node, fx.Node], Any]) -> bool:
    """The same question, answered by PyTorch."""
    built = Built()
    result = build(built, built.x, built.y)
    built.graph.output(result)
    built.graph.lint()
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    with torch.no_grad():
        out = fx.Interpreter(built.root, graph=built.graph).run(x, y)
    return bool(out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr())


# --- what shares memory ---

VIEWS: dict[str, Callable[[Built, Any, Any], Any]] = {
    "view": lambda g, a, b: g.call("view", a, -1),
    "reshape": lambda g, a, b: g.call("reshape", a, -1),
    "torch.reshape": lambda g, a, b: g.call(torch.reshape, a, (-1,)),
    "flatten": lambda g, a, b: g.call(torch.flatten, a),
    "nn.Flatten": lambda g, a, b: g.call("part.flatten", a),
    "transpose": lambda g, a, b: g.call("transpose", a, 0, 1),
    "t": lambda g, a, b: g.call(torch.t, a),
    "permute": lambda g, a, b: g.call("permute", a, 1, 0),
    "contiguous": lambda g, a, b: g.call("contiguous", a),
    "to": lambda g, a, b: g.call("to", a, torch.float32),
    "float": lambda g, a, b: g.call("float", a),
    "detach": lambda g, a, b: g.call("detach", a),
    "expand_as": lambda g, a, b: g.call("expand_as", a, b),
    "squeeze": lambda g, a, b: g.call("squeeze", a),
    "unsqueeze": lambda g, a, b: g.call(torch.unsqueeze, a, 0),
    "index": lambda g, a, b: g.call(operator.getitem, a, 0),
    "slice": lambda g, a, b: g.call(operator.getitem, a, slice(1, 3)),
    "slice and index": lambda g, a, b: g.call(operator.getitem, a, (slice(None), 1)),
    "narrow": lambda g, a, b: g.call(torch.narrow, a, 0, 0, 2),
    "split": lambda g, a, b: g.call(operator.getitem, g.call("split", a, 2), 0),
    "torch.chunk": lambda g, a, b: g.call(operator.getitem, g.call(torch.chunk, a, 2), 1),
    "unbind": lambda g, a, b: g.call(operator.getitem, g.call("unbind", a), 3),
    "concatenated tuples": lambda g, a, b: g.call(
        operator.getitem, g.call(operator.add, g.call("split", a, 2), g.call("split", b, 2)), 0
    ),
    "a tuple twice": lambda g, a, b: g.call(
        operator.getitem, g.call(operator.mul, g.call("split", a, 2), 2), 2
    ),
    "nn.Identity": lambda g, a, b: g.call("part.identity", a),
    "nn.Sequential": lambda g, a, b: g.call("part.sequential", a),
    "a module of the user's": lambda g, a, b: g.call("part.users", a),
    "a function of the user's": lambda g, a, b: g.call(users_function, a),
    "a call with parameters": lambda g, a, b: g.call(call_with, g.get_attr("part.users"), {}, a),
    "a stopped gradient": lambda g, a, b: g.call(fg.ops.stop_gradient, a),
    "aten.view": lambda g, a, b: g.call(aten.view.default, a, [-1]),
    "aten.slice": lambda g, a, b: g.call(aten.slice.Tensor, a, 0, 0, 2),
    "aten.reshape": lambda g, a, b: g.call(aten.reshape.default, a, [-1]),
    "aten.contiguous": lambda g, a, b: g.call(aten.contiguous.default, a),
    "aten.dropout, off": lambda g, a, b: g.call(aten.dropout.default, a, 0.5, False),
    "aten.split": lambda g, a, b: g.call(operator.getitem, g.call(aten.split.Tensor, a, 2), 0),
    "view of a view": lambda g, a, b: g.call("view", g.call("view", a, -1), 2, 8),
    # in place: the result is the argument
    "relu_": lambda g, a, b: g.call("relu_", a),
    "torch.relu_": lambda g, a, b: g.call(torch.relu_, a),
    "F.relu, inplace": lambda g, a, b: g.call(F.relu, a, inplace=True),
    "F.relu, inplace by position": lambda g, a, b: g.call(F.relu, a, True),
    "nn.ReLU, inplace": lambda g, a, b: g.call("part.relu_", a),
    "aten.relu_": lambda g, a, b: g.call(aten.relu_.default, a),
    "+=": lambda g, a, b: g.call(operator.iadd, a, b),
    "add_": lambda g, a, b: g.call("add_", a, b),
    "aten.add_": lambda g, a, b: g.call(aten.add_.Tensor, a, b),
    "out=": lambda g, a, b: g.call(torch.add, b, b, out=a),
    "aten, out=": lambda g, a, b: g.call(aten.add.out, b, b, out=a),
    "a module of the user's, inplace": lambda g, a, b: g.call("part.users_", a),
    "dropout, off": lambda g, a, b: g.call(F.dropout, a, 0.5, False),
}

FRESH: dict[str, Callable[[Built, Any, Any], Any]] = {
    "a - b": lambda g, a, b: g.call(operator.sub, a, b),
    "a / b": lambda g, a, b: g.call(operator.truediv, a, b),
    "a ** 2": lambda g, a, b: g.call(operator.pow, a, 2),
    "-a": lambda g, a, b: g.call(operator.neg, a),
    "a @ b": lambda g, a, b: g.call(operator.matmul, a, b),
    "a + b": lambda g, a, b: g.call(operator.add, a, b),
    "a + 1": lambda g, a, b: g.call(operator.add, a, 1),
    "1.0 + a": lambda g, a, b: g.call(operator.add, 1.0, a),
    "a * b": lambda g, a, b: g.call(operator.mul, a, b),
    "a * 2": lambda g, a, b: g.call(operator.mul, a, 2),
    "torch.add": lambda g, a, b: g.call(torch.add, a, b),
    "torch.matmul": lambda g, a, b: g.call(torch.matmul, a, b),
    "torch.cat": lambda g, a, b: g.call(torch.cat, [a, b]),
    "torch.stack": lambda g, a, b: g.call(torch.stack, [a, b]),
    "torch.clone": lambda g, a, b: g.call(torch.clone, a),
    "F.linear": lambda g, a, b: g.call(F.linear, a, b),
    "F.layer_norm": lambda g, a, b: g.call(F.layer_norm, a, (4,)),
    "F.max_pool1d": lambda g, a, b: g.call(F.max_pool1d, a, 2),
    "F.scaled_dot_product_attention": lambda g, a, b: g.call(
        F.scaled_dot_product_attention, a, b, b
    ),
    "clone": lambda g, a, b: g.call("clone", a),
    "add": lambda g, a, b: g.call("add", a, b),
    "mean": lambda g, a, b: g.call("mean", a),
    "nn.Linear": lambda g, a, b: g.call("part.linear", a),
    "nn.Conv1d": lambda g, a, b: g.call("part.conv", a),
    "nn.BatchNorm1d": lambda g, a, b: g.call("part.norm", a),
    "nn.LayerNorm": lambda g, a, b: g.call("part.layer_norm", a),
    "nn.MaxPool1d": lambda g, a, b: g.call("part.pool", a),
    "nn.AvgPool1d": lambda g, a, b: g.call("part.average", a),
    "nn.GRUCell": lambda g, a, b: g.call("part.gru_cell", a),
    "nn.GRU": lambda g, a, b: g.call(operator.getitem, g.call("part.gru", a), 0),
    "nn.PReLU": lambda g, a, b: g.call("part.prelu", a),
    "nn.PReLU, called with a weight": lambda g, a, b: g.call(
        call_with, g.get_attr("part.prelu"), {}, a
    ),
    "pooling that returns indices": lambda g, a, b: g.call(
        operator.getitem, g.call("part.pool_indices", a), 0
    ),
    # activations out of place
    "F.relu": lambda g, a, b: g.call(F.relu, a),
    "relu": lambda g, a, b: g.call("relu", a),
    "nn.ReLU": lambda g, a, b: g.call("part.relu", a),
    "torch.tanh": lambda g, a, b: g.call(torch.tanh, a),
    "aten.relu": lambda g, a, b: g.call(aten.relu.default, a),
    "aten.add": lambda g, a, b: g.call(aten.add.Tensor, a, b),
    # composite operators, of which the schema does not tell
    "aten.linear": lambda g, a, b: g.call(aten.linear.default, a, b),
    "aten.matmul": lambda g, a, b: g.call(aten.matmul.default, a, b),
    "aten.layer_norm": lambda g, a, b: g.call(aten.layer_norm.default, a, [4]),
    # the other argument of a write
    "a is added to b": lambda g, a, b: g.call("add_", b, a),
    "b += a": lambda g, a, b: g.call(operator.iadd, b, a),
    "out= of another": lambda g, a, b: g.call(torch.add, a, a, out=b),
    "aten, out= of another": lambda g, a, b: g.call(aten.add.out, a, a, out=b),
}

# PyTorch makes a new tensor, and "may share" costs a copy only.
IN_DOUBT: dict[str, Callable[[Built, Any, Any], Any]] = {
    "reshape of a transposed": lambda g, a, b: g.call("reshape", g.call("t", a), -1),
    "torch.where": lambda g, a, b: g.call(torch.where, g.call(operator.gt, b, 0), a, b),
    "softmax": lambda g, a, b: g.call(F.softmax, a, -1),
    "a module with a hook": lambda g, a, b: g.call("part.hooked", a),
    "an activation with a hook": lambda g, a, b: g.call("part.hooked_identity", a),
    "an autograd.Function": lambda g, a, b: g.call(apply_function, function_key(Double), a),
    "part of a tuple after addition": lambda g, a, b: g.call(
        operator.getitem, g.call(operator.add, g.call("split", b, 2), g.call("split", a, 2)), 0
    ),
    "aten.reshape": lambda g, a, b: g.call(
        aten.reshape.default, g.call(aten.permute.default, a, [1, 0]), [-1]
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_may_share_memory(name: str) -> None:
    assert shares(VIEWS[name]), "no view: it does not belong in this list"
    assert may_share(VIEWS[name])


@pytest.mark.parametrize("name", FRESH)
def test_a_new_tensor_shares_nothing(name: str) -> None:
    assert not shares(FRESH[name]), "not new: it does not belong in this list"
    assert not may_share(FRESH[name])


@pytest.mark.parametrize("name", IN_DOUBT)
def test_in_doubt_memory_may_be_shared(name: str) -> None:
    assert not shares(IN_DOUBT[name])
    assert may_share(IN_DOUBT[name])


def test_inputs_can_be_lists_and_their_sum_holds_the_same_tensors() -> None:
    built = Built()
    joined = built.call(operator.add, built.x, built.y)
    item = built.call(operator.getitem, joined, 0)
    built.call("add_", item, 1)
    assert built.aliasing(item).written(built.x)


def test_a_sum_with_a_buffer_is_one_of_tensors() -> None:
    built = Built()
    total = built.call(operator.add, built.x, built.get_attr("kept"))
    built.call("add_", total, 1)
    assert not built.aliasing(total).written(built.x)


def test_a_sum_with_another_attribute_can_be_one_of_texts_or_lists() -> None:
    built = Built()
    total = built.call(operator.add, built.x, built.get_attr("name"))
    built.call("add_", total, 1)
    assert built.aliasing(total).written(built.x)


@pytest.mark.parametrize("layer", ["gru", "gru_cell", "pool_indices"])
def test_the_tuple_that_a_layer_returns_is_not_a_tensor(layer: str) -> None:
    built = Built()
    several = built.call(f"part.{layer}", built.x)
    joined = built.call(operator.add, several, built.y)  # two tuples
    built.call("add_", built.call(operator.getitem, joined, 3), 1)
    assert built.aliasing(joined).written(built.y)


def test_a_list_that_is_extended_holds_the_tensors_of_both() -> None:
    built = Built()
    extended = built.call(operator.iadd, built.x, built.y)
    item = built.call(operator.getitem, extended, 3)
    built.call("add_", item, 1)
    assert built.aliasing(item).written_after(built.y, item)


def test_a_function_of_the_users_joins_all_of_its_arguments() -> None:
    built = Built()
    a, b = built.fresh(), built.fresh()
    built.call(users_function, a, key=[b])
    built.call("add_", b, 1)
    assert built.aliasing(a, b).written(a)


# --- what writes ---


class Writes(fx.Interpreter):
    """Runs a graph and finds, for one node, the arguments whose version counters it moves."""

    def __init__(self, built: Built, node: fx.Node) -> None:
        super().__init__(built.root, graph=built.graph)
        self.node = node
        self.found: list[fx.Node] = []

    def run_node(self, n: fx.Node) -> Any:
        if n is not self.node:
            return super().run_node(n)
        before = {arg: self.env[arg]._version for arg in n.all_input_nodes if self.is_tensor(arg)}
        result = super().run_node(n)
        self.found = [arg for arg, version in before.items() if self.env[arg]._version > version]
        return result

    def is_tensor(self, node: fx.Node) -> bool:
        return isinstance(self.env[node], Tensor)


# The call, and which argument it writes into
WRITERS: dict[str, tuple[Callable[[Built, Any, Any], fx.Node], str]] = {
    "relu_": (lambda g, x, y: g.call("relu_", x), "x"),
    "torch.relu_": (lambda g, x, y: g.call(torch.relu_, x), "x"),
    "torch.relu_, by keyword": (lambda g, x, y: g.call(torch.relu_, input=x), "x"),
    "F.relu_": (lambda g, x, y: g.call(F.relu_, x), "x"),
    "F.relu, inplace": (lambda g, x, y: g.call(F.relu, x, inplace=True), "x"),
    "F.relu, inplace by position": (lambda g, x, y: g.call(F.relu, x, True), "x"),
    "F.relu, by keyword": (lambda g, x, y: g.call(F.relu, input=x, inplace=True), "x"),
    "F.relu, out of place": (lambda g, x, y: g.call(F.relu, x, inplace=False), ""),
    "nn.ReLU, inplace": (lambda g, x, y: g.call("part.relu_", x), "x"),
    "nn.ReLU, inplace, with parameters": (
        lambda g, x, y: g.call(call_with, g.get_attr("part.relu_"), {}, x),
        "x",
    ),
    "nn.ReLU": (lambda g, x, y: g.call("part.relu", x), ""),
    "aten.relu_": (lambda g, x, y: g.call(aten.relu_.default, x), "x"),
    "aten.relu": (lambda g, x, y: g.call(aten.relu.default, x), ""),
    "aten.view": (lambda g, x, y: g.call(aten.view.default, x, [-1]), ""),
    "add_": (lambda g, x, y: g.call("add_", x, y), "x"),
    "add_, to y": (lambda g, x, y: g.call("add_", y, x), "y"),
    "add_, by keyword": (lambda g, x, y: g.call("add_", x, other=y), "x"),
    "add": (lambda g, x, y: g.call("add", x, y), ""),
    "__add__": (lambda g, x, y: g.call("__add__", x, y), ""),
    "torch.add": (lambda g, x, y: g.call(torch.add, x, y), ""),
    "out=": (lambda g, x, y: g.call(torch.add, x, x, out=y), "y"),
    "aten, out=": (lambda g, x, y: g.call(aten.add.out, x, x, out=y), "y"),
    "aten.add_": (lambda g, x, y: g.call(aten.add_.Tensor, x, y), "x"),
    "aten.add_, by keyword": (
        lambda g, x, y: g.graph.call_function(aten.add_.Tensor, (), {"self": y, "other": x}),
        "y",
    ),
    "aten.add": (lambda g, x, y: g.call(aten.add.Tensor, x, y), ""),
    "+=": (lambda g, x, y: g.call(operator.iadd, x, y), "x"),
    "-=": (lambda g, x, y: g.call(operator.isub, x, y), "x"),
    "*=": (lambda g, x, y: g.call(operator.imul, x, y), "x"),
    "/=": (lambda g, x, y: g.call(operator.itruediv, x, y), "x"),
    "**=": (lambda g, x, y: g.call(operator.ipow, x, 2), "x"),
    "//=": (lambda g, x, y: g.call(operator.ifloordiv, x, y), "x"),
    "%=": (lambda g, x, y: g.call(operator.imod, x, y), "x"),
    "+": (lambda g, x, y: g.call(operator.add, x, y), ""),
    "x[0] = 1.0": (lambda g, x, y: g.call(operator.setitem, x, 0, 1.0), "x"),
    "x[0:4] = y": (lambda g, x, y: g.call(operator.setitem, x, slice(0, 4), y), "x"),
    "x[0]": (lambda g, x, y: g.call(operator.getitem, x, 0), ""),
    "F.dropout, inplace": (lambda g, x, y: g.call(F.dropout, x, 0.5, True, inplace=True), "x"),
    "F.dropout, inplace by position": (lambda g, x, y: g.call(F.dropout, x, 0.5, True, True), "x"),
    "F.dropout": (lambda g, x, y: g.call(F.dropout, x, 0.5, True), ""),
    "F.dropout, by position": (lambda g, x, y: g.call(F.dropout, x, 0.5, True, False), ""),
    "F.alpha_dropout": (lambda g, x, y: g.call(F.alpha_dropout, x, 0.5, True, True), "x"),
    "four arguments": (lambda g, x, y: g.call(torch.addmm, x, y, y), ""),
    "nn.Dropout, inplace": (lambda g, x, y: g.call("part.dropout_", x), "x"),
    "nn.Dropout": (lambda g, x, y: g.call("part.dropout", x), ""),
    "a module of the user's, inplace": (lambda g, x, y: g.call("part.users_", x), "x"),
    "the same by keyword": (lambda g, x, y: g.call("part.users_", x=x), "x"),
    "the same with parameters": (
        lambda g, x, y: g.call(call_with, g.get_attr("part.users_"), {}, x),
        "x",
    ),
    "nn.Linear": (lambda g, x, y: g.call("part.linear", x), ""),
    "view": (lambda g, x, y: g.call("view", x, -1), ""),
    "torch.nn.init": (lambda g, x, y: g.call(nn.init.zeros_, x), "x"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_argument_that_a_call_writes_into(name: str) -> None:
    build, argument = WRITERS[name]
    built = Built()
    node = build(built, built.x, built.y)
    built.graph.output(node)
    writes = Writes(built, node)
    with torch.no_grad():
        writes.run(torch.rand(4, 4) + 1, torch.rand(4, 4) + 1)
    expected = {"x": built.x, "y": built.y, "": None}[argument]
    assert writes.found == ([] if expected is None else [expected])
    assert written_argument(node, built.root) is expected


LOOKUPS: dict[str, tuple[Callable[[Built, Any, Any], fx.Node], bool]] = {
    "embedding": (lambda g, x, w: g.call(F.embedding, x, w), False),
    "embedding, max_norm": (lambda g, x, w: g.call(F.embedding, x, w, max_norm=1.0), True),
    "embedding, by position": (lambda g, x, w: g.call(F.embedding, x, w, None, 1.0), True),
    "embedding, by keyword": (lambda g, x, w: g.call(F.embedding, x, weight=w, max_norm=1.0), True),
    "embedding, no max_norm": (lambda g, x, w: g.call(F.embedding, x, w, None, None), False),
    "embedding_bag": (lambda g, x, w: g.call(F.embedding_bag, x, w), False),
    "embedding_bag, max_norm": (lambda g, x, w: g.call(F.embedding_bag, x, w, max_norm=1.0), True),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_lookup_with_max_norm_writes_into_its_table(name: str) -> None:
    build, written = LOOKUPS[name]
    built = Built()
    node = build(built, built.x, built.y)
    built.graph.output(node)
    rows = torch.zeros(2, 2, dtype=torch.long)
    table = torch.full((4, 4), 9.0)
    before = table.clone()
    fx.Interpreter(built.root, graph=built.graph).run(rows, table)
    assert (not torch.equal(table, before)) == written
    assert written_argument(node, built.root) is (built.y if written else None)


def test_a_write_without_a_node_to_write_into() -> None:
    built = Built()
    assert written_argument(built.call(nn.init.zeros_, 1.0), built.root) is None
    assert written_argument(built.call(aten.add_.Tensor, 1.0, 2.0), built.root) is None
    assert written_argument(built.call(F.embedding, built.x, 1.0, None, 1.0), built.root) is None


def test_out_can_be_none() -> None:
    built = Built()
    assert written_argument(built.call(torch.add, built.x, built.x, out=None), built.root) is None


@pytest.mark.parametrize(
    ("name", "writes"),
    [("relu_", True), ("add_", True), ("relu", False), ("__iadd__", False), ("__add__", False)],
)
def test_names_of_functions_that_write(name: str, writes: bool) -> None:
    assert named_in_place(name) is writes


@pytest.mark.parametrize(
    ("function", "library"),
    [
        (torch.relu, True),
        (F.relu, True),
        (nn.init.zeros_, True),
        (operator.add, True),
        (math.sqrt, True),
        (len, True),
        (getattr, True),
        (Tensor.add, True),
        (aten.relu.default, True),
        (fg.ops.stop_gradient, True),
        (users_function, False),
        (Double.apply, True),  # what calls it is torch's
        (pytest.approx, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_functions_of_libraries(function: Any, library: bool) -> None:
    assert of_library(function) is library


def test_a_package_is_not_torch_because_its_name_begins_so() -> None:
    def function() -> None: ...

    function.__module__ = "torch_geometric.nn"
    assert not of_library(function)
    function.__module__ = "torch.nn"
    assert of_library(function)


# --- when memory is read ---


def test_read_elsewhere_after_sees_a_view_that_is_read_later() -> None:
    built = Built()
    a = built.fresh()
    view = built.call("view", a, -1)
    relu = built.call("relu_", a)
    later = built.call(torch.exp, view)
    aliasing = built.aliasing(later)
    assert aliasing.read_elsewhere_after(a, relu)
    assert not aliasing.read_elsewhere_after(a, later)


def test_read_elsewhere_after_leaves_out_a_view_that_was_read_before() -> None:
    built = Built()
    a = built.fresh()
    earlier = built.call(torch.exp, built.call("view", a, -1))
    relu = built.call("relu_", a)
    assert not built.aliasing(relu, earlier).read_elsewhere_after(a, relu)


def test_read_elsewhere_after_leaves_out_the_name_itself_and_views_made_later() -> None:
    built = Built()
    a = built.fresh()
    relu = built.call("relu_", a)
    view = built.call("view", a, -1)
    aliasing = built.aliasing(relu, built.call(torch.exp, view), a)
    assert not aliasing.read_elsewhere_after(a, relu)
    assert aliasing.read_after(a, relu)


def test_read_elsewhere_after_leaves_out_other_memory() -> None:
    built = Built()
    a, b = built.fresh(), built.fresh()
    relu = built.call("relu_", a)
    assert not built.aliasing(relu, built.call(torch.exp, b)).read_elsewhere_after(a, relu)


def test_read_elsewhere_after_sees_what_a_is_a_view_of() -> None:
    built = Built()
    base = built.fresh()
    a = built.call(operator.getitem, base, 0)
    relu = built.call("relu_", a)
    assert built.aliasing(relu, base).read_elsewhere_after(a, relu)


@pytest.mark.parametrize("name", ["x", "kept", "weight"])
def test_what_the_caller_or_the_model_holds_is_read_later(name: str) -> None:
    built = Built()
    held = built.x if name == "x" else built.get_attr(name)
    a = built.call("view", held, -1)
    relu = built.call("relu_", a)
    aliasing = built.aliasing(relu)
    assert aliasing.read_elsewhere_after(a, relu)
    assert aliasing.read_after(a, relu)


def test_read_after_counts_the_name_itself_and_not_the_result() -> None:
    built = Built()
    a = built.fresh()
    relu = built.call(F.relu, a)
    result = built.call(torch.exp, relu)
    aliasing = built.aliasing(result)
    assert not aliasing.read_after(a, relu)

    built = Built()
    a = built.fresh()
    relu = built.call(F.relu, a)
    assert built.aliasing(relu, built.call(torch.exp, a)).read_after(a, relu)


def test_read_after_counts_a_view_that_is_read_later() -> None:
    built = Built()
    a = built.fresh()
    view = built.call("view", a, -1)
    relu = built.call(F.relu, a)
    assert built.aliasing(relu, view).read_after(a, relu)


# --- when memory is written ---


def test_written_after_sees_writes_into_views_and_in_order() -> None:
    built = Built()
    a = built.fresh()
    view = built.call("view", a, -1)
    write = built.call("add_", view, 1)
    end = built.call(torch.exp, a)
    aliasing = built.aliasing(end)
    assert aliasing.written_after(a, a)
    assert aliasing.written_after(a, view)
    assert not aliasing.written_after(a, write)
    assert not aliasing.written_after(end, a)
    assert aliasing.written(a)
    assert aliasing.written(view)
    assert not aliasing.written(end)


MAY_WRITE: dict[str, Callable[[Built, Any], fx.Node]] = {
    "a module of the user's": lambda g, a: g.call("part.users", a),
    "the same with parameters": lambda g, a: g.call(call_with, g.get_attr("part.users"), {}, a),
    "a module with a hook": lambda g, a: g.call("part.hooked", a),
    "the hooks before a forward": lambda g, a: g.call(
        run_pre_hooks, g.get_attr("part.hooked"), {}, 0, a
    ),
    "its keywords are its own": lambda g, a: g.call(
        run_pre_hooks, g.get_attr("part.hooked"), {}, 0, a, inplace=True
    ),
    "the hooks after a forward": lambda g, a: g.call(
        run_hooks, g.get_attr("part.hooked"), {}, a, (a, (a,), {}, 0)
    ),
    "a function of the user's": lambda g, a: g.call(users_function, a),
    "its keyword": lambda g, a: g.call(users_function, x=[a]),
    "an autograd.Function": lambda g, a: g.call(apply_function, function_key(Double), a),
}


@pytest.mark.parametrize("name", MAY_WRITE)
def test_code_that_was_not_traced_may_write_and_does_not_certainly(name: str) -> None:
    built = Built()
    a, b = built.fresh(), built.fresh()
    MAY_WRITE[name](built, a)
    aliasing = built.aliasing(a, b)
    assert aliasing.written_after(a, a)
    assert not aliasing.written_after(a, a, certainly=True)
    assert not aliasing.written(a)
    assert not aliasing.written_after(b, a)


@pytest.mark.parametrize("name", ["relu_", "torch.relu_", "out=", "nn.ReLU, inplace", "+="])
def test_a_call_that_writes_by_its_name_certainly_writes(name: str) -> None:
    build, argument = WRITERS[name]
    built = Built()
    a, b = built.fresh(), built.fresh()
    build(built, a, b)
    aliasing = built.aliasing(a, b)
    written, other = (a, b) if argument == "x" else (b, a)
    assert aliasing.written_after(written, b, certainly=True)
    assert aliasing.written(written)
    assert not aliasing.written_after(other, b)


def test_a_module_of_the_users_that_is_in_place_does_not_certainly_write() -> None:
    built = Built()
    a = built.fresh()
    built.call("part.users_", a)
    aliasing = built.aliasing(a)
    assert aliasing.written_after(a, a)
    assert not aliasing.written_after(a, a, certainly=True)


@pytest.mark.parametrize("name", ["part.linear", "part.relu", "part.identity", "part.gru"])
def test_a_module_of_torch_without_hooks_writes_nothing(name: str) -> None:
    built = Built()
    a = built.fresh()
    built.call(name, a)
    assert not built.aliasing(a).written_after(a, a)


def test_functions_of_torch_and_methods_write_nothing() -> None:
    built = Built()
    a = built.fresh()
    built.call(torch.exp, a)
    built.call("view", a, -1)
    built.call(len, a)
    built.call(fg.ops.stop_gradient, a)
    assert not built.aliasing(a).written_after(a, a)


def test_a_traced_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.f(x)
            first, second = h.chunk(2, -1)
            F.relu(first, inplace=True)
            first.add_(1)
            return second + h

    net = Net()
    graph = fx.symbolic_trace(net).graph
    by_name = {node.name: node for node in graph.nodes}
    relu, h = by_name["relu"], by_name["f"]
    first, second = by_name["getitem"], by_name["getitem_1"]
    aliasing = Aliasing(graph, net)
    assert written_argument(relu, net) is first
    assert written_argument(by_name["add_"], net) is first
    assert aliasing.read_elsewhere_after(first, relu)
    assert aliasing.written_after(second, relu)
    assert aliasing.written(h)
    assert not aliasing.written(by_name["add"])
