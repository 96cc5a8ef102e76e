"""What is taken for granted of PyTorch's transforms, dispatch modes and recordings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from freegrad_fx._torch import dispatch
from freegrad_fx._torch.graphs import grad_mode_setter

# PyTorch's own, of the decompositions that forward mode compiles
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(f)(torch.tensor(1.0)),
    "jvp": lambda f: torch.func.jvp(f, (torch.ones(2),), (torch.ones(2),)),
    "vjp": lambda f: torch.func.vjp(f, torch.ones(2)),
    "vmap": lambda f: torch.func.vmap(f)(torch.ones(2)),
}
in_every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


def seen_by(run: Callable[[Callable[[Tensor], Tensor]], Any], look: Callable[[Tensor], Any]) -> Any:
    """What `look` finds when a function that is run in some way asks it."""
    found = []

    def function(x: Tensor) -> Tensor:
        found.append(look(x))
        return x.sin()

    run(function)
    return found[0]


# --- transforms of torch.func ---


@in_every_transform
def test_a_transform_is_active_inside_of_it_and_not_after(transform: Any) -> None:
    assert seen_by(transform, lambda _: dispatch.function_transforms_active())
    assert not dispatch.function_transforms_active()


@in_every_transform
def test_code_is_in_a_transform_inside_of_it_and_not_after(transform: Any) -> None:
    assert seen_by(transform, lambda _: dispatch.in_function_transform())
    assert not dispatch.in_function_transform()


@in_every_transform
def test_a_transform_transforms_its_input_and_no_other_tensor(transform: Any) -> None:
    other = torch.ones(2)
    assert seen_by(transform, dispatch.is_transformed)
    assert not seen_by(transform, lambda _: dispatch.is_transformed(other))


def test_a_transform_is_active_no_more_after_an_error_in_it() -> None:
    def failing(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        torch.func.grad(failing)(torch.tensor(1.0))
    assert not dispatch.function_transforms_active()
    assert not dispatch.in_function_transform()


def test_a_tensor_that_escapes_from_a_transform_is_plain_without_its_dead_wrapper() -> None:
    escaped = seen_by(TRANSFORMS["grad"], lambda x: x * 2)
    assert dispatch.is_transformed(escaped)
    plain = dispatch.without_dead_transform(escaped)
    assert not dispatch.is_transformed(plain)
    assert plain.item() == 2.0


def test_other_tensors_have_no_dead_wrapper_to_lose() -> None:
    x = torch.ones(2)
    assert dispatch.without_dead_transform(x) is x
    assert seen_by(TRANSFORMS["grad"], lambda x: dispatch.without_dead_transform(x) is x)


# --- gradients that autograd batches ---


def gradients_in_the_backward(**options: Any) -> list[tuple[type, bool]]:
    found = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            found.append((type(grad), dispatch.is_batched(grad)))
            return grad

    x = torch.ones(3, requires_grad=True)
    shape = (2, 3) if options else (3,)
    torch.autograd.grad(Identity.apply(x), x, torch.ones(shape), **options)
    return found


def test_autograd_batches_gradients_under_is_grads_batched_alone() -> None:
    """Such a gradient says by its class that it is a plain tensor."""
    assert gradients_in_the_backward(is_grads_batched=True) == [(Tensor, True)]
    assert gradients_in_the_backward() == [(Tensor, False)]


# --- dispatch modes ---


class Recorded(dispatch.DispatchMode):  # type: ignore[misc]
    """Lists the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_are_counted_while_they_are_active() -> None:
    assert dispatch.dispatch_modes() == 0
    with Recorded():
        assert dispatch.dispatch_modes() == 1
        with Recorded():
            assert dispatch.dispatch_modes() == 2
    assert dispatch.dispatch_modes() == 0


def test_the_current_mode_is_the_innermost() -> None:
    assert dispatch.current_dispatch_mode() is None
    with Recorded() as outer:
        with Recorded() as inner:
            assert dispatch.current_dispatch_mode() is inner
        assert dispatch.current_dispatch_mode() is outer


def test_a_mode_can_be_left_and_entered_again_inside_of_its_block() -> None:
    x = torch.ones(2)
    with Recorded() as mode:
        mode.__exit__(None, None, None)
        x.sin()
        mode.__enter__()
        x.cos()
    assert mode.operators == [torch.ops.aten.cos.default]
    assert dispatch.dispatch_modes() == 0


def test_no_mode_is_current_in_the_handler_of_the_only_one() -> None:
    found = []

    class Asking(dispatch.DispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            found.append(dispatch.current_dispatch_mode())
            return func(*args, **(kwargs or {}))

    with Asking():
        torch.ones(2).sin()
    assert set(found) == {None}


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (F.relu, torch.ops.aten.relu.default),
        (F.gelu, torch.ops.aten.gelu.default),
        (F.softsign, torch.ops.aten.div.Tensor),
        (torch.sigmoid, torch.ops.aten.sigmoid.default),
        (lambda x: F.softmax(x, 0), torch.ops.aten._softmax.default),
    ],
    ids=["relu", "gelu", "softsign", "sigmoid", "softmax"],
)
def test_a_mode_is_handed_operators_of_aten_also_with_gradients(
    function: Any, operator: Any
) -> None:
    x = torch.ones(2, requires_grad=True)
    with Recorded() as mode:
        function(x)
    assert operator in mode.operators
    assert all(isinstance(found, torch._ops.OpOverload) for found in mode.operators)


# --- what records ---

X = torch.ones(3)
RECORDERS: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda model: model(X),
    "torch.export": lambda model: torch.export.export(model, (X,), strict=False),
    "torch.jit.trace": lambda model: torch.jit.trace(model, (X,), check_trace=False),
    "make_fx": lambda model: make_fx(model)(X),
    "torch.func.vmap": lambda model: torch.func.vmap(model)(X),
}


def answers_under(recorder: str, look: Callable[[], Any]) -> set[Any]:
    """What `look` answers in the forward of a model that is recorded."""
    answers = set()

    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            answers.add(look())
            return x + 1

    RECORDERS[recorder](Asking())
    return answers


@pytest.mark.parametrize(
    ("look", "recorders"),
    [
        (dispatch.in_pre_dispatch, {"torch.export"}),
        (dispatch.is_exporting, {"torch.export"}),
        (dispatch.is_jit_tracing, {"torch.jit.trace"}),
        (lambda: dispatch.proxy_mode() is not None, {"torch.export", "make_fx"}),
        (dispatch.is_functionalised, set()),
    ],
    ids=["in_pre_dispatch", "is_exporting", "is_jit_tracing", "proxy_mode", "is_functionalised"],
)
def test_recorders_are_told_apart(look: Any, recorders: set[str]) -> None:
    answers = {name: answers_under(name, look) for name in RECORDERS}
    assert answers == {name: {name in recorders} for name in RECORDERS}
    assert not look()


@pytest.mark.parametrize("recorder", ["make_fx", "torch.export"])
def test_what_records_proxies_has_a_mode_on_one_of_two_stacks(recorder: str) -> None:
    """So that a call outside of both is known not to be recorded at next to no cost."""
    has_mode = answers_under(
        recorder, lambda: bool(dispatch.dispatch_modes()) or dispatch.in_pre_dispatch()
    )
    assert has_mode == {True}


def test_aot_autograd_functionalises_while_it_traces_and_not_when_the_code_runs() -> None:
    def asking(x: Tensor) -> Tensor:
        answers.append((dispatch.is_functionalised(), dispatch.proxy_mode() is not None))
        return x.sin()

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        (node,) = gm.graph.find_nodes(op="call_method", target="sin")
        node.op, node.target = "call_function", asking
        gm.recompile()
        return aot_eager(gm, inputs)

    answers: list[tuple[bool, bool]] = []
    compiled = torch.compile(lambda x: x.sin(), backend=backend)
    compiled(torch.ones(3, requires_grad=True)).sum().backward()
    assert (True, True) in answers
    count = len(answers)
    compiled(torch.ones(3, requires_grad=True))
    assert len(answers) == count
    assert not dispatch.is_functionalised()


@pytest.mark.slow
def test_asking_for_the_mode_of_make_fx_imports_no_sympy() -> None:
    code = (
        "import sys; from freegrad_fx._torch import dispatch; "
        "assert dispatch.proxy_mode() is None; print('sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- modes of torch functions ---


class Handed(torch.overrides.TorchFunctionMode):
    """Lists the functions that are called, with the callers."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []
        self.callers: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.functions.append(func)
        self.callers.append(sys._getframe(1))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("factory", [torch.rand, torch.zeros, torch.arange, torch.full])
def test_a_function_mode_is_handed_the_factory_that_was_called(factory: Any) -> None:
    with Handed() as mode:
        factory(*((2,), 1.0) if factory is torch.full else (2,))
    assert factory in mode.functions


def with_context(context: Callable[[], Any]) -> None:
    with context():
        pass


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda: with_context(torch.no_grad), ["set", "left"]),
        (lambda: with_context(torch.enable_grad), ["set", "left"]),
        (lambda: torch.no_grad()(lambda: None)(), ["set", "left"]),
        (lambda: torch.set_grad_enabled(True), ["set"]),
        (lambda: with_context(lambda: torch.set_grad_enabled(True)), ["set", "again", "left"]),
    ],
    ids=["no_grad", "enable_grad", "decorator", "set_grad_enabled", "with set_grad_enabled"],
)
def test_a_function_mode_is_handed_changes_of_the_grad_mode_and_finds_who_makes_them(
    change: Callable[[], None], kinds: list[str]
) -> None:
    with Handed() as mode:
        change()
    found = []
    for function, setter in zip(mode.functions, mode.callers, strict=True):
        assert function is grad_mode_setter()
        name, caller = setter.f_code.co_name, setter.f_back.f_code.co_name
        if "__exit__" in (name, caller):
            found.append("left")
        elif name == "__enter__" and isinstance(setter.f_locals["self"], torch.set_grad_enabled):
            found.append("again")
        else:
            found.append("set")
    assert found == kinds
