"""`rewrite`: the nodes that are inserted around a site, written out for small graphs.

Other tests compare results with models written by hand. These compare the graph itself, which also shows a superfluous
copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import freegrad_fx as fg
from freegrad_fx.ops import (
    apply_forward,
    call_with,
    decoupled,
    function_of,
    kept,
    require_frozen,
    stop_gradient,
)
from freegrad_fx.rewrite import without_ambient

SCALE = fg.rules.scale(s=3.0)  # reads nothing
RECTANGULAR = fg.rules.rectangular(a=-1.0, b=1.0)  # reads x
D_RELU = fg.get("d(ReLU)")  # reads only where x is positive


@fg.register("test: rewrite, positive part", overwrite=True)
def positive(grad: Tensor, x: Tensor) -> Tensor:
    """grad·1[x > 0]"""
    return grad * (x > 0)


class Net(nn.Module):
    """The body receives the output of a layer, which is known to be new memory."""

    def __init__(self, body: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Linear(4, 4)
        self.act = nn.ReLU()
        self.act_ = nn.ReLU(inplace=True)
        self.identity = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.body(self, self.linear(x))


class Users(nn.Module):
    """User code that is kept as one opaque call, and could enable gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if x.sum() > 0 else x


SHORT = {stop_gradient: "stop", decoupled: "decoupled", kept: "kept", call_with: "call_with"}


def written(graph: fx.Graph) -> list[str]:
    """A graph without its inputs and output, one call on each line, the nodes by numbers."""
    numbers = {node: str(number) for number, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        name = SHORT.get(node.target) or getattr(node.target, "__name__", str(node.target))
        args = ", ".join(numbers[a] if isinstance(a, fx.Node) else repr(a) for a in node.args)
        rule = f", {node.kwargs['rule']}" if "rule" in node.kwargs else ""
        save = f", save={node.kwargs['save']}" if "save" in node.kwargs else ""
        lines.append(f"{numbers[node]} = {name}({args}{rule}{save})")
    return lines


def rewritten(body: Callable[[Any, Any], Any], rules: Any = SCALE, **options: Any) -> list[str]:
    gm = fg.transform(Net(body), {"relu": rules}, **options)
    gm.graph.lint()
    lines = written(gm.graph)
    assert lines[0] == "1 = linear(0)"
    return lines[1:]


# --- around an operation ---


def test_an_operation_out_of_place() -> None:
    assert rewritten(lambda m, h: torch.relu(h) + h) == [
        "2 = stop(1)",
        "3 = relu(2)",
        "4 = decoupled(3, 1, scale)",
        "5 = add(4, 1)",
    ]


def test_an_operation_out_of_place_needs_no_copy_where_other_memory_is_touched() -> None:
    def body(m: Any, h: Any) -> Any:
        view = h.view(-1)
        return torch.relu(h).add_(1), view + 1

    assert rewritten(body) == [
        "2 = view(1, -1)",
        "3 = stop(1)",
        "4 = relu(3)",
        "5 = decoupled(4, 1, scale)",
        "6 = add_(5, 1)",
        "7 = add(2, 1)",
    ]


def test_an_operation_by_keyword() -> None:
    gm = fg.transform(Net(lambda m, h: F.relu(input=h)), {"relu": SCALE})
    (relu,) = gm.graph.find_nodes(op="call_function", target=F.relu)
    (stop,) = gm.graph.find_nodes(op="call_function", target=stop_gradient)
    assert stop in relu.all_input_nodes


def test_an_operation_in_place_replaces_every_later_use_of_its_input() -> None:
    def body(m: Any, h: Any) -> Any:
        before = h * 2
        F.relu_(h)
        return before + h

    assert rewritten(body) == [
        "2 = mul(1, 2)",
        "3 = stop(1)",
        "4 = relu_(3)",
        "5 = decoupled(4, 1, scale)",
        "6 = add(2, 5)",
    ]


def test_a_rule_that_reads_x_gets_a_copy_of_what_is_overwritten() -> None:
    assert rewritten(lambda m, h: F.relu_(h), RECTANGULAR) == [
        "2 = kept(1)",
        "3 = stop(1)",
        "4 = relu_(3)",
        "5 = decoupled(4, 2, rectangular)",
    ]


def test_a_rule_that_reads_x_gets_a_copy_of_what_is_overwritten_later() -> None:
    def body(m: Any, h: Any) -> Any:
        y = torch.relu(h)
        h.add_(1)
        return y

    expected = ["2 = kept(1)", "3 = stop(1)", "4 = relu(3)", "5 = decoupled(4, 2, rectangular)"]
    assert rewritten(body, RECTANGULAR) == [*expected, "6 = add_(1, 1)"]
    assert rewritten(body, SCALE)[0] == "2 = stop(1)"


def test_a_view_that_is_read_later_makes_the_result_be_written_back() -> None:
    def body(m: Any, h: Any) -> Any:
        view = h.view(-1)
        F.relu_(h)
        return view + 1

    assert rewritten(body) == [
        "2 = view(1, -1)",
        "3 = stop(1)",
        "4 = kept(3)",
        "5 = relu_(4)",
        "6 = decoupled(5, 1, scale)",
        "7 = written_back(1, 6)",
        "8 = add(2, 1)",
    ]
    # the operation overwrites its copy, so a rule that reads x needs another one
    assert rewritten(body, RECTANGULAR) == [
        "2 = view(1, -1)",
        "3 = kept(1)",
        "4 = stop(1)",
        "5 = kept(4)",
        "6 = relu_(5)",
        "7 = decoupled(6, 3, rectangular)",
        "8 = written_back(1, 7)",
        "9 = add(2, 1)",
    ]


def test_an_identity_runs_on_a_copy_if_its_result_is_written_into() -> None:
    def lines(body: Callable[[Any, Any], Any]) -> list[str]:
        gm = fg.transform(Net(body), {nn.Identity: SCALE})
        return written(gm.graph)[1:]

    assert lines(lambda m, h: m.identity(h).add_(1)) == [
        "2 = stop(1)",
        "3 = kept(2)",
        "4 = identity(3)",
        "5 = decoupled(4, 1, scale)",
        "6 = add_(5, 1)",
    ]
    assert lines(lambda m, h: m.identity(h) + 1)[:2] == ["2 = stop(1)", "3 = identity(2)"]


def test_an_identity_runs_on_no_copy_for_code_that_only_may_write() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.identity, self.users = nn.Linear(4, 4), nn.Identity(), Users()

        def forward(self, x: Tensor) -> Any:
            return self.users(self.identity(self.linear(x)))

    gm = fg.transform(Opaque(), {nn.Identity: SCALE}, leaf_modules=(Users,))
    assert not gm.graph.find_nodes(op="call_function", target=kept)


# --- rules that read only where x is positive ---


def test_such_a_rule_reads_the_output_of_a_function() -> None:
    assert rewritten(lambda m, h: torch.relu(h), D_RELU)[-1].endswith(", save=y)")


@pytest.mark.parametrize(
    "body",
    [
        lambda m, h: torch.relu(h).add_(1),  # the output is overwritten
        lambda m, h: m.act(h),  # hooks can replace what a module returns
    ],
    ids=["overwritten", "module"],
)
def test_such_a_rule_reads_x_where_the_output_can_change(body: Any) -> None:
    assert not any("save=" in line for line in rewritten(body, D_RELU))


@pytest.mark.parametrize("body", [lambda m, h: F.relu_(h), lambda m, h: m.act_(h)])
def test_such_a_rule_needs_no_copy_of_what_is_overwritten(body: Any) -> None:
    lines = rewritten(body, D_RELU)
    assert lines[0] == "2 = stop(1)"
    assert lines[-1].endswith(", save=overwritten)")


def test_such_a_rule_gets_a_copy_where_another_rule_reads_x() -> None:
    lines = rewritten(lambda m, h: F.relu_(h), fg.compose(D_RELU, RECTANGULAR))
    assert lines[0] == "2 = kept(1)"
    assert not any("save=" in line for line in lines)


def test_another_rule_or_option_reads_x_itself() -> None:
    for rule in (
        RECTANGULAR,
        D_RELU(save="mask"),
        fg.get("test: rewrite, positive part"),
    ):
        assert not any("save=y" in line for line in rewritten(lambda m, h: torch.relu(h), rule))


# --- compositions ---


def test_a_composition_is_a_chain_with_the_last_rule_nearest_to_x() -> None:
    # a rule that reads x reads the operation's own: the rectangular one has x as a third argument
    rules = fg.compose(SCALE, RECTANGULAR, fg.rules.reverse(alpha=2.0))
    assert rewritten(lambda m, h: torch.relu(h), rules) == [
        "2 = stop(1)",
        "3 = decoupled(2, 1, reverse)",
        "4 = stop(3)",
        "5 = decoupled(4, 3, 1, rectangular)",
        "6 = stop(1)",
        "7 = relu(6)",
        "8 = decoupled(7, 5, scale)",
    ]


# --- ambient sites ---


def test_an_ambient_site_copies_what_is_overwritten_only_while_a_rule_acts() -> None:
    gm = fg.transform(Net(lambda m, h: F.relu_(h)))
    ambient = [n for n in gm.graph.nodes if n.kwargs.get("ambient") == "activations"]
    assert [n.target for n in ambient] == [kept, stop_gradient, decoupled]


def test_what_is_around_ambient_sites_can_be_taken_out_again() -> None:
    net = Net(lambda m, h: torch.relu(h))
    plain = written(fg.transform(net, {"relu": None}).graph)
    graph = fg.transform(net).graph
    found = without_ambient(graph)
    assert {name for name in found if isinstance(name, str)} == {"linear.weight", "linear.bias"}
    assert [node.target for node in found if isinstance(node, fx.Node)] == [torch.relu]
    assert not graph.find_nodes(op="call_function", target=decoupled)
    assert not graph.find_nodes(op="call_function", target=stop_gradient)
    assert [line.partition(" = ")[2][:4] for line in plain][-1] == "relu"


def test_what_a_table_has_decided_is_not_taken_out() -> None:
    graph = fg.transform(Net(lambda m, h: torch.relu(h)), {"relu": SCALE}).graph
    before = written(graph)
    assert without_ambient(graph) == set()
    assert written(graph) == before


# --- replaced forwards ---


def users_forward(x: Tensor) -> Tensor:
    return x * 2


class Doubles:
    def __call__(self, x: Tensor) -> Tensor:
        return x * 2


def replacement(forward: Any) -> fx.Node:
    """The node that runs instead of the ReLU."""
    rule = fg.rules.straight_through(forward=forward)
    graph = fg.transform(Net(lambda m, h: torch.relu(h)), {"relu": rule}).graph
    assert not graph.find_nodes(op="call_function", target=torch.relu)
    (stop,) = graph.find_nodes(op="call_function", target=stop_gradient)
    (node,) = stop.users
    return node


def test_a_forward_of_the_vocabulary_and_of_torch() -> None:
    assert replacement("tanh").target is F.tanh or replacement("tanh").target is torch.tanh
    assert replacement(torch.sign).target is torch.sign
    method = replacement(Tensor.sign)
    assert (method.op, method.target) == ("call_method", "sign")


@pytest.mark.parametrize("forward", [users_forward, Doubles()], ids=["function", "object"])
def test_a_forward_of_the_users(forward: Any) -> None:
    node = replacement(forward)
    assert node.target is apply_forward
    assert function_of(node.args[1]) is forward


def test_a_partial_forward_is_taken_apart() -> None:
    node = replacement(functools.partial(functools.partial(F.hardtanh, min_val=-2.0), max_val=2.0))
    assert node.target is F.hardtanh
    assert node.kwargs == {"min_val": -2.0, "max_val": 2.0}


def power(base: float, x: Tensor, scale: float = 1.0) -> Tensor:
    return scale * base**x


def test_what_a_partial_binds_comes_before_x() -> None:
    node = replacement(functools.partial(power, 2.0, scale=3.0))
    assert node.target is apply_forward
    assert node.args[2:] == (2.0,)
    assert node.kwargs == {"scale": 3.0}


def test_partials_in_each_other_bind_as_python_does() -> None:
    inner = functools.partial(users_sum, 1.0, c=4.0, d=5.0)
    inner.note = "Python joins partials into one, but not those with attributes"  # type: ignore[attr-defined]
    outer = functools.partial(inner, 2.0, d=6.0)
    node = replacement(outer)
    assert function_of(node.args[1]) is users_sum
    assert node.args[2:] == (1.0, 2.0)
    assert node.kwargs == {"c": 4.0, "d": 6.0}


def users_sum(a: float, b: float, x: Tensor, c: float, d: float) -> Tensor:
    return a + b * x + c + d


def test_a_method_is_called_on_what_a_partial_binds_first() -> None:
    node = replacement(functools.partial(Tensor.sub, torch.ones(4)))
    assert (node.op, node.target) == ("call_method", "sub")
    assert [arg.op for arg in node.args] == ["get_attr", "call_function"]


def test_a_partial_with_a_tensor_reads_it_from_the_model() -> None:
    tensor = torch.ones(4)
    rule = fg.rules.straight_through(forward=functools.partial(torch.add, tensor))
    gm = fg.transform(Net(lambda m, h: torch.relu(h)), {"relu": rule})
    (add,) = gm.graph.find_nodes(op="call_function", target=torch.add)
    assert add.args[0].target == "rule_parameter_0"
    assert gm.rule_parameter_0 is tensor
    assert "rule_parameter_0" not in gm.state_dict()


def test_a_partial_with_a_value_that_code_cannot_hold_stays_one_function() -> None:
    forward = functools.partial(power, scale=object())
    node = replacement(forward)
    assert node.target is apply_forward
    assert function_of(node.args[1]) is forward


# --- tensors as parameters of rules ---


def test_tensors_become_buffers_once_each_and_parameters_stay_what_they_are() -> None:
    net = Net(lambda m, h: torch.relu(torch.relu(h) + 1) + torch.relu(h))
    a, b = torch.tensor(2.0), torch.tensor(3.0)
    table = fg.RuleTable(
        [
            fg.on("relu", call=0).backward("scale", s=a),
            fg.on("relu", call=1).backward("scale", s=b),
            fg.on("relu", call=2).backward("scale", s=a),
        ]
    )
    gm = fg.transform(net, table)
    assert dict(gm.named_buffers()) == {"rule_parameter_0": a, "rule_parameter_1": b}
    sites = gm.graph.find_nodes(op="call_function", target=decoupled)
    buffers = [node.kwargs["s"].target for node in sites]
    assert buffers[0] == buffers[2] != buffers[1]
    gain = net.register_parameter("gain", nn.Parameter(torch.tensor(2.0))) or net.gain
    with pytest.warns(fg.FreegradWarning, match="requires a gradient"):
        gm = fg.transform(net, {"relu": fg.rules.scale(s=gain)})
    assert {
        n.kwargs["s"].target for n in gm.graph.find_nodes(op="call_function", target=decoupled)
    } == {"gain"}
    assert not dict(gm.named_buffers())


# --- parameters ---


def decoupled_parameters(model: nn.Module, rules: Any = SCALE) -> fx.Graph:
    gm = fg.transform(model, {"params": rules})
    gm.graph.lint()
    graph: fx.Graph = gm.graph
    return graph


def test_a_parameter_is_decoupled_once_at_the_beginning_and_every_use_reads_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + self.weight

    assert written(decoupled_parameters(Twice())) == [
        "1 = weight()",
        "2 = stop(1)",
        "3 = decoupled(2, 1, scale)",
        "4 = mul(0, 3)",
        "5 = add(4, 3)",
    ]


def test_a_module_is_called_with_its_decoupled_parameters() -> None:
    graph = decoupled_parameters(nn.Sequential(nn.Linear(2, 2)))
    (call,) = graph.find_nodes(op="call_function", target=call_with)
    assert not graph.find_nodes(op="call_module", target="0")
    assert call.args[0].target == "0"
    assert {name: node.target for name, node in call.args[1].items()} == {
        "weight": decoupled,
        "bias": decoupled,
    }
    assert call.args[2].op == "placeholder"


def test_what_is_inserted_stands_behind_all_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * self.weight + y

    ops = [node.op for node in decoupled_parameters(Two()).nodes]
    assert ops[:3] == ["placeholder", "placeholder", "get_attr"]


def test_a_call_keeps_its_keywords_and_its_origin() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(input=x)

    (call,) = decoupled_parameters(Keywords()).find_nodes(op="call_function", target=call_with)
    assert {name: node.name for name, node in call.kwargs.items()} == {"input": "x"}
    assert call.meta["freegrad_fx"].source.startswith(f"{__file__}:")


def test_a_second_transform_adds_to_the_parameters_of_a_call() -> None:
    model: nn.Module = nn.Sequential(nn.Linear(4, 4))
    for name in ("weight", "bias"):
        model = fg.transform(model, fg.RuleTable([fg.on(parameter=f"*.{name}").backward(SCALE)]))
    (call,) = model.graph.find_nodes(op="call_function", target=call_with)
    assert call.args[1].keys() == {"weight", "bias"}


def test_a_call_whose_forward_is_replaced_needs_no_parameter() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.PReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x) * self.act.weight

    rules = {"prelu": fg.rules.straight_through(forward="tanh"), "params": SCALE}
    graph = fg.transform(Gain(), rules).graph
    assert not graph.find_nodes(op="call_function", target=call_with)
    assert len(graph.find_nodes(op="call_function", target=decoupled)) == 2


def test_a_parameter_that_is_overwritten_is_copied_for_a_rule_that_reads_it() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.weight
            self.weight.data.mul_(2)
            return y

    class Reads(Writes):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    def copies(model: nn.Module, rules: Any) -> int:
        graph = decoupled_parameters(model, rules)
        return len(graph.find_nodes(op="call_function", target=kept))

    assert copies(Writes(), RECTANGULAR) == 1
    assert copies(Writes(), SCALE) == 0
    assert copies(Reads(), RECTANGULAR) == 0


@pytest.mark.parametrize(("max_norm", "copies"), [(1.0, 1), (None, 0)])
def test_a_table_that_a_lookup_renormalises_is_copied_too(max_norm: Any, copies: int) -> None:
    model = nn.Sequential(nn.Embedding(4, 4, max_norm=max_norm))
    graph = decoupled_parameters(model, RECTANGULAR)
    assert len(graph.find_nodes(op="call_function", target=kept)) == copies


def test_a_frozen_parameter_is_checked_and_keeps_its_uses() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    graph = decoupled_parameters(model)
    (check,) = graph.find_nodes(op="call_function", target=require_frozen)
    assert check.args[1] == "0.weight"
    (call,) = graph.find_nodes(op="call_function", target=call_with)
    assert call.args[1].keys() == {"bias"}


def test_gradients_are_enabled_around_the_rules_only_for_user_code() -> None:
    def setters(model: nn.Module) -> list[Any]:
        graph = fg.transform(model, {"params": SCALE}, leaf_modules=(Users,)).graph
        nodes = graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
        return [node.args[0] for node in nodes]

    enabled, restored = setters(nn.Sequential(Users()))
    assert enabled is True
    assert restored.target is torch.is_grad_enabled
    assert setters(nn.Sequential(nn.Linear(4, 4))) == []


# --- origins ---


def test_new_nodes_come_from_where_the_site_does() -> None:
    gm = fg.transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {"relu": SCALE})
    (relu,) = gm.graph.find_nodes(op="call_module", target="1")
    for target in (stop_gradient, decoupled):
        (node,) = gm.graph.find_nodes(op="call_function", target=target)
        assert node.meta["freegrad_fx"] == relu.meta["freegrad_fx"]
