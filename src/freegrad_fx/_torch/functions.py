"""`torch.autograd.Function`: how a Function is applied, interception of all Functions, and checkpoints."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any, TypeAlias

import torch

from .dynamo import is_compiling
from .releases import lookup, uses_private_names
from .replacing import Make, all_replaced, replace_for_good, replaced

__all__ = [
    "Function",
    "Intercept",
    "applied_by",
    "applied_to_inputs",
    "base_apply",
    "direct_apply",
    "follow_checkpoints",
    "forwards_by_line",
    "function_of",
    "functions_answered_by",
    "is_recorded",
    "is_running_for_apply",
    "overrides_apply",
    "own_backward",
    "with_backward",
    "with_results",
]

Function: TypeAlias = type[torch.autograd.Function]

Intercept: TypeAlias = Callable[[Function, tuple[Any, ...]], Any]
"""Takes a Function and its arguments. Returns its result, or NotImplemented to run the Function."""


def direct_apply(function: Function) -> Callable[..., Any]:
    """The `apply` that a Function uses if no transform of `torch.func` is active."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def base_apply(function: Function) -> Callable[..., Any]:
    """The `apply` that `torch.autograd.Function` defines, bound to a Function, even if its class overrides it."""
    # a class method written in Python until 2.13, and one written in C since
    apply: Callable[..., Any] = _defined_apply(torch.autograd.Function).__get__(None, function)
    return apply


def overrides_apply(function: Function) -> bool:
    """Whether a Function overrides `apply`."""
    return _defined_apply(function) is not _defined_apply(torch.autograd.Function)


def _defined_apply(function: Function) -> Any:
    return inspect.getattr_static(function, "apply")


_APPLY = _defined_apply(torch.autograd.Function)
"""The `apply` of PyTorch itself: another thread may have replaced the attribute when it is looked up."""


# --- all Functions ---


@contextlib.contextmanager
def functions_answered_by(intercept: Intercept) -> Iterator[None]:
    """Intercept every `apply` of an autograd.Function in this thread while the block runs.

    Replacing `apply` would miss calls through a stored reference (``spike = Spike.apply``). Every call looks up
    ``forward``, so this is replaced, in every subclass. Classes that are created in the block are included.

    Args:
        intercept: Called at each `apply`.
    """
    # not those of compilers and transforms
    known = [
        f for f in _subclasses(torch.autograd.Function) if not f.__module__.startswith("torch._")
    ]
    with (
        all_replaced(part for f in known for part in _answered(f, intercept)),
        contextlib.ExitStack() as made,
    ):

        def noted(start: Callable[..., None]) -> Callable[..., None]:
            def watched(function: Any, *args: Any, **kwargs: Any) -> None:
                start(function, *args, **kwargs)
                made.enter_context(all_replaced(_answered(function, intercept)))

            return watched

        made.enter_context(replaced(type(torch.autograd.Function), "__init__", noted))
        yield


Applies: TypeAlias = Callable[[Callable[..., Any], Function, tuple[Any, ...]], Any]
"""Takes an `apply`, its Function and the arguments. Calls `apply`, and returns the result."""


@contextlib.contextmanager
def applied_by(
    call: Applies, noted: Callable[[Function, Any, tuple[Any, ...]], None], but: str
) -> Iterator[None]:
    """Hand every `apply` that is looked up to a function.

    Args:
        call: Calls `apply`. It is also called in other threads.
        noted: Called with the Function, the context and the inputs of each call of a Function of users,
            also if its `apply` was stored before and is not handed to `call`.
        but: A package whose Functions are not those of users, as PyTorch's are not.
    """

    def apply(function: Function, *args: Any) -> Any:
        return call(_APPLY.__get__(None, function), function, args)

    with contextlib.ExitStack() as stack:
        # Dynamo can trace what is called without a look at the thread
        begin = functools.partial(replaced, asks_for_thread=True)
        stack.enter_context(begin(torch.autograd.Function, "apply", lambda _: classmethod(apply)))
        for function in _functions_of_users(but):
            stack.enter_context(begin(function, *_noting(function, noted)))
        yield


def _noting(
    function: Function, noted: Callable[[Function, Any, tuple[Any, ...]], None]
) -> tuple[str, Make]:
    """The name of what each `apply` of a Function looks up and calls with a context, and its replacement."""

    def forward_with(forward: Callable[..., Any]) -> Any:
        @functools.wraps(forward)
        def run(ctx: Any, *args: Any, **kwargs: Any) -> Any:
            result = forward(ctx, *args, **kwargs)
            if not is_compiling() and isinstance(ctx, torch.autograd.function.FunctionCtx):
                noted(function, ctx, args)
            return result

        return staticmethod(run)

    def setup_with(setup: Callable[..., Any]) -> Any:
        @functools.wraps(setup)
        def prepare(ctx: Any, inputs: Any, output: Any) -> Any:
            setup(ctx, inputs, output)
            if not is_compiling():
                noted(function, ctx, inputs)

        return staticmethod(prepare)

    if function.setup_context is torch.autograd.Function.setup_context:
        return "forward", forward_with
    return "setup_context", setup_with


def _functions_of_users(but: str) -> list[Function]:
    # Written for speed: blocks are entered at each step of a training
    others, found = ("torch.", f"{but}."), list[Function]()
    pending: list[Function] = [torch.autograd.Function]
    for function in pending:
        derived = function.__subclasses__()
        if derived:
            pending += derived
            found += [f for f in derived if not f.__module__.startswith(others)]
    return found


@uses_private_names("telling which calls of an autograd.Function are recorded")
def is_recorded(ctx: Any) -> bool:
    """Whether autograd records the call of `apply` that a context belongs to."""
    return bool(ctx.next_functions)


Finish: TypeAlias = Callable[[Any], None]
"""Takes the context of a call of `apply`, after the Function has set it up."""

Applied: TypeAlias = Callable[
    [Function, tuple[Any, ...], Callable[[], Any]], tuple[Any, Finish | None]
]
"""Takes a Function, its inputs and what computes its result. Returns the result, and what to do at the end."""


def with_results(
    functions: Iterable[Function], applied: Applied
) -> contextlib.AbstractContextManager[None]:
    """Pass on every `apply` of some Functions, and of those derived from them, in this thread.

    Args:
        functions: The Functions.
        applied: Called in the place of the forward.
    """
    known = dict.fromkeys(k for f in functions for k in (*_subclasses(f), f))
    return all_replaced(part for f in known for part in _passed_on(f, applied))


def _passed_on(function: Function, applied: Applied) -> Iterator[tuple[Any, str, Make]]:
    has_context = function.setup_context is torch.autograd.Function.setup_context
    unfinished: list[Finish | None] = []  # a forward has run, and its context is not set up yet

    def forward_with(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inputs = None if kwargs else applied_to_inputs(args, has_context)
            if inputs is None:
                return forward(*args, **kwargs)
            result, finish = applied(function, inputs, lambda: forward(*args))
            if not has_context:
                unfinished[:] = [finish]
            elif finish is not None:
                finish(args[0])
            return result

        return run

    def setup_with(setup: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(ctx: Any, inputs: Any, output: Any) -> Any:
            setup(ctx, inputs, output)
            # A transform of `torch.func` sets up a context for each of its levels
            known = unfinished or [applied(function, inputs, lambda: output)[1]]
            finish = known.pop()
            if finish is not None:
                finish(ctx)

        return prepare

    if not has_context:
        yield function, "setup_context", setup_with
    yield function, "forward", forward_with


def function_of(code: CodeType) -> Function | None:
    """The Function whose forward has a code; None for other code, and for PyTorch's own Functions, as checkpoints."""
    for function in _subclasses(torch.autograd.Function):
        defined = vars(function).get("forward")
        forward: Any = inspect.unwrap(getattr(defined, "__func__", defined)) if defined else None
        if getattr(forward, "__code__", None) is code:
            # A decorator can make functions with one code for several purposes
            own = forward.__qualname__.startswith(function.__qualname__)
            users = not function.__module__.startswith("torch.")
            return function if users and (own or code.co_argcount > 0) else None
    return None


def forwards_by_line() -> Callable[[str, int], Function | None]:
    """A function that returns the Function of users whose forward has a line of a file; None if there is none."""
    found: dict[str, list[tuple[int, int, Function]]] = {}
    for function in _subclasses(torch.autograd.Function):
        defined = vars(function).get("forward")
        forward: Any = inspect.unwrap(getattr(defined, "__func__", defined)) if defined else None
        code = getattr(forward, "__code__", None)
        if code is not None and function_of(code) is function:
            lines = [line for _, _, line in code.co_lines() if line]
            found.setdefault(code.co_filename, []).append((min(lines), max(lines), function))

    def at(file: str, line: int) -> Function | None:
        known = found.get(file, ())
        return next((function for first, last, function in known if first <= line <= last), None)

    return at


def is_running_for_apply(frame: FrameType) -> bool:
    """Whether a frame of the forward of a Function is run by `apply`, and not called by other code."""
    if not torch.is_grad_enabled():
        return True
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    first = frame.f_locals.get(names[0]) if names else None
    return isinstance(first, torch.autograd.function.FunctionCtx)


def own_backward(function: Function) -> Callable[..., Any]:
    """The backward that a Function defines, under either of the names that PyTorch takes."""
    named_vjp: Callable[..., Any] = function.vjp
    return function.backward if named_vjp is torch.autograd.Function.vjp else named_vjp


@uses_private_names("giving the calls of an autograd.Function rules")
def with_backward(ctx: Any, backward: Callable[..., Any]) -> None:
    """Give the call of `apply` that a context belongs to another backward."""
    if not hasattr(type(ctx), "_forward_cls"):
        raise AttributeError("_forward_cls")
    ctx.freegrad_fx_backward = backward
    ctx._forward_cls = _OfContext


class _OfContext:
    """What PyTorch takes for the Function of a context that has a backward of its own."""

    vjp = torch.autograd.Function.vjp

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.freegrad_fx_backward(ctx, *grads)


def _subclasses(function: Function) -> dict[Function, None]:
    """All subclasses of a class. A derived class comes before its base."""
    found: dict[Function, None] = {}
    for derived in function.__subclasses__():
        found.update(_subclasses(derived))
        found[derived] = None
    return found


def _answered(function: Function, intercept: Intercept) -> Iterator[tuple[Any, str, Make]]:
    """The replacements by which an intercept can answer each `apply` of a Function."""
    has_context = function.setup_context is torch.autograd.Function.setup_context
    nothing = answered = object()

    def forward_with(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal answered
            inputs = None if kwargs else applied_to_inputs(args, has_context)
            result = NotImplemented if inputs is None else intercept(function, inputs)
            if result is NotImplemented:
                return forward(*args, **kwargs)
            answered = result
            return result

        return run

    def setup_with(setup: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(ctx: Any, inputs: Any, output: Any) -> Any:
            nonlocal answered
            if output is answered:  # `apply` calls this although the forward has not run
                answered = nothing
                return None
            return setup(ctx, inputs, output)

        return prepare

    if not has_context:
        yield function, "setup_context", setup_with
    yield function, "forward", forward_with


def applied_to_inputs(args: tuple[Any, ...], has_context: bool) -> tuple[Any, ...] | None:
    """The arguments of `apply`, from those of a ``forward``; None if the forward is not called by `apply`.

    Args:
        args: The arguments of the forward.
        has_context: Whether the first argument is the context that `apply` creates.
    """
    if has_context:
        made_by_apply = bool(args) and isinstance(args[0], torch.autograd.function.FunctionCtx)
        return args[1:] if made_by_apply else None
    # The only sign of `apply` is that it runs a forward with gradients disabled
    return None if torch.is_grad_enabled() else args


# --- checkpoints ---

_RECORDED = "_freegrad_fx_recorded"

_Wrapper: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]


@uses_private_names("following checkpoints")
def follow_checkpoints(record: _Wrapper, otherwise: _Wrapper) -> None:
    """Wrap, from now on, every function that `torch.utils.checkpoint` recomputes in a backward.

    The replacement is permanent, because a backward can run at any time and in any thread.

    Args:
        record: Called when the forward of a checkpoint starts. Returns the wrapper of the function to recompute.
        otherwise: Called in the backward, for checkpoints whose forward started earlier. Returns such a wrapper too.
    """
    from torch.utils import checkpoint

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = record(function)
        setattr(wrapped, _RECORDED, True)
        return wrapped

    def known(function: Callable[..., Any]) -> Callable[..., Any]:
        return function if hasattr(function, _RECORDED) else otherwise(function)

    def read(frame: Any) -> Callable[..., Any]:
        return known(frame.__dict__["recompute_fn"])

    def write(frame: Any, function: Callable[..., Any]) -> None:
        frame.__dict__["recompute_fn"] = recorded(function)

    reentrant: Any = checkpoint.CheckpointFunction
    first, backward = reentrant.forward, reentrant.backward

    @functools.wraps(first)
    def forward(ctx: Any, run: Callable[..., Any], *args: Any) -> Any:
        again = recorded(run)
        result = first(ctx, run, *args)  # where it is called, so that its sites are counted there
        ctx.run_function = again
        return result

    @functools.wraps(backward)
    def recompute(ctx: Any, *grads: Any) -> Any:
        ctx.run_function = known(ctx.run_function)
        return backward(ctx, *grads)

    frame = lookup("torch.utils.checkpoint._CheckpointFrame", "following checkpoints")
    replace_for_good(frame, "recompute_fn", property(read, write))
    replace_for_good(reentrant, "forward", staticmethod(forward))
    replace_for_good(reentrant, "backward", staticmethod(recompute))
