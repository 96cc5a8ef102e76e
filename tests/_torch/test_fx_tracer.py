"""Which hooks of `fx.Tracer` are called for what in a trace, and what the tracer knows then."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.proxy import Proxy, TraceError


class Asked(fx.Tracer):
    """Lists the calls of the hooks."""

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math,))
        self.calls: list[tuple[Any, ...]] = []
        self.owners: dict[str, str] = {}

    def called(self, hook: str) -> list[Any]:
        return [call[1:] for call in self.calls if call[0] == hook]

    def proxy(self, node: fx.Node) -> Proxy:
        self.calls.append(("proxy", node.name))
        return super().proxy(node)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        self.calls.append(("is_leaf_module", m, module_qualified_name))
        return not isinstance(m, Outer | Inner)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        self.calls.append(("create_node", kind, node.target))
        stack = list(self.module_stack.values())
        self.owners[node.name] = stack[-1][0] if stack else ""
        assert all(isinstance(kind, type) for _, kind in stack)
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        self.calls.append(("getattr", attr, attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        self.calls.append(("create_arg", a))
        return super().create_arg(a)

    def to_bool(self, obj: Proxy) -> bool:
        self.calls.append(("to_bool", obj.node.name))
        return True

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn: Any) -> Any:
        self.calls.append(("_proxy_placeholder", name))
        return super()._proxy_placeholder(name, None, sig, fn)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        function, values = super().create_args_for_root(*args, **kwargs)
        self.calls.append(("create_args_for_root", function, values))
        return function, values

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        path = (self.submodule_paths or {})[m]
        self.calls.append(("call_module", m, path, self.is_leaf_module(m, path)))
        return super().call_module(m, forward, args, kwargs)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act = Inner(), nn.ReLU()

    def forward(self, x: Tensor, *more: Tensor, scale: float = 2.0, **rest: Any) -> Tensor:
        y = self.act(self.inner(x))
        if y.sum() > 0:
            y = torch.cat([y, y]) * math.sqrt(x.dim())
        return y


def traced(model: nn.Module) -> tuple[Asked, fx.Graph]:
    tracer = Asked()
    return tracer, tracer.trace(model)


def test_the_tracer_is_asked_for_every_argument_of_the_forward_by_the_name_in_its_code() -> None:
    tracer, graph = traced(Outer())
    names = ["x", "scale", "*more", "**rest"]
    assert [name for (name,) in tracer.called("_proxy_placeholder")] == names
    assert [node.target for node in graph.find_nodes(op="placeholder")] == names


def test_the_arguments_of_the_forward_can_be_exchanged_before_it_is_called() -> None:
    class Other(fx.Tracer):
        def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
            function, values = super().create_args_for_root(*args, **kwargs)
            return function, [values[0], *("constant" for _ in values[1:])]

    found = []

    class Model(nn.Module):
        def forward(self, x: Tensor, y: Any, z: Any = 3) -> Tensor:
            found.extend([y, z])
            return x

    Other().trace(Model())
    assert found == ["constant", "constant"]


def test_the_arguments_of_the_forward_begin_with_the_root() -> None:
    model = Outer()
    tracer, _ = traced(model)
    ((function, values),) = tracer.called("create_args_for_root")
    assert callable(function)
    assert values[0] is model
    assert [v.node.target for v in values[1:]] == ["x", "scale", "*more", "**rest"]


def test_every_call_of_a_submodule_goes_through_the_tracer_with_its_path() -> None:
    model = Outer()
    tracer, graph = traced(model)
    assert tracer.called("call_module") == [
        (model.inner, "inner", False),
        (model.act, "act", True),
    ]
    assert [node.target for node in graph.find_nodes(op="call_module")] == ["act"]


def test_a_submodule_has_the_first_of_its_paths() -> None:
    model = nn.ModuleDict({"a": nn.ReLU()})
    model["b"] = model["a"]
    tracer = Asked()
    tracer.trace(Twice(model))
    assert [call[1] for call in tracer.called("call_module")] == ["parts.a", "parts.a"]


class Twice(nn.Module):
    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["b"](self.parts["a"](x))


def test_the_module_stack_tells_the_owner_of_a_node_while_it_is_made() -> None:
    tracer, _ = traced(Outer())
    assert {name: tracer.owners[name] for name in ("mul", "act", "cat")} == {
        "mul": "inner",
        "act": "act",
        "cat": "",
    }


def test_a_further_owner_can_be_put_on_the_stack_for_one_node() -> None:
    class Whole(Asked):
        def call_module(self, m: Any, forward: Any, args: Any, kwargs: Any) -> Any:
            path = (self.submodule_paths or {})[m]
            self.module_stack[path] = (path, type(m))
            try:
                return self.create_proxy("call_module", path, args, kwargs)
            finally:
                self.module_stack.popitem(last=True)

    tracer = Whole()
    tracer.trace(nn.Sequential(nn.ReLU()))
    assert tracer.owners["_0"] == "0"
    assert not tracer.module_stack


def test_every_node_goes_through_the_tracer_and_the_output_is_the_last() -> None:
    tracer, graph = traced(Outer())
    made = tracer.called("create_node")
    assert [node.op for node in graph.nodes] == [kind for kind, _ in made]
    assert made[-1][0] == "output"


def test_every_proxy_is_made_by_the_tracer() -> None:
    tracer, graph = traced(Outer())
    assert [name for (name,) in tracer.called("proxy")] == [
        node.name for node in graph.nodes if node.op != "output"
    ]


def test_a_proxy_can_be_made_in_another_way_for_one_node() -> None:
    made = []

    class Own(Proxy):
        def __init__(self, node: fx.Node, tracer: fx.Tracer) -> None:
            super().__init__(node, tracer)
            made.append(node.name)

    class Given(fx.Tracer):
        def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
            if not isinstance(attr_val, Tensor):
                return attr_val
            return self.create_proxy(
                "get_attr", "weight", (), {}, proxy_factory_fn=lambda node: Own(node, self)
            )

    graph = Given().trace(Inner())
    assert made == ["weight"]
    assert [node.op for node in graph.nodes] == [
        "placeholder",
        "get_attr",
        "call_function",
        "output",
    ]


def test_reading_a_parameter_goes_through_the_tracer() -> None:
    model = Outer()
    tracer, _ = traced(model)
    read = [name for name, value in tracer.called("getattr") if value is model.inner.weight]
    assert read == ["weight"]


def test_a_branch_goes_through_the_tracer() -> None:
    tracer, _ = traced(Outer())
    assert tracer.called("to_bool") == [("gt",)]


def test_a_branch_that_the_tracer_leaves_to_fx_is_an_error() -> None:
    with pytest.raises(TraceError):
        fx.Tracer().trace(Outer())


def test_a_tensor_in_a_list_goes_through_the_tracer_on_its_own() -> None:
    constant = torch.ones(2)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, constant])

    tracer, _ = traced(Model())
    assert any(a is constant for (a,) in tracer.called("create_arg"))


@pytest.mark.parametrize("kind", [dict, list])
def test_a_subclass_of_dict_or_list_loses_its_class_unless_the_tracer_sees_to_it(kind: Any) -> None:
    class Own(kind):  # type: ignore[misc]
        pass

    graph = fx.symbolic_trace(lambda x: plain(x, Own())).graph
    (node,) = graph.find_nodes(op="call_function", target=plain)
    assert isinstance(node.kwargs["n"], kind)
    assert not isinstance(node.kwargs["n"], Own)


def test_the_containers_in_a_node_are_plain_or_immutable_ones_of_fx() -> None:
    graph = fx.symbolic_trace(lambda x: plain(x, {"a": [1, x]})).graph
    (node,) = graph.find_nodes(op="call_function", target=plain)
    given = node.kwargs["n"]
    assert type(given) in (dict, immutable_dict)
    assert type(given["a"]) in (list, immutable_list)


def test_calls_of_the_wrapped_modules_with_proxies_are_nodes() -> None:
    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return math.floor(x), math.sqrt(x)

    graph = Asked().trace(Rounded())
    targets = [node.target for node in graph.find_nodes(op="call_function", target=math.floor)]
    assert targets == [math.floor]
    assert graph.find_nodes(op="call_function", target=math.sqrt)


def test_a_trace_can_go_back_to_where_it_was() -> None:
    class Back(fx.Tracer):
        def call_module(self, m: Any, forward: Any, args: Any, kwargs: Any) -> Any:
            last = next(iter(reversed(self.graph.nodes)))
            super().call_module(m, forward, args, kwargs)
            for node in list(reversed(self.graph.nodes)):
                if node is last:
                    break
                self.graph.erase_node(node)
            assert not self.module_stack
            return super().call_module(m, forward, args, kwargs)

    graph = Back().trace(nn.Sequential(nn.ReLU(), nn.Tanh()))
    assert [node.target for node in graph.nodes] == ["input", "0", "1", "output"]
    graph.lint()


# --- functions that dispatch on proxies ---


def plain(x: Any, n: Any) -> Any:
    if torch.overrides.has_torch_function_unary(x):
        return torch.overrides.handle_torch_function(plain, (x,), x, n=n)
    return x * n


def test_a_function_that_dispatches_on_its_arguments_is_one_node() -> None:
    graph = fx.symbolic_trace(lambda x: plain(x, 3)).graph
    (node,) = graph.find_nodes(op="call_function", target=plain)
    assert dict(node.kwargs) == {"n": 3}
    assert torch.equal(fx.GraphModule(nn.Module(), graph)(torch.ones(2)), torch.full((2,), 3.0))


def test_the_class_of_proxies_records_a_function_by_itself() -> None:
    found = []

    class Recording(fx.Tracer):
        def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Proxy:
            found.append((kind, target))
            return super().create_proxy(kind, target, *args, **kwargs)

        def to_bool(self, obj: Proxy) -> bool:
            return True

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Proxy.__torch_function__(torch.relu, (Proxy,), (x,), {})

    Recording().trace(Model())
    assert ("call_function", torch.relu) in found
