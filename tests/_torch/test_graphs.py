"""What is taken for granted of torch.fx: nodes, code generation, and functions that graphs call."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from freegrad_fx._torch.graphs import (
    INPUT_STRUCTURE,
    OUTPUT_STRUCTURE,
    assertion,
    attributes_written_by,
    code_generator,
    forward_from_source,
    generated_code,
    grad_mode_setter,
    is_erased,
    make_fx,
    qualified_name,
    set_generated_graph,
    structures_of,
    with_structures,
)

X = torch.tensor([1.0, -2.0])


def calling(target: Callable[..., Any], *more: Any) -> fx.Graph:
    """A graph that calls a function with its input."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(target, (x, *more)))
    return graph


# --- functions that graphs call ---


def test_a_graph_can_change_the_grad_mode() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(grad_mode_setter(), (False,))
    unlearned = graph.call_method("mul", (x, 2))
    graph.call_function(grad_mode_setter(), (True,))
    learned = graph.call_method("mul", (x, 2))
    graph.output((unlearned, learned))
    module = fx.GraphModule(nn.Module(), graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    results = module(torch.ones(2, requires_grad=True))
    assert [result.requires_grad for result in results] == [False, True]
    assert torch.is_grad_enabled()


def test_a_graph_can_check_a_condition() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(assertion(), (x, "it has to be so"))
    graph.output(x)
    module = fx.GraphModule(nn.Module(), graph)
    assert module(True) is True
    assert module(torch.tensor(True)).item() is True
    for wrong in (False, torch.tensor(False)):
        with pytest.raises(AssertionError, match="it has to be so"):
            module(wrong)


def test_a_check_of_a_proxy_is_recorded() -> None:
    graph = fx.symbolic_trace(lambda x: (assertion()(x, "so"), x)[1]).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [assertion()]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.relu, "torch.relu"),
        (F.relu, "torch.nn.functional.relu"),
        (F.max_pool2d, "torch.nn.functional.max_pool2d"),
        (torch.ops.aten.relu.default, "torch.ops.aten.relu.default"),
        (torch.ops.aten.softmax.int, "torch.ops.aten.softmax.int"),
        (operator.add, "_operator.add"),
        (torch._C._nn.gelu, "torch._C._nn.gelu"),
        (grad_mode_setter(), "torch._C._set_grad_enabled"),
        (assertion(), "torch._assert"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_the_qualified_name_of_a_function_leads_back_to_it(function: Any, name: str) -> None:
    assert qualified_name(function) == name
    roots = {"torch": torch, "_operator": operator}
    first, *rest = name.split(".")
    assert reduce(getattr, rest, roots[first]) is function


# --- the code of a GraphModule ---


def test_source_becomes_a_function_that_finds_the_names_it_is_given() -> None:
    made = forward_from_source("def forward(self, x):\n    return scale(x)\n", {"scale": abs}, {})
    assert isinstance(made, types.FunctionType)
    assert made(None, -3) == 3


def test_the_generated_code_is_that_of_the_last_recompilation() -> None:
    module = fx.GraphModule(nn.Module(), calling(torch.relu))
    before = generated_code(module)
    assert before == module.code
    assert "torch.relu(x)" in before
    (node,) = module.graph.find_nodes(op="call_function", target=torch.relu)
    node.target = torch.tanh
    assert generated_code(module) == before
    module.recompile()
    assert "torch.tanh(x)" in generated_code(module)


def test_a_recompilation_returns_its_source_and_what_that_refers_to() -> None:
    module = fx.GraphModule(nn.Module(), calling(F.softplus))
    result = module.recompile()
    forward = forward_from_source(result.src, {**result.globals}, {})
    assert torch.equal(forward(module, X), F.softplus(X))
    assert result.src.lstrip().startswith("def forward(self, x")


def test_a_recompilation_puts_the_forward_and_the_call_on_a_class_of_the_instance() -> None:
    one, other = (fx.GraphModule(nn.Module(), calling(f)) for f in (torch.relu, torch.tanh))
    assert type(one) is not type(other)
    for name in ("forward", "__call__"):
        assert name in vars(type(one))
    del type(one).__call__
    assert torch.equal(one(X), X.relu())


def test_a_module_runs_the_graph_that_is_set_from_the_next_recompilation_on() -> None:
    module = fx.GraphModule(nn.Module(), calling(torch.relu))
    tanh = calling(torch.tanh)
    set_generated_graph(module, tanh)
    assert torch.equal(module(X), X.relu())
    assert fx.GraphModule.graph.fget(module) is tanh
    fx.GraphModule.recompile(module)
    assert torch.equal(module(X), X.tanh())


def test_an_object_with_the_state_of_an_empty_graph_module_is_one() -> None:
    """A captured model is made so, whose class inherits from the model's."""
    blank = vars(fx.GraphModule(nn.Module(), fx.Graph()))
    made = types.new_class("Made", (fx.GraphModule, nn.Linear))
    module = object.__new__(made)
    module.__dict__.update({**blank, **vars(nn.Linear(2, 2))})
    set_generated_graph(module, calling(torch.relu))
    module.recompile()
    assert torch.equal(module(X), X.relu())
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]


# --- nested inputs and outputs ---

INPUTS = pytree.tree_structure((({"a": 0, "b": 0},), {}))
OUTPUTS = pytree.tree_structure([0])


def nested() -> fx.Graph:
    """A graph of a function from a dict with two tensors to a list with their sum."""
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    graph.output((graph.call_function(torch.add, (a, b)),))
    graph.set_codegen(with_structures(["inputs"], INPUTS, OUTPUTS))
    return graph


def test_a_graph_with_structures_takes_nested_inputs_and_returns_nested_outputs() -> None:
    module = fx.GraphModule(nn.Module(), nested())
    (result,) = module({"a": X, "b": X})
    assert torch.equal(result, 2 * X)


def test_structures_are_those_that_were_given() -> None:
    names, inputs, outputs = structures_of(nested()) or ((), None, None)
    assert (list(names), inputs, outputs) == (["inputs"], INPUTS, OUTPUTS)


def test_structures_make_a_generator_like_the_one_they_were_read_from() -> None:
    graph, other = nested(), fx.Graph()
    other.set_codegen(with_structures(*(structures_of(graph) or ())))
    assert structures_of(other) == structures_of(graph)


def test_a_flat_graph_has_no_structures() -> None:
    assert structures_of(calling(torch.relu)) is None
    assert structures_of(fx.symbolic_trace(nn.ReLU()).graph) is None


def test_the_code_reads_the_structures_from_attributes_of_the_module() -> None:
    module = fx.GraphModule(nn.Module(), nested())
    assert getattr(module, INPUT_STRUCTURE) == INPUTS
    assert getattr(module, OUTPUT_STRUCTURE) == OUTPUTS
    code = generated_code(module)
    assert f"fx_pytree.tree_flatten_spec(([inputs], {{}}), self.{INPUT_STRUCTURE})" in code
    assert f"self.{OUTPUT_STRUCTURE}" in code


def test_the_code_reads_no_structures_in_a_flat_graph() -> None:
    module = fx.GraphModule(nn.Module(), calling(torch.relu))
    code = generated_code(module)
    assert INPUT_STRUCTURE not in code
    assert OUTPUT_STRUCTURE not in code


def test_what_generates_the_code_of_a_graph_can_be_exchanged_and_put_back() -> None:
    graph = nested()
    generator, plain = code_generator(graph), CodeGen()
    graph.set_codegen(plain)
    assert code_generator(graph) is plain
    assert structures_of(graph) is None
    graph.set_codegen(generator)
    assert structures_of(graph) == (["inputs"], INPUTS, OUTPUTS)


# --- nodes ---


def test_a_node_is_erased_once_it_is_taken_out_of_its_graph() -> None:
    graph = calling(torch.relu)
    unused = graph.call_function(torch.tanh, (next(iter(graph.nodes)),))
    assert not any(map(is_erased, graph.nodes))
    graph.erase_node(unused)
    assert is_erased(unused)
    assert not any(map(is_erased, graph.nodes))


def test_nodes_are_compared_by_their_place_in_the_graph() -> None:
    graph = calling(torch.relu)
    x, relu, output = graph.nodes
    with graph.inserting_before(relu):
        between = graph.call_function(torch.tanh, (x,))
    assert x < between < relu < output
    assert not relu < between


# --- names of attributes ---


def test_attributes_are_written_as_a_function_says_in_the_block_alone() -> None:
    root = nn.Module()
    root.add_module("part", nn.Linear(2, 2))
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_module("part", (x,)), graph.get_attr("part.weight")))
    module = fx.GraphModule(root, graph)
    plain = generated_code(module)
    asked = []

    def write(usual: Callable[[str, str], str]) -> Callable[[str, str], str]:
        def written(base: str, target: str) -> str:
            asked.append((base, target))
            return f"({usual(base, target)})"

        return written

    with attributes_written_by(write):
        module.recompile()
    assert asked == [("self", "part"), ("self", "part.weight")]
    assert "(self.part)(x)" in generated_code(module)
    assert "(self.part.weight)" in generated_code(module)
    module(torch.ones(1, 2))
    module.recompile()
    assert generated_code(module) == plain


def test_a_submodule_that_is_named_as_a_keyword_needs_other_text() -> None:
    root = nn.Module()
    root.add_module("in", nn.ReLU())
    graph = fx.Graph()
    graph.output(graph.call_module("in", (graph.placeholder("x"),)))

    with attributes_written_by(lambda _: lambda base, target: f'getattr({base}, "{target}")'):
        module = fx.GraphModule(root, graph)
    assert torch.equal(module(X), X.relu())


# --- make_fx ---


def test_make_fx_records_operators_of_aten_by_name() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.zeros_like(x) + x.new_ones(2) * x.sin()

    graph = make_fx(function)(X).graph
    called = [node for node in graph.nodes if node.op == "call_function"]
    names = [node.target._opname for node in called]
    assert names == ["zeros_like", "new_ones", "sin", "mul", "add"]


def test_make_fx_records_of_a_derivative_what_it_depends_on() -> None:
    """Whether that is the gradient tells whether a rule is linear in it."""

    def depends(rule: Callable[[Tensor], Tensor]) -> bool:
        graph = make_fx(lambda grad, v: torch.func.vjp(rule, grad)[1](v)[0])(X, X.clone()).graph
        grad, *others = graph.nodes
        reached = {grad}
        for node in others:
            if not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
        return others[-1] in reached

    assert not depends(lambda grad: grad * 3)
    assert depends(lambda grad: grad * grad)
