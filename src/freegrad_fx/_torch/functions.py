"""`torch.autograd.Function`: how one is applied, how all are watched, and what a checkpoint runs again."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

from .releases import lookup, uses_private_names
from .replacing import replace_for_good, replaced

__all__ = [
    "Function",
    "Intercept",
    "applied_to_inputs",
    "base_apply",
    "direct_apply",
    "follow_checkpoints",
    "functions_answered_by",
    "overrides_apply",
]

Function: TypeAlias = type[torch.autograd.Function]

Intercept: TypeAlias = Callable[[Function, tuple[Any, ...]], Any]
"""Given a Function and what it is applied to: its result, or NotImplemented to let it run."""


def direct_apply(function: Function) -> Callable[..., Any]:
    """What applying a Function comes to where no transform of `torch.func` is active."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def base_apply(function: Function) -> Callable[..., Any]:
    """`apply` of a Function as `torch.autograd.Function` defines it, also where the class has one of its own."""
    # a class method written in Python until 2.13, and one written in C since
    apply: Callable[..., Any] = _defined_apply(torch.autograd.Function).__get__(None, function)
    return apply


def overrides_apply(function: Function) -> bool:
    """Whether a Function has an `apply` of its own."""
    return _defined_apply(function) is not _defined_apply(torch.autograd.Function)


def _defined_apply(function: Function) -> Any:
    return inspect.getattr_static(function, "apply")


# --- all Functions ---


@contextlib.contextmanager
def functions_answered_by(intercept: Intercept) -> Iterator[None]:
    """Let a function answer every `apply` of an autograd.Function in this thread, however it is reached.

    `apply` may have been fetched before (``spike = Spike.apply``), so that replacing it reaches some calls alone. All
    end in ``forward``, which is looked up at each call: that is replaced, in every subclass. A class that is made while
    this is in force is one of them.

    Args:
        intercept: Asked at each call.
    """
    with contextlib.ExitStack() as stack:

        def watch(function: Function) -> None:
            stack.enter_context(_answered(function, intercept))

        def noted(start: Callable[..., None]) -> Callable[..., None]:
            def made(function: Any, *args: Any, **kwargs: Any) -> None:
                start(function, *args, **kwargs)
                watch(function)

            return made

        for function in _subclasses(torch.autograd.Function):
            if not function.__module__.startswith("torch._"):  # those of compilers and transforms
                watch(function)
        stack.enter_context(replaced(type(torch.autograd.Function), "__init__", noted))
        yield


def _subclasses(function: Function) -> dict[Function, None]:
    """The classes derived from one, those that are derived first."""
    found: dict[Function, None] = {}
    for derived in function.__subclasses__():
        found.update(_subclasses(derived))
        found[derived] = None
    return found


@contextlib.contextmanager
def _answered(function: Function, intercept: Intercept) -> Iterator[None]:
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
            if output is answered:  # `apply` calls it after the forward, which has not run
                answered = nothing
                return None
            return setup(ctx, inputs, output)

        return prepare

    with contextlib.ExitStack() as stack:
        if not has_context:
            stack.enter_context(replaced(function, "setup_context", setup_with))
        stack.enter_context(replaced(function, "forward", forward_with))
        yield


def applied_to_inputs(args: tuple[Any, ...], has_context: bool) -> tuple[Any, ...] | None:
    """What `apply` was given, of the arguments of a ``forward``; None where something else calls the forward.

    Args:
        args: The arguments.
        has_context: Whether the first of them is the context that `apply` makes.
    """
    if has_context:
        made_by_apply = bool(args) and isinstance(args[0], torch.autograd.function.FunctionCtx)
        return args[1:] if made_by_apply else None
    # `apply` runs a forward with gradients disabled, and nothing else tells
    return None if torch.is_grad_enabled() else args


# --- checkpoints ---

_RECORDED = "_freegrad_fx_recorded"

_Wrapper: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]


@uses_private_names("following checkpoints")
def follow_checkpoints(record: _Wrapper, otherwise: _Wrapper) -> None:
    """From now on let what `torch.utils.checkpoint` runs again in the backward be run through a function, for good.

    The backward may run at any time, in any thread, so nothing that is undone would do.

    Args:
        record: Called when the forward of a checkpoint begins: makes of the function what is run again.
        otherwise: The same, called in the backward, for checkpoints whose forward has begun before.
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
        return first(ctx, recorded(run), *args)

    @functools.wraps(backward)
    def again(ctx: Any, *grads: Any) -> Any:
        ctx.run_function = known(ctx.run_function)
        return backward(ctx, *grads)

    frame = lookup("torch.utils.checkpoint._CheckpointFrame", "following checkpoints")
    replace_for_good(frame, "recompute_fn", property(read, write))
    replace_for_good(reentrant, "forward", staticmethod(forward))
    replace_for_good(reentrant, "backward", staticmethod(again))
