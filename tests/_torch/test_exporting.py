"""What is taken for granted of `torch.export`: how it lifts, guards and names what it records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import Unsupported

from freegrad_fx._torch.exporting import (
    constants_lifted_by,
    dynamic_where_possible,
    export,
    guard_names,
    guards_written_by,
    is_fake,
    traced_in_full,
)
from freegrad_fx._torch.graphs import structures_of
from freegrad_fx._torch.tree import key_text

X = torch.linspace(-2, 2, 12).reshape(3, 4)


class Model(nn.Module):
    """Runs a function."""

    def __init__(self, function: Callable[[Model, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def exported(function: Callable[[Model, Tensor], Any], dynamic: bool = False) -> fx.GraphModule:
    shapes = ({0: dynamic_where_possible()},) if dynamic else None
    return export(Model(function), (X,), {}, shapes).module()  # type: ignore[return-value]


# --- what is replaced in it ---


def seen_by(
    patch: Callable[[Callable[[Callable[..., Any]], Callable[..., Any]]], Any],
    run: Callable[[], Any],
    look: Callable[..., Any],
) -> list[Any]:
    """What `look` finds in the arguments of a part of export that is replaced while something runs."""
    found: list[Any] = []

    def make(usual: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            found.append(look(*args, **kwargs))
            return usual(*args, **kwargs)

        return instead

    with patch(make):
        run()
    inside = len(found)
    run()
    assert len(found) == inside, "it is called after the block too"
    return found


@pytest.mark.filterwarnings("ignore:A model attribute")
def test_export_lifts_constants_of_a_graph_that_refers_to_tensors_no_module_has_registered() -> (
    None
):
    held = [torch.ones(4, requires_grad=True)]

    def constants(graph_module: fx.GraphModule, *_: Any) -> list[bool]:
        attributes = [
            getattr(graph_module, str(node.target), None)
            for node in graph_module.graph.find_nodes(op="get_attr")
        ]
        return [a.requires_grad for a in attributes if isinstance(a, Tensor)]

    run = lambda: exported(lambda self, x: self.first(x) + held[0])  # noqa: E731
    assert seen_by(constants_lifted_by, run, constants) == [[True]]


def test_export_lifts_constants_of_a_graph_that_refers_to_no_parameter_of_the_model() -> None:
    def attributes(graph_module: fx.GraphModule, *_: Any) -> int:
        return len(graph_module.graph.find_nodes(op="get_attr"))

    run = lambda: exported(lambda self, x: self.first(x))  # noqa: E731
    assert seen_by(constants_lifted_by, run, attributes) == [0]


def test_an_exported_program_writes_guards_as_expressions_and_the_places_that_they_name() -> None:
    program = export(Model(lambda self, x: self.first(x)), (X,), {}, None)
    ((guards, paths),) = seen_by(guards_written_by, program.module, lambda *args: args)
    assert [path[0].key for path in paths] == ["x"]
    names = ["L" + key_text(path) for path in paths]
    for guard in guards:
        assert any(name in guard for name in names)
    answers = [
        all(
            eval(guard.replace(names[0], "x"), {**guard_names(), "torch": torch, "x": x})
            for guard in guards
        )
        for x in (X, torch.ones(5, 4), torch.ones(3, 5))
    ]
    assert answers == [True, False, False]


def test_the_place_of_an_input_begins_with_the_name_of_the_argument() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, pair: dict[str, Tensor]) -> Tensor:
            return x + pair["a"]

    program = export(Two(), (X,), {"pair": {"a": X.clone()}}, None)
    ((guards, paths),) = seen_by(guards_written_by, program.module, lambda *args: args)
    assert [(path[0].key, key_text(path[1:])) for path in paths] == [("x", ""), ("pair", "['a']")]
    assert any("L['pair']['a']" in guard for guard in guards)


@pytest.mark.parametrize(
    ("condition", "rows", "others"),
    [
        (lambda n: n * 2 > 4, 7, 2),
        (lambda n: n % 3 == 0, 9, 4),
        (lambda n: n // 2 == 1, 3, 4),
        (lambda n: n < 100, 99, 100),
    ],
    ids=["product", "remainder", "quotient", "limit"],
)
def test_a_guard_of_sizes_can_be_evaluated_for_other_inputs(
    condition: Callable[[Any], bool], rows: int, others: int
) -> None:
    model = Model(lambda self, x: x * 2 if condition(x.shape[0]) else x)
    program = export(model, (X,), {}, ({0: dynamic_where_possible()},))
    ((guards, paths),) = seen_by(guards_written_by, program.module, lambda *args: args)
    name = "L" + key_text(paths[0])

    def hold(n: int) -> bool:
        names = {**guard_names(), "torch": torch, "inf": float("inf"), "x": torch.ones(n, 4)}
        return all(eval(guard.replace(name, "x"), names) for guard in guards)

    assert hold(3)
    assert hold(rows)
    assert not hold(others)


# --- what runs on stand-ins ---


def test_export_runs_the_forward_on_stand_ins_for_tensors() -> None:
    found = []

    def function(self: Model, x: Tensor) -> Tensor:
        y = self.first(x)
        found.append((is_fake(x), is_fake(y)))
        return y

    model = Model(function)
    export(model, (X,), {}, None)
    model(X)
    assert found == [(True, True), (False, False)]


def test_what_is_no_tensor_is_no_stand_in() -> None:
    assert not any(map(is_fake, (X, nn.Parameter(X), 3, None, "text")))


@pytest.mark.parametrize(
    ("function", "rows"),
    [(lambda self, x: self.first(x), [3, 5]), (lambda self, x: x.reshape(2, 6), [3])],
    ids=["any", "fixed"],
)
def test_a_dimension_is_dynamic_where_the_model_allows_it(function: Any, rows: list[int]) -> None:
    module, taken = exported(function, dynamic=True), []
    for n in (3, 5):
        with contextlib.suppress(RuntimeError, AssertionError):
            module(torch.ones(n, 4))
            taken.append(n)
    assert taken == rows


# --- the graph of an exported program ---


def test_the_graph_reads_parameters_under_the_names_that_they_have_in_the_model() -> None:
    graph = exported(lambda self, x: self.second(self.first(x))).graph
    names = ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert [node.target for node in graph.find_nodes(op="get_attr")] == names


def test_the_graph_holds_the_parameters_themselves() -> None:
    model = Model(lambda self, x: self.first(x))
    module: Any = export(model, (X,), {}, None).module()
    assert module.first.weight is model.first.weight


def test_the_graph_has_structures_for_its_inputs_and_outputs() -> None:
    graph = exported(lambda self, x: {"y": self.first(x)}).graph
    names, inputs, outputs = structures_of(graph) or ((), None, None)
    assert list(names) == ["x"]
    assert inputs.num_leaves == outputs.num_leaves == 1


def test_the_inputs_of_the_graph_have_values_of_their_dimensions() -> None:
    (x,) = exported(lambda self, x: self.first(x)).graph.find_nodes(op="placeholder")
    assert isinstance(x.meta["val"], Tensor)
    assert x.meta["val"].dim() == 2


def test_an_input_that_is_none_has_none_for_its_value() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            return x * 2 if mask is None else x * mask

    graph = export(Optional(), (X, None), {}, None).module().graph
    x, mask = graph.find_nodes(op="placeholder")
    assert isinstance(x.meta["val"], Tensor)
    assert mask.meta.get("val") is None


def test_guards_are_a_module_that_the_graph_calls_with_its_inputs() -> None:
    module = exported(lambda self, x: self.first(x))
    (guards,) = module.graph.find_nodes(op="call_module")
    assert guards.target == "_guards_fn"
    assert list(guards.args) == module.graph.find_nodes(op="placeholder")
    assert not guards.users


def owner(node: fx.Node) -> str:
    return next(reversed(node.meta["nn_module_stack"].values()))[0].partition("@")[0]


def test_a_node_tells_the_module_that_was_being_called_also_the_second_time() -> None:
    def function(self: Model, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(self.first(x))))

    graph = exported(function).graph
    nodes = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [owner(node) for node in nodes] == ["first", "first", "second"]
    (relu,) = graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    assert owner(relu) == ""


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


def test_a_node_tells_the_line_of_the_forward_that_made_it() -> None:
    graph = export(nn.Sequential(Activation()), (X,), {}, None).module().graph
    (relu,) = graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    lines = map(str.strip, (relu.stack_trace or "").splitlines())
    line = Activation.forward.__code__.co_firstlineno + 1
    assert f'File "{__file__}", line {line}, in forward' in lines


@pytest.mark.parametrize("function", [F.softsign, F.tanhshrink, F.softmin])
def test_the_nodes_of_one_call_of_a_function_say_so(function: Any) -> None:
    keywords = {"dim": 1} if function is F.softmin else {}
    graph = exported(lambda self, x: function(function(x, **keywords), **keywords)).graph
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        call, name = node.meta.get("torch_fn", ("", ""))
        if name == f"function.{function.__name__}":
            calls.setdefault(call, []).append(node)
    assert len(calls) == 2
    for nodes in calls.values():
        assert len(nodes) > 1
        assert len({n for node in nodes for n in node.all_input_nodes if n not in nodes}) == 1


def test_the_last_node_of_softmin_is_given_the_dimension_behind_its_input() -> None:
    graph = exported(lambda self, x: F.softmin(x, 1, dtype=torch.float64)).graph
    (last,) = graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int)
    assert last.args[1:] == (1, torch.float64)


def test_a_region_without_gradients_is_a_graph_of_its_own() -> None:
    def function(self: Model, x: Tensor) -> Tensor:
        y = self.first(x)
        with torch.no_grad():
            z = self.second(y) * x
        return y + z

    module = exported(function)
    operator = torch.ops.higher_order.wrap_with_set_grad_enabled
    (node,) = module.graph.find_nodes(op="call_function", target=operator)
    enabled, holder, *operands = node.args
    region = getattr(module, str(holder.target))
    assert enabled is False
    assert holder.op == "get_attr"
    inputs = region.graph.find_nodes(op="placeholder")
    assert len(inputs) == len(operands)
    (result,) = node.users
    (output,) = region.graph.find_nodes(op="output")
    assert result.args == (node, 0)
    assert len(output.args[0]) == 1
    assert any(n.target is torch.ops.aten.linear.default for n in region.graph.nodes)


# --- what Dynamo looks into ---


def test_dynamo_looks_into_a_function_that_it_would_skip_if_it_is_told_to() -> None:
    """The functions of torch.fx, which guards may call, are among those."""
    cast = guard_names()["cast_symbool_to_symint_guardless"]

    def check(x: Tensor) -> None:
        if cast(x.shape[0] == 3) != 1:
            raise ValueError(x.shape)

    def function(x: Tensor) -> Tensor:
        traced(x)
        return x * 2

    traced = traced_in_full(check)
    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(X), X * 2)
    with pytest.raises(Unsupported, match="ValueError"):
        compiled(torch.ones(5, 4))


def test_such_a_function_runs_uncompiled_as_it_is() -> None:
    assert traced_in_full(lambda x: x + 1)(2) == 3
