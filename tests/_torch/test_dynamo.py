"""What is taken for granted of Dynamo and AOTAutograd: their graphs, their guards and their calls."""

from __future__ import annotations

import contextlib
import operator
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import config
from torch._dynamo.exc import RecompileError, Unsupported
from torch._inductor.exc import InductorError
from torch.utils.checkpoint import checkpoint

from freegrad_fx._torch.dispatch import DispatchMode, in_function_transform
from freegrad_fx._torch.dynamo import (
    add_guard,
    compile_wrapper_of,
    compiled_function,
    compiler,
    gives_up_recompiling,
    is_compile_error,
    is_compiling,
    is_compiling_backward,
    is_tracing,
    leave_to_python,
    looked_into,
    name_sources,
    skip,
    takes_for_constant,
    tracing_context,
    wrap_compiled_function,
)
from freegrad_fx._torch.graphs import grad_mode_setter
from freegrad_fx._torch.modules import call_code
from freegrad_fx._torch.operators import GraphOperator, operator_name

# PyTorch's own: of the decompositions that forward mode compiles, and of one release of Python
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:Guards may run slower"),
]

X = torch.tensor([0.5, -2.0])


class Kept:
    """A backend that keeps the graphs it is given, and lets a function look at each.

    Args:
        look: Called with the graph while it is compiled.
        inner: What compiles it.
    """

    def __init__(self, look: Callable[[fx.GraphModule], Any] | None = None, inner: Any = None):
        self.look = look
        self.inner = inner
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(gm)
        if self.look is not None:
            self.look(gm)
        return gm.forward if self.inner is None else compiler(self.inner, *[None] * 3)(gm, inputs)


def captured(function: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """The one graph of a function."""
    backend = Kept()
    torch.compile(function, backend=backend)(*(args or (X,)))
    (graph,) = backend.graphs
    return graph


def calls_in(graph_module: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


# --- what Dynamo makes of a function ---


def test_the_answer_of_a_marked_function_is_a_constant_of_the_graph() -> None:
    asked = []

    @takes_for_constant
    def answer() -> int:
        asked.append(sys._getframe(1) is not None)  # nothing that Dynamo would trace
        return len(asked)

    backend = Kept()
    compiled = torch.compile(lambda x: x * answer(), backend=backend, fullgraph=True)
    assert torch.equal(compiled(X), X)
    assert torch.equal(compiled(X), X)
    assert len(asked) == 1
    (mul,) = [node for node in backend.graphs[0].graph.nodes if node.op == "call_function"]
    assert mul.args[1:] == (1,)


def test_a_marked_function_may_be_given_constants_and_answer_with_text() -> None:
    @takes_for_constant
    def written(name: str, values: tuple[Any, ...]) -> str:
        return f"{name}{values}{sys._getframe(0).f_lineno > 0}"

    def function(x: Tensor) -> Tensor:
        text = written("a", (1, True))
        return x * 2 if text == "a(1, True)True" else x

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), X * 2)


def test_a_marked_function_is_as_ever_where_nothing_is_compiled() -> None:
    asked = []
    function = takes_for_constant(lambda: asked.append(1))
    function()
    function()
    assert asked == [1, 1]


def test_a_marked_function_is_in_the_transform_that_dynamo_traces() -> None:
    @takes_for_constant
    def inside() -> bool:
        return in_function_transform()

    def function(x: Tensor) -> Any:
        outside = inside()
        gradient = torch.func.grad(lambda x: (x * (2 if inside() else 3)).sum())(x)
        return gradient, outside

    gradient, outside = torch.compile(function, backend="eager", fullgraph=True)(X)
    assert gradient.tolist() == [2, 2]
    assert not outside


def test_a_function_that_is_left_to_python_runs_between_graphs() -> None:
    called = []

    @leave_to_python
    def note() -> None:
        called.append("note")

    def function(x: Tensor) -> Tensor:
        y = x * 2
        note()
        return y + 1

    backend = Kept()
    compiled = torch.compile(function, backend=backend)
    for _ in range(2):
        assert torch.equal(compiled(X), X * 2 + 1)
    assert called == ["note", "note"]
    assert list(map(calls_in, backend.graphs)) == [[operator.mul], [operator.add]]
    with pytest.raises(Unsupported):
        torch.compile(function, backend="eager", fullgraph=True)(X)


def test_a_function_that_is_left_to_python_is_not_compiled_and_neither_is_what_it_calls() -> None:
    found = []

    def ask() -> None:
        found.append(torch.compiler.is_compiling())

    @leave_to_python
    def outer() -> None:
        found.append(torch.compiler.is_compiling())
        ask()

    def function(x: Tensor) -> Tensor:
        y = x * 2
        outer()
        return y + 1

    torch.compile(function, backend="eager")(X)
    assert found == [False, False]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_backward_that_is_traced_knows_it(backend: str) -> None:
    """`torch.compiler.is_compiling` answers no there in torch 2.12."""
    found = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            found.append((type(grad) is Tensor, is_compiling()))
            return grad * 2

    library = torch.library.Library("freegrad_fx_probe", "FRAGMENT")
    library.define(f"doubled_{backend}(Tensor x) -> Tensor")
    library.impl(f"doubled_{backend}", lambda x: Doubled.apply(x), "CompositeImplicitAutograd")
    doubled = getattr(torch.ops.freegrad_fx_probe, f"doubled_{backend}")
    x = X.clone().requires_grad_()
    # a graph that was compiled before would come from a cache
    with torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compile(lambda x: doubled(x), backend=backend)(x).sum().backward()
    Doubled.apply(x).sum().backward()
    assert found == [(False, True), (True, False)]


def test_a_block_whose_methods_are_left_to_python_is_in_force_in_the_code_inside() -> None:
    class Block(contextlib.ContextDecorator):
        entered = 0

        @leave_to_python
        def __enter__(self) -> None:
            Block.entered += 1

        @leave_to_python
        def __exit__(self, *_: object) -> None:
            Block.entered -= 1

    def function(x: Tensor) -> Tensor:
        with Block():
            y = x * (2 if Block.entered else 3)
        return y * (5 if Block.entered else 7)

    for run in (torch.compile(function, backend="eager"), function):
        assert torch.equal(run(X), X * 14)
        assert Block.entered == 0


def test_no_frame_of_a_skipped_code_is_compiled_but_what_it_calls_is() -> None:
    def inner(x: Tensor) -> Tensor:
        return x.sin()

    def outer(x: Tensor) -> Tensor:
        return inner(x * 2) + 1

    skip(outer.__code__)
    backend = Kept()
    compiled = torch.compile(outer, backend=backend)
    assert torch.equal(compiled(X), (X * 2).sin() + 1)
    (graph,) = backend.graphs
    assert [n.target for n in graph.graph.nodes if n.op.startswith("call")] == ["sin"]


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]


def test_an_operator_is_one_node_for_dynamo_and_aot_autograd_finds_the_function_in_it() -> None:
    with torch.library._scoped_library("freegrad_fx_probe", "FRAGMENT") as library:
        library.define("tripled(Tensor x, str text) -> Tensor")
        library.impl("tripled", lambda x, text: Tripled.apply(x), "CompositeImplicitAutograd")
        tripled = torch.ops.freegrad_fx_probe.tripled
        backend = Kept(inner="aot_eager")
        compiled = torch.compile(lambda x: tripled(x, "text"), backend=backend, fullgraph=True)
        x = X.clone().requires_grad_()
        compiled(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [3, 3]
        ((called,),) = map(calls_in, backend.graphs)
        assert called in (tripled, tripled.default)


# --- what is being compiled now ---


def test_a_graph_is_traced_while_it_is_compiled_and_not_before_or_when_it_runs() -> None:
    found: list[tuple[str, bool]] = []

    class Running(Kept):
        def __call__(self, gm: fx.GraphModule, inputs: Any) -> Any:
            found.append(("compiles", is_tracing()))

            def run(*args: Any) -> Any:
                found.append(("runs", is_tracing()))
                return gm.forward(*args)

            return run

    assert not is_tracing()
    assert tracing_context() is None
    torch.compile(lambda x: x * 2, backend=Running())(X)
    assert found == [("compiles", True), ("runs", False)]
    assert not is_tracing()


def test_code_that_aot_autograd_traces_knows_that_it_runs_on_stand_ins() -> None:
    found = []

    def asking(x: Tensor) -> Tensor:
        found.append(is_tracing())
        return x.sin()

    def exchange(gm: fx.GraphModule) -> None:
        (node,) = gm.graph.find_nodes(op="call_method", target="sin")
        node.op, node.target = "call_function", asking
        gm.recompile()

    compiled = torch.compile(lambda x: x.sin(), backend=Kept(exchange, inner="aot_eager"))
    compiled(X)
    traced = len(found)
    assert traced
    compiled(X)
    assert found == [True] * traced


def test_every_graph_has_a_context_of_its_own_that_can_be_referred_to_weakly() -> None:
    counts: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    @takes_for_constant
    def number() -> int:
        context = tracing_context()
        counts[context] = counts.get(context, 0) + 1
        return counts[context]

    def function(x: Tensor) -> list[int]:
        return [number(), number(), x.shape[0] * 0]

    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=False)
    assert compiled(X) == compiled(torch.ones(3)) == [1, 2, 0]


def test_the_compilation_of_a_backward_is_told_from_that_of_a_forward() -> None:
    forward, backward = (Kept(lambda _: found.append(is_compiling_backward())) for _ in range(2))
    found: list[bool] = []
    y = torch.compile(lambda x: x.sin().sum(), backend=forward)(X.clone().requires_grad_())
    assert found == [False]
    found.clear()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backward)):
        y.backward()
    assert found
    assert all(found)
    assert not is_compiling_backward()


def test_a_guard_compiles_anew_where_its_condition_does_not_hold_and_never_else() -> None:
    state = {"mode": "a"}

    def guard(_: fx.GraphModule) -> None:
        mode = state["mode"]
        add_guard(lambda _: state["mode"] == mode, "the mode is the same")

    backend = Kept(guard)
    compiled = torch.compile(lambda x: x * 2, backend=backend)
    compiled(X)
    compiled(X)
    assert len(backend.graphs) == 1
    state["mode"] = "b"
    compiled(X)
    compiled(X)
    assert len(backend.graphs) == 2
    state["mode"] = "a"  # for which there is code
    compiled(X)
    assert len(backend.graphs) == 2


def test_a_guard_is_called_by_its_words_where_dynamo_says_why_it_compiles_anew() -> None:
    holds = [True]
    backend = Kept(lambda _: add_guard(lambda _: holds[0], "freegrad_fx: the words"))
    compiled = torch.compile(lambda x: x * 2, backend=backend)
    compiled(X)
    holds[0] = False
    with (
        config.patch(error_on_recompile=True),
        pytest.raises(RecompileError, match="freegrad_fx: the words"),
    ):
        compiled(X)


def test_a_guard_that_is_added_where_nothing_is_traced_is_none() -> None:
    add_guard(lambda _: False, "of nothing")


def test_aot_autograd_takes_a_tensor_that_was_put_into_a_graph_once_its_source_is_named() -> None:
    def put_in(gm: fx.GraphModule) -> None:
        gm.register_buffer("scale", torch.full((2,), 3.0))
        (node,) = gm.graph.find_nodes(op="call_function", target=torch.mul)
        with gm.graph.inserting_before(node):
            scale = gm.graph.get_attr("scale")
        node.args = (node.args[0], scale)
        gm.recompile()
        name_sources(gm)

    compiled = torch.compile(lambda x: torch.mul(x, 2), backend=Kept(put_in, inner="aot_eager"))
    assert torch.equal(compiled(X), X * 3)


def test_a_graph_module_that_is_not_dynamos_has_no_sources_to_name() -> None:
    name_sources(fx.symbolic_trace(nn.Sequential(nn.BatchNorm1d(2))))


# --- compilers ---


def test_compilers_are_called_as_torch_compile_calls_them() -> None:
    given = []

    def inner(gm: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        given.append(options)
        return gm.forward

    gm = fx.symbolic_trace(lambda x: x * 2)
    for name in ("eager", inner):
        found = compiler(name, None, None, None)(gm, [X])(X)
        assert torch.equal(found, X * 2)
    compiler(inner, "a mode", {"an": "option"}, None)(gm, [X])
    assert given == [{}, {"mode": "a mode", "options": {"an": "option"}}]


@pytest.mark.parametrize("name", ["eager", "aot_eager"])
def test_a_backend_may_hand_its_graph_to_another(name: str) -> None:
    backend = Kept(inner=name)
    x = X.clone().requires_grad_()
    torch.compile(lambda x: x.sin().sum(), backend=backend)(x).backward()
    assert len(backend.graphs) == 1
    assert x.grad is not None
    assert torch.allclose(x.grad, X.cos())


def test_inductor_takes_a_mode_or_options_or_neither() -> None:
    for mode, options in ((None, None), ("default", None), (None, {"epilogue_fusion": False})):
        wrapper: Any = compiler("inductor", mode, options, None)
        assert callable(wrapper)
        assert wrapper.compiler_name == "inductor"
        assert wrapper.config.get("epilogue_fusion", True) is (options is None)
    with pytest.raises(RuntimeError, match="no such"):
        compiler("inductor", "no such mode", None, None)


def raised(run: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run()
    return caught.value


def fail(*_: Any) -> Any:
    raise ZeroDivisionError


@leave_to_python
def fail_in_python(*_: Any) -> Any:
    raise ZeroDivisionError


def test_errors_of_the_compiler_are_told_from_those_of_the_code() -> None:
    def breaking(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    def failing(x: Tensor) -> Tensor:
        return fail_in_python(x)

    refused = raised(lambda: torch.compile(breaking, backend="eager", fullgraph=True)(X))
    assert is_compile_error(refused)
    assert is_compile_error(raised(lambda: torch.compile(lambda x: x * 2, backend=fail)(X)))
    assert is_compile_error(InductorError.__new__(InductorError))
    assert not is_compile_error(raised(lambda: torch.compile(failing, backend="eager")(X)))
    assert not gives_up_recompiling(refused)


def test_what_is_compiled_in_too_many_ways_raises_that_error() -> None:
    compiled = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True, dynamic=False)
    with config.patch(recompile_limit=1):
        compiled(X)
        error = raised(lambda: compiled(torch.ones(3)))
    assert gives_up_recompiling(error)
    assert not gives_up_recompiling(ZeroDivisionError())


def test_copies_of_a_code_are_compiled_in_ways_of_their_own() -> None:
    def function(x: Tensor) -> Tensor:
        return x * 2

    def copied() -> Any:
        code, names = function.__code__.replace(), function.__globals__
        return torch.compile(type(function)(code, names), backend="eager", fullgraph=True)

    with config.patch(recompile_limit=1):
        for rows in range(2, 6):
            assert torch.equal(copied()(torch.ones(rows)), torch.full((rows,), 2.0))


def test_torch_dynamo_reset_resets_a_backend() -> None:
    class Resettable(Kept):
        resets = 0

        def reset(self) -> None:
            self.resets += 1

    backend = Resettable()
    torch.compile(lambda x: x * 2, backend=backend)(X)
    torch._dynamo.reset()
    assert backend.resets == 1


# --- calls of what torch.compile returned ---

MARK = "_freegrad_fx_probe"


def frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


class Seen(DispatchMode):  # type: ignore[misc]
    """Lists the operators that run; Dynamo is to compile as if it was not there."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


class Following(Kept):
    """A backend that lists the calls of what was compiled with it, as that of this package does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.functions: list[Any] = []
        self.wrappers: list[Any] = []
        self.seen: list[Any] = []
        self.backend_ctx_ctor = self.follow

    @property
    def __name__(self) -> str:
        asking = compile_wrapper_of(sys._getframe(1))
        if asking is not None:
            self.wrappers.append(asking)
            asking.backend_ctx_ctor = self.backend_ctx_ctor
        return "following"

    def follow(self) -> contextlib.AbstractContextManager[None]:
        frame = compiled_function(frames())
        if frame is not None:
            wrap_compiled_function(frame, self.wrapper, MARK)
        return contextlib.nullcontext()

    def wrapper(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self.functions.append(function)
        compiled = looked_into(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append("begins")
            with Seen() as seen:
                result = compiled(*args, **kwargs)
            self.seen.append(seen.operators)
            self.calls.append("ends")
            return result

        skip(call.__code__)
        setattr(call, MARK, True)
        return call


class Net(nn.Module):
    """A model of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))

    def method(self, x: Tensor) -> Tensor:
        return self.fc(x)


def in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


WAYS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "model": lambda backend: torch.compile(Net(), backend=backend),
    "model in place": lambda backend: in_place(Net(), backend),
    "module of torch": lambda backend: torch.compile(nn.Linear(2, 2), backend=backend),
    "module of torch in place": lambda backend: in_place(nn.Linear(2, 2), backend),
    "container of torch in place": lambda backend: in_place(
        nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend
    ),
    "method": lambda backend: torch.compile(Net().method, backend=backend),
    "function": lambda backend: torch.compile(lambda x: x * 2, backend=backend),
    "decorator": lambda backend: torch.compile(backend=backend)(lambda x: x * 2),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.mark.sampled(4)
@each_way
def test_every_call_goes_through_the_wrapper_from_the_first_on(way: Any) -> None:
    backend = Following()
    compiled = way(backend)
    for number in (1, 2, 3):
        compiled(torch.ones(1, 2))
        assert backend.calls == ["begins", "ends"] * number
    assert len(backend.functions) == 1
    assert len(backend.graphs) == 1


@pytest.mark.sampled(4)
@each_way
def test_a_dispatch_mode_in_the_wrapper_sees_what_runs_and_not_what_is_compiled(way: Any) -> None:
    backend = Following()
    compiled = way(backend)
    for _ in range(2):
        compiled(torch.ones(1, 2))
    first, second = backend.seen
    assert first == second
    assert first


def test_the_wrapper_sees_what_runs_between_graphs() -> None:
    outside = torch.compiler.disable(lambda y: torch.sinc(y))

    def function(x: Tensor) -> Tensor:
        return outside(x * 2) + 1

    backend = Following()
    torch.compile(function, backend=backend)(X)
    assert torch.ops.aten.sinc.default in backend.seen[0]
    assert len(backend.graphs) == 2
    assert backend.calls == ["begins", "ends"]


def test_an_error_goes_through_the_wrapper_and_leaves_the_next_call_as_it_was() -> None:
    def function(x: Tensor, fails: bool) -> Tensor:
        if fails:
            fail_in_python()
        return x * 2

    backend = Following()
    compiled = torch.compile(function, backend=backend)
    compiled(X, False)
    with pytest.raises(ZeroDivisionError):
        compiled(X, True)
    assert torch.equal(compiled(X, False), X * 2)
    assert backend.calls == ["begins", "ends", "begins", "begins", "ends"]


def test_torch_compile_asks_a_backend_for_its_name_and_nothing_else_is_taken_for_that() -> None:
    backend = Following()
    torch.compile(lambda x: x, backend=backend)
    assert backend.wrappers
    assert all(wrapper.compiler_fn is backend for wrapper in backend.wrappers)
    count = len(backend.wrappers)
    assert backend.__name__ == "following"
    assert len(backend.wrappers) == count
    assert compile_wrapper_of(sys._getframe()) is None


def test_a_frame_that_calls_nothing_compiled_is_no_call_of_a_compiled_function() -> None:
    assert compiled_function(frames()) is None


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("way", "kind", "calls"),
    [
        ("model", Net, True),
        ("model in place", Net, True),
        ("module of torch", nn.Linear, True),
        ("module of torch in place", nn.Linear, True),
        ("container of torch in place", nn.Sequential, True),
        ("method", Net, False),
        ("function", None, False),
    ],
)
def test_what_was_compiled_tells_its_module_and_whether_it_is_a_call_of_that(
    way: str, kind: Any, calls: bool
) -> None:
    backend = Following()
    WAYS[way](backend)(torch.ones(1, 2))
    (function,) = backend.functions
    called = getattr(function, "__wrapped__", function)
    module = called if isinstance(called, nn.Module) else getattr(called, "__self__", None)
    assert module is None if kind is None else type(module) is kind
    if not isinstance(called, nn.Module):
        names = ("forward", "_call_impl", "_wrapped_call_impl")
        assert (isinstance(module, nn.Module) and called.__name__ in names) == calls


def test_a_module_of_torch_that_is_called_behind_a_skipped_frame_has_to_be_looked_into() -> None:
    linear, net = nn.Linear(2, 2), Net()
    graphs = {}
    for name, function in {"linear": linear.forward, "net": net.forward}.items():
        backend = Kept()
        compiled = looked_into(function)

        def call(x: Tensor, compiled: Any = compiled) -> Any:
            return compiled(x)

        skip(call.__code__)
        torch.compile(call, backend=backend)(torch.ones(1, 2))
        graphs[name] = len(backend.graphs)
    assert graphs == {"linear": 1, "net": 1}
    assert looked_into(net.forward) == net.forward
    function = len
    assert looked_into(function) is function


# --- the graphs of Dynamo ---


def test_the_keys_of_the_module_stack_are_the_identities_of_modules_with_their_classes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.net(x))

    model = Twice()
    nodes = [n for n in captured(model, torch.ones(1, 2)).graph.nodes if n.target is torch.relu]
    assert len(nodes) == 2
    marks = []
    for node in nodes:
        stack = node.meta["nn_module_stack"]
        found = [(int(key.partition("@")[0]), kind) for key, (_, kind) in stack.items()]
        assert found[-1] == (id(model.net), Net)
        assert found[:-1] in ([], [(id(model), Twice)])
        marks.append(list(stack)[-1])
    assert marks[0] != marks[1]
    assert marks[1].partition("@")[1] == "@"


def test_operations_of_functions_have_no_module_stack() -> None:
    (node,) = [n for n in captured(lambda x: torch.relu(x)).graph.nodes if n.target is torch.relu]
    assert not node.meta.get("nn_module_stack")


def examples_of(function: Callable[..., Any], x: Tensor, **options: Any) -> list[Any]:
    """What the inputs of a graph are, as they tell while it is compiled."""
    found: list[Any] = []

    def look(gm: fx.GraphModule) -> None:
        arguments = [n.meta.get("grapharg") for n in gm.graph.find_nodes(op="placeholder")]
        found.extend(argument.example for argument in arguments if argument is not None)

    torch.compile(function, backend=Kept(look), **options)(x)
    return found


def test_an_input_of_a_graph_tells_the_tensor_that_it_is() -> None:
    net, x = Net(), torch.ones(1, 2)
    found = examples_of(net, x)
    for tensor in (x, net.fc.weight, net.fc.bias):
        assert any(example is tensor for example in found)
    assert sum(isinstance(example, nn.Parameter) for example in found) == 2


def test_an_input_of_a_graph_that_is_a_size_is_no_tensor() -> None:
    found = examples_of(lambda x: x * x.shape[0], torch.ones(5), dynamic=True)
    assert sum(isinstance(example, Tensor) for example in found) == 1
    assert len(found) == 2


def test_a_node_that_is_a_tensor_has_an_example_of_its_value() -> None:
    graph = captured(lambda x: torch.relu(x) * x.dim()).graph
    for node in graph.nodes:
        if node.op != "output":
            assert isinstance(node.meta["example_value"], Tensor)
            assert node.meta["example_value"].shape == X.shape


def test_the_trace_of_a_node_ends_in_the_line_that_made_it() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.relu(x)

    (node,) = [n for n in captured(function).graph.nodes if n.target is torch.relu]
    pattern = re.compile(r'^  File "(.*)", line (\d+), in ', re.MULTILINE)
    found = pattern.findall(node.meta["stack_trace"])
    assert found[-1] == (__file__, str(function.__code__.co_firstlineno + 1))


def test_a_graph_tells_whether_a_break_has_ended_it() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    backend = Kept()
    torch.compile(function, backend=backend)(X)
    assert [gm.compile_subgraph_reason.graph_break for gm in backend.graphs] == [True, False]


def test_a_graph_may_be_changed_before_it_is_compiled() -> None:
    def exchange(gm: fx.GraphModule) -> None:
        (node,) = gm.graph.find_nodes(op="call_function", target=torch.relu)
        node.target = torch.tanh
        gm.graph.lint()
        gm.recompile()

    compiled = torch.compile(lambda x: torch.relu(x), backend=Kept(exchange, inner="aot_eager"))
    assert torch.equal(compiled(X), X.tanh())


@pytest.mark.parametrize("function", [F.gelu, F.softplus, torch.relu, torch.sigmoid, F.logsigmoid])
def test_a_builtin_is_the_target_of_its_node(function: Any) -> None:
    assert calls_in(captured(lambda x: function(x))) == [function]


def test_changes_of_the_grad_mode_are_nodes() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return x + y

    calls = calls_in(captured(function))
    assert calls[0] is calls[2] is grad_mode_setter()


@pytest.mark.parametrize(
    ("transform", "kind"),
    [
        (torch.func.grad, "grad"),
        (torch.func.vmap, "vmap"),
        (lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), "jvp"),
        (lambda f: lambda x: torch.func.vjp(f, x)[1](x.sum()), "grad"),
    ],
    ids=["grad", "vmap", "jvp", "vjp"],
)
def test_a_transform_stands_between_nodes_that_nest_it(transform: Any, kind: str) -> None:
    f = transform(lambda x: torch.relu(x).sum())
    names = [getattr(t, "__name__", "") for t in calls_in(captured(lambda x: f(x)))]
    depth, inside = 0, []
    for name in names:
        depth += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
        inside.append(depth > 0)
    assert depth == 0
    assert inside[names.index("relu")]
    assert any(name.endswith(f"_{kind}_increment_nesting") or kind in name for name in names)


def graph_operators(gm: fx.GraphModule) -> dict[str, list[fx.GraphModule]]:
    """The operators that run graphs, by name, with these graphs."""
    found = {}
    for node in gm.graph.nodes:
        if isinstance(node.target, GraphOperator):
            named = [a.target for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
            found[operator_name(node.target)] = [getattr(gm, str(name)) for name in named]
    return found


def test_a_checkpoint_runs_a_graph_of_its_own() -> None:
    gm = captured(lambda x: checkpoint(torch.relu, x, use_reentrant=False))
    ((name, (body,)),) = graph_operators(gm).items()
    assert name == "tag_activation_checkpoint"
    assert torch.relu in calls_in(body)


def test_a_function_with_a_backward_runs_graphs_of_its_own() -> None:
    gm = captured(lambda x: Tripled.apply(x), X.clone().requires_grad_())
    ((name, bodies),) = graph_operators(gm).items()
    assert name == "autograd_function_apply"
    assert all(isinstance(body, fx.GraphModule) for body in bodies)


def test_the_branches_of_a_condition_are_graphs_of_its_own() -> None:
    gm = captured(lambda x: torch.cond(x.sum() > 0, torch.relu, torch.tanh, (x,)))
    ((name, (yes, no)),) = graph_operators(gm).items()
    assert name == "cond"
    assert torch.relu in calls_in(yes)
    assert torch.tanh in calls_in(no)


# --- the stack while a graph is compiled and while it runs ---


def test_the_modules_that_are_being_called_stand_on_the_stack() -> None:
    """They tell where a graph runs that was captured for another module of the same class."""

    def called() -> list[nn.Module]:
        return [f.f_locals["self"] for f in frames() if f.f_code is call_code()][::-1]

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return torch.relu(x)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Broken(), Broken()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    compiles, runs = [], []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        compiles.append(called())

        def run(*args: Any) -> Any:
            runs.append(called())
            return gm.forward(*args)

        return run

    model = Two()
    torch.compile(model, backend=backend)(X)
    assert [modules[-2:] for modules in runs] == [[model, model.a], [model, model.b]]
    assert compiles[0][-2:] == [model, model.a]


def test_a_dispatch_mode_finds_the_code_of_the_function_of_torch_that_computes() -> None:
    found = []

    class Watching(Seen):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            found.append(F.softsign.__code__ in [frame.f_code for frame in frames()])
            return func(*args, **(kwargs or {}))

    with Watching():
        F.softsign(X)
    assert len(found) > 1
    assert all(found)
