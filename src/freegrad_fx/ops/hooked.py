"""The three parts of a call of a module that has forward hooks: the pre-hooks, the forward, and the hooks.

A rule replaces the backward of the forward only. Hooks can change values, and keep their own derivative:

    given  = run_pre_hooks(module, {}, 0, x)
    x      = given[0]
    y      = call_without_hooks(module, {}, x, given)
    result = run_hooks(module, {}, y, given)               # the same as module(x)

As in `call_with`, the second argument holds other tensors in place of some parameters of the module.

The call of a module whose forward is in the graph begins and ends with calls that run its hooks, and return each value
of its arguments and of its result:

    entered = enter_call(module, (x,), {}, ())
    x       = entered[0]
    ...                                                    # the forward
    y       = leave_call(module, entered, y, (x,), {}, ())[0]
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.overrides import handle_torch_function

from .._torch import modules, tree
from .._torch.dynamo import is_compiling
from .calls import recording, with_parameters

__all__ = [
    "call_without_hooks",
    "enter_call",
    "forward_of",
    "leave_call",
    "run_hooks",
    "run_pre_hooks",
    "values_in",
    "with_hooks_on_errors",
]

T = TypeVar("T")

Given: TypeAlias = tuple[Any, tuple[Any, ...], dict[str, Any], int | str, Any]
"""The activated tensor, the arguments of the forward, the position or keyword of the tensor among them, and the object
that runs the backward hooks, or None."""


def run_pre_hooks(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    key: int | str,
    /,
    *args: Any,
    **kwargs: Any,
) -> Given:
    """Run the forward pre-hooks of a module, and those of all modules, as a call of the module does.

    Args:
        module: The module that is called.
        parameters: Replacement tensors for parameters of the module.
        key: The position or the keyword of the activated tensor among the arguments.
        *args: Positional arguments of the call.
        **kwargs: Keyword arguments of the call.

    Returns:
        The activated tensor, the arguments that the forward gets, the position or keyword of the tensor, and the
        object that runs the backward hooks, or None.

    Raises:
        RuntimeError: A pre-hook does not return what PyTorch requires, or the hooks leave no tensor to the forward.
    """
    traced = recording(parameters, *args, *kwargs.values())
    if traced:
        return handle_torch_function(
            run_pre_hooks, traced, module, parameters, key, *args, **kwargs
        )

    def run() -> Given:
        taken, named = modules.after_pre_hooks(module, args, kwargs)
        backward = modules.backward_hook(module)
        if backward is not None:
            taken = backward.setup_input_hook(taken)
        at = _position(key, taken, named)
        if at is None:
            raise RuntimeError(
                f"the forward pre-hooks of {type(module).__name__} leave no tensor among the arguments of its "
                f"forward, so no rule can act on it. Give the module a native backward (None), or remove the hook."
            )
        return (taken[at] if isinstance(at, int) else named[at]), taken, named, at, backward

    return _called(module, parameters, run, args, kwargs)


def call_without_hooks(
    module: nn.Module, parameters: Mapping[str, Tensor], x: Any, given: Given, /
) -> Any:
    """Run the forward of a module without its hooks.

    Args:
        module: The module that is called.
        parameters: Replacement tensors for parameters of the module.
        x: The activated tensor.
        given: The result of `run_pre_hooks`; `x` replaces the activated tensor in it.

    Returns:
        The output of the forward.
    """
    if traced := recording(parameters, x, given):
        return handle_torch_function(call_without_hooks, traced, module, parameters, x, given)
    _, args, kwargs, key, _ = given
    if isinstance(key, int):
        args = (*args[:key], x, *args[key + 1 :])
    else:
        kwargs = {**kwargs, key: x}
    return _called(module, parameters, lambda: module.forward(*args, **kwargs), *given[1:3])


def run_hooks(
    module: nn.Module, parameters: Mapping[str, Tensor], result: Any, given: Given, /
) -> Any:
    """Run the forward hooks of a module, and those of all modules, as a call of the module does.

    Args:
        module: The module that is called.
        parameters: Replacement tensors for parameters of the module.
        result: The output of the forward.
        given: The result of `run_pre_hooks`.

    Returns:
        The output of the forward, or what the hooks return in place of it.
    """
    if traced := recording(parameters, result, given):
        return handle_torch_function(run_hooks, traced, module, parameters, result, given)
    _, args, kwargs, _, backward = given

    def run() -> Any:
        after = modules.after_hooks(module, args, kwargs, result)
        return modules.watch_backward(module, backward, after)

    return with_parameters(module, parameters, run)


# --- modules whose forward is in the graph ---


def enter_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fixed: tuple[int, ...], /
) -> tuple[Any, ...]:
    """Begin the call of a module whose forward is in the graph: run its pre-hooks.

    Args:
        module: The module.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        fixed: The indices of the values that the hooks cannot replace.

    Returns:
        The values in the arguments after the pre-hooks, and what `leave_call` needs.

    Raises:
        RuntimeError: The hooks change what is a constant of the graph.
    """
    if traced := recording({}, *values_in((args, kwargs))):
        return handle_torch_function(enter_call, traced, module, args, kwargs, fixed)

    def run() -> tuple[Any, Any]:
        taken, named = modules.after_pre_hooks(module, tuple(args), dict(kwargs))
        backward = modules.backward_hook(module)
        if backward is not None:
            taken = backward.setup_input_hook(taken)
        return (taken, named), backward

    after, backward = _called(module, {}, run, tuple(args), dict(kwargs))
    values = _values(module, "arguments", (tuple(args), dict(kwargs)), after, fixed)
    call = (backward, after)
    if not is_compiling() and modules.has_hooks_on_errors(module):
        _running.calls.append((module, call))
    return (*values, call)


def leave_call(
    module: nn.Module,
    entered: tuple[Any, ...],
    result: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fixed: tuple[int, ...],
    /,
) -> tuple[Any, ...]:
    """End the call of a module whose forward is in the graph: run its hooks.

    Args:
        module: The module.
        entered: The result of `enter_call`.
        result: The result of the forward.
        args: The positional arguments of the forward, as they are now.
        kwargs: The keyword arguments of the forward, as they are now.
        fixed: The indices of the values in the result that the hooks cannot replace.

    Returns:
        The values in the result after the hooks.

    Raises:
        RuntimeError: The hooks change what is a constant of the graph.
    """
    if traced := recording({}, *values_in((result, args, kwargs))):
        return handle_torch_function(
            leave_call, traced, module, entered, result, args, kwargs, fixed
        )
    backward, _ = call = entered[-1]
    if not is_compiling() and _running.calls and _running.calls[-1][1] is call:
        _running.calls.pop()
    after = modules.after_hooks(module, tuple(args), dict(kwargs), result)
    after = modules.watch_backward(module, backward, after)
    return _values(module, "result", result, after, fixed)


def values_in(value: Any) -> list[Any]:
    """The values in nested tuples, lists and dicts."""
    if isinstance(value, tuple | list):
        return [inner for part in value for inner in values_in(part)]
    if isinstance(value, dict):
        return [inner for part in value.values() for inner in values_in(part)]
    return [value]


def forward_of(
    module: nn.Module, parameters: Mapping[str, Tensor], /, *args: Any, **kwargs: Any
) -> Any:
    """Run the forward of a module without its hooks, between `enter_call` and `leave_call`.

    Args:
        module: The module that is called.
        parameters: Replacement tensors for parameters of the module.
        *args: Positional arguments of the forward.
        **kwargs: Keyword arguments of the forward.
    """
    if traced := recording(parameters, *args, *kwargs.values()):
        return handle_torch_function(forward_of, traced, module, parameters, *args, **kwargs)
    return with_parameters(module, parameters, lambda: module.forward(*args, **kwargs))


class _Running(threading.local):
    """The calls with hooks for errors that have begun and not ended in a thread."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, Any]] = []


_running = _Running()


def with_hooks_on_errors(function: Callable[..., T]) -> Callable[..., T]:
    """Wrap a forward that contains calls of `enter_call`: an error runs the hooks with ``always_call=True``."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> T:
        if is_compiling():
            return function(*args, **kwargs)
        before = len(_running.calls)
        try:
            return function(*args, **kwargs)
        except Exception:
            for module, (_, given) in reversed(_running.calls[before:]):
                modules.run_hooks_on_errors(module, *given)
            raise
        finally:
            del _running.calls[before:]

    return run


def _values(
    module: nn.Module, what: str, before: Any, after: Any, fixed: tuple[int, ...]
) -> tuple[Any, ...]:
    """The values that hooks return, as many as before.

    Raises:
        RuntimeError: The hooks change the structure, or a value that is a constant of the graph.
    """
    old, new = values_in(before), values_in(after)
    changed = [index for index, (a, b) in enumerate(zip(old, new, strict=False)) if a is not b]
    if len(old) != len(new) or not tree.same_structure(before, after):
        problem = f"change the structure of its {what}"
    elif any(not isinstance(old[i], Tensor) and old[i] != new[i] for i in changed):
        problem = f"change a value in its {what} that is no tensor"
    elif any(isinstance(old[i], Tensor) and i in fixed for i in changed):
        problem = f"replace a tensor in its {what} that is also read in other ways"
    else:
        return tuple(new)
    raise RuntimeError(
        f"the hooks of {type(module).__name__} {problem}, so they cannot act: its forward is a part of the graph. Keep "
        f"the module as one call, with leaf_modules=[{type(module).__name__}] in transform; or register the hooks on "
        f"the original model and use freegrad_fx.compile(model, rules)."
    )


def _called(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    function: Callable[[], T],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> T:
    """Run a part of the call of a module; if it fails, run the hooks with ``always_call=True``, as PyTorch does."""
    if is_compiling() or not modules.has_hooks_on_errors(module):  # PyTorch does not compile them
        return with_parameters(module, parameters, function)
    try:
        return with_parameters(module, parameters, function)
    except Exception:
        modules.run_hooks_on_errors(module, args, kwargs)
        raise


def _position(key: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """The position or keyword of the activated tensor; of the first tensor, if the pre-hooks moved it."""
    own = args[key] if isinstance(key, int) and key < len(args) else kwargs.get(str(key))
    if isinstance(own, Tensor):
        return key
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return next((place for place, value in places if isinstance(value, Tensor)), None)
