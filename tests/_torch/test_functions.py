"""How an `autograd.Function` is applied, how all are reached, and what a checkpoint runs again."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from freegrad_fx._torch.functions import (
    applied_to_inputs,
    base_apply,
    direct_apply,
    functions_answered_by,
    overrides_apply,
)


class Tripled(torch.autograd.Function):
    """The identity whose gradient is three times the native one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *more: Any) -> Tensor:
        ctx.more = len(more)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 3 * grads[0], *(None,) * ctx.more


class WithSetup(torch.autograd.Function):
    """The same, in the other style."""

    @staticmethod
    def forward(x: Tensor, *more: Any) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.more = len(inputs) - 1

    backward = Tripled.backward


class Inherited(Tripled):
    """A subclass with the forward of its base."""


class InheritedWithSetup(WithSetup):
    """The same, in the other style."""


class Called(Tripled):
    """A subclass with an `apply` of its own."""

    @classmethod
    def apply(cls, x: Tensor, *more: Any) -> Any:  # type: ignore[override]
        return super().apply(x * 2, *more)


FUNCTIONS = [Tripled, WithSetup, Inherited, InheritedWithSetup]
# fetched before anything is replaced, as in `spike = Spike.apply`
STORED: dict[type, Callable[..., Any]] = {f: f.apply for f in (*FUNCTIONS, Called)}
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
each_grad_mode = pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no_grad"])
ANSWER = object()


class Calls:
    """Answers calls, and lists them."""

    def __init__(self, answer: Any = ANSWER) -> None:
        self.answer = answer
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __call__(self, function: Any, args: tuple[Any, ...]) -> Any:
        self.seen.append((function, args))
        return self.answer


def gradient(apply: Callable[..., Any], *more: Any) -> float:
    x = torch.tensor(1.0, requires_grad=True)
    (found,) = torch.autograd.grad(apply(x, *more), x)
    return float(found)


# --- calls that are answered ---


@each_function
@each_grad_mode
@pytest.mark.parametrize("learns", [True, False], ids=["learns", "frozen"])
def test_an_apply_is_answered_also_one_that_was_fetched_before(
    function: Any, enabled: bool, learns: bool
) -> None:
    x = torch.ones(2, requires_grad=learns)
    for apply in (STORED[function], function.apply):
        calls = Calls()
        with torch.set_grad_enabled(enabled), functions_answered_by(calls):
            assert apply(x) is ANSWER
        assert calls.seen == [(function, (x,))]


@each_function
def test_the_arguments_of_an_apply_arrive_as_they_are(function: Any) -> None:
    sentinel, x, y = object(), torch.ones(2, requires_grad=True), torch.ones(2)
    given = (x, sentinel, [y], y, None, "text")
    calls = Calls()
    with functions_answered_by(calls):
        STORED[function](*given)
    ((_, found),) = calls.seen
    assert all(a is b for a, b in zip(found, given, strict=True))


@each_function
@pytest.mark.parametrize("first", [torch.ones(2), torch.ones(2, requires_grad=True), object()])
def test_a_result_that_is_no_tensor_comes_back_as_it_is(function: Any, first: Any) -> None:
    for answer in (ANSWER, (ANSWER, ANSWER), (ANSWER, 3), [ANSWER]):
        with functions_answered_by(Calls(answer)):
            found = STORED[function](first)
        assert found == answer
        assert type(found) is type(answer)


@each_function
def test_a_call_with_no_tensor_at_all_is_answered(function: Any) -> None:
    calls, sentinel = Calls(), object()
    with functions_answered_by(calls):
        assert STORED[function](sentinel) is ANSWER
    assert calls.seen == [(function, (sentinel,))]


@each_function
def test_a_function_that_is_let_run_has_its_own_result_and_backward(function: Any) -> None:
    calls = Calls(NotImplemented)
    with functions_answered_by(calls):
        assert gradient(STORED[function], "more") == 3
    assert len(calls.seen) == 1


@each_function
def test_an_answer_leaves_the_next_call_that_is_let_run_as_it_was(function: Any) -> None:
    answers = iter([ANSWER, NotImplemented, ANSWER])
    with functions_answered_by(lambda *_: next(answers)):
        assert function.apply(torch.ones(2)) is ANSWER
        assert gradient(function.apply) == 3
        assert function.apply(torch.ones(2)) is ANSWER
    assert gradient(function.apply) == 3


@each_function
def test_an_error_of_the_answer_is_the_error_of_the_call(function: Any) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), functions_answered_by(fail):
        STORED[function](torch.ones(2))
    assert gradient(STORED[function]) == 3


@pytest.mark.parametrize("base", [torch.autograd.Function, Tripled, WithSetup, Called])
def test_a_class_that_is_made_in_the_block_is_reached(base: Any) -> None:
    calls = Calls()
    with functions_answered_by(calls):
        body = (
            {"forward": staticmethod(lambda ctx, x: x)} if base is torch.autograd.Function else {}
        )
        made = type("Made", (base,), body)
        stored = made.apply
        assert stored(torch.ones(2)) is ANSWER
    assert [function for function, _ in calls.seen] == [made]


def test_a_function_with_an_apply_of_its_own_is_reached_behind_that() -> None:
    calls = Calls()
    with functions_answered_by(calls):
        assert STORED[Called](torch.ones(2)) is ANSWER
    ((function, (x,)),) = calls.seen
    assert function is Called
    assert x.tolist() == [2, 2]


@each_grad_mode
def test_a_direct_call_of_a_forward_with_a_context_is_no_apply(enabled: bool) -> None:
    class Context:
        pass

    calls = Calls()
    for function in (Tripled, Inherited):
        with torch.set_grad_enabled(enabled), functions_answered_by(calls):
            assert function.forward(Context(), torch.ones(2)).tolist() == [1, 1]
    assert calls.seen == []


def test_a_direct_call_of_a_forward_without_a_context_is_no_apply_where_gradients_are_enabled() -> (
    None
):
    calls = Calls()
    for function in (WithSetup, InheritedWithSetup):
        with functions_answered_by(calls):
            assert function.forward(torch.ones(2)).tolist() == [1, 1]
    assert calls.seen == []


def test_apply_gives_a_forward_a_context_that_nothing_else_has() -> None:
    found = []

    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            found.append(applied_to_inputs((ctx, *args), has_context=True))
            return args[0].clone()

    x = torch.ones(2)
    Asking.apply(x, 3)
    assert found == [(x, 3)]
    for context in (None, object(), x):
        assert applied_to_inputs((context, x), has_context=True) is None
    assert applied_to_inputs((), has_context=True) is None


@each_grad_mode
def test_apply_runs_a_forward_with_gradients_disabled(enabled: bool) -> None:
    found = []

    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            found.append(torch.is_grad_enabled())
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

    with torch.set_grad_enabled(enabled):
        Asking.apply(torch.ones(2, requires_grad=True))
    assert found == [False]


def test_the_classes_are_as_they_were_after_the_block() -> None:
    kinds = [torch.autograd.Function, type(torch.autograd.Function), *FUNCTIONS, Called]
    before = [dict(vars(kind)) for kind in kinds]
    with functions_answered_by(Calls()):
        assert vars(Tripled)["forward"] is not before[2]["forward"]
    assert [dict(vars(kind)) for kind in kinds] == before
    assert gradient(STORED[Tripled]) == 3


def test_a_forward_that_export_runs_is_reached() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return STORED[Tripled](x)

    calls = Calls(NotImplemented)
    with functions_answered_by(calls):
        torch.export.export(Model(), (torch.ones(2),), strict=False)
    assert {function for function, _ in calls.seen} == {Tripled}


# --- applying one ---


@each_function
def test_applying_a_function_directly_gives_its_backward(function: Any) -> None:
    assert gradient(direct_apply(function)) == 3


def test_applying_a_function_directly_goes_past_an_apply_in_python() -> None:
    """Until 2.13 there is one in Python, which looks for transforms first."""
    x = torch.ones(2, requires_grad=True)
    assert type(direct_apply(Tripled)(x).grad_fn) is type(Tripled.apply(x).grad_fn)
    assert not hasattr(direct_apply(Tripled), "__code__")


@pytest.mark.parametrize(
    ("function", "own"),
    [(Tripled, False), (Inherited, False), (WithSetup, False), (Called, True)],
)
def test_a_function_tells_whether_it_has_an_apply_of_its_own(function: Any, own: bool) -> None:
    assert overrides_apply(function) == own
    assert overrides_apply(type("Derived", (function,), {})) == own


@pytest.mark.parametrize("function", [*FUNCTIONS, Called])
def test_the_base_apply_goes_past_that_of_the_class(function: Any) -> None:
    """The one of `Called` would double the gradient once more."""
    assert gradient(base_apply(function)) == 3
    assert gradient(Called.apply) == 6


def test_the_base_apply_is_taken_apart_by_transforms() -> None:
    class Vectorised(WithSetup):
        generate_vmap_rule = True

    x = torch.ones(3)
    found = torch.func.vmap(torch.func.grad(lambda x: base_apply(Vectorised)(x)))(x)
    assert found.tolist() == [3, 3, 3]


# --- the nodes of the graph ---


def test_the_context_of_a_forward_is_the_node_of_the_graph() -> None:
    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            ctx.note = "kept"
            ctx.save_for_backward(y)
            return x + y

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return grads[0], None

    x, y = torch.ones(2, requires_grad=True), torch.ones(2)
    output = Noted.apply(x, y)  # the node belongs to it
    node: Any = output.grad_fn
    assert node.note == "kept"
    assert node.needs_input_grad == (True, False)
    assert torch.equal(node.saved_tensors[0], y)
    assert node.name() == "NotedBackward"


# --- checkpoints ---

CHECKPOINTS = """
    import torch
    from torch.utils.checkpoint import checkpoint
    from freegrad_fx._torch.functions import follow_checkpoints

    log = []

    def marked(mark):
        def wrap(function):
            log.append(f"{mark} is asked")
            def run(*args):
                log.append(f"{mark} runs")
                return function(*args)
            return run
        return wrap

    def function(x):
        log.append("function")
        return x.sin()

    def begin(function, reentrant):
        x = torch.ones(2, requires_grad=True)
        return x, checkpoint(function, x, use_reentrant=reentrant)

    def show(case, x, y):
        forward = ", ".join(log)
        log.clear()
        y.sum().backward()
        assert torch.equal(x.grad, torch.ones(2).cos())
        print(f"{case}: {forward} | {', '.join(log)}")
        log.clear()

    modes = {"reentrant": True, "not reentrant": False}
    begun = {name: begin(function, mode) for name, mode in modes.items()}
    log.clear()
    follow_checkpoints(marked("record"), marked("otherwise"))
    for name, (x, y) in begun.items():
        show(f"{name} before", x, y)
    for name, mode in modes.items():
        show(name, *begin(function, mode))
    inner = lambda x: checkpoint(function, x, use_reentrant=False)
    show("nested", *begin(inner, False))
"""


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, str]:
    """What has run in the forward and in the backward, in a process of its own: following is for good."""
    code = textwrap.dedent(CHECKPOINTS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(line.split(": ") for line in done.stdout.splitlines())


@pytest.mark.slow
def test_what_a_checkpoint_runs_again_is_run_through_what_its_forward_has_recorded(
    checkpoints: dict[str, str],
) -> None:
    again = "record runs, function"
    assert checkpoints["not reentrant"] == f"record is asked, function | {again}"
    # the forward of a reentrant one runs where it is called, so that its sites are counted there
    assert checkpoints["reentrant"] == f"record is asked, function | {again}"


def test_what_a_checkpoint_that_began_before_runs_again_is_run_through_the_other_function(
    checkpoints: dict[str, str],
) -> None:
    for name in ("reentrant before", "not reentrant before"):
        assert checkpoints[name] == " | otherwise is asked, otherwise runs, function"


def test_a_checkpoint_in_a_checkpoint_is_followed_too(checkpoints: dict[str, str]) -> None:
    forward, backward = checkpoints["nested"].split(" | ")
    assert forward.count("record is asked") == 2
    assert backward.count("record runs") >= 2
    assert "otherwise" not in backward


def test_a_forward_tells_of_its_arguments_what_it_told_before() -> None:
    """`apply` binds keywords by the code of the forward, in every thread."""

    class Scales(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, factor: float = 1.0) -> Tensor:
            return x * factor

    before = Scales.forward.__code__, Scales.forward.__defaults__, inspect.signature(Scales.forward)
    with functions_answered_by(lambda *_: NotImplemented):
        forward = Scales.forward
        assert (forward.__code__, forward.__defaults__, inspect.signature(forward)) == before


def test_a_forward_called_without_apply_leaves_the_next_apply_as_it_is() -> None:
    """With gradients disabled it looks like an apply, but no `setup_context` follows."""

    class Squares(torch.autograd.Function):
        @staticmethod
        def forward(x: Any) -> Any:
            return x * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.factor = 9.0

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.factor

    answer = object()
    x = torch.ones(2, requires_grad=True)
    with functions_answered_by(lambda _, args: answer if args[0] == "asked" else NotImplemented):
        with torch.no_grad():
            assert Squares.forward("asked") is answer
        (grad,) = torch.autograd.grad(Squares.apply(x).sum(), x)
    assert grad.tolist() == [9.0, 9.0]
