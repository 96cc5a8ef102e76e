"""The three parts of a call of a module that has forward hooks: the pre-hooks, the forward, and the hooks.

A rule replaces the backward of the forward only. Hooks can change values, and keep their own derivative:

    given  = run_pre_hooks(module, {}, 0, x)
    x      = given[0]
    y      = call_without_hooks(module, {}, x, given)
    result = run_hooks(module, {}, y, given)               # the same as module(x)

As in `call_with`, the second argument holds other tensors in place of some parameters of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.overrides import handle_torch_function

from .._torch import modules
from .._torch.dynamo import is_compiling
from .calls import recording, with_parameters

__all__ = ["call_without_hooks", "run_hooks", "run_pre_hooks"]

T = TypeVar("T")

Given: TypeAlias = tuple[Any, tuple[Any, ...], dict[str, Any], int | str]
"""The activated tensor, the arguments of the forward, and the position or keyword of the tensor among them."""


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
        The activated tensor, the arguments that the forward gets, and the position or keyword of the tensor.

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
        at = _position(key, taken, named)
        if at is None:
            raise RuntimeError(
                f"the forward pre-hooks of {type(module).__name__} leave no tensor among the arguments of its "
                f"forward, so no rule can act on it. Give the module a native backward (None), or remove the hook."
            )
        return (taken[at] if isinstance(at, int) else named[at]), taken, named, at

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
    _, args, kwargs, key = given
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
    _, args, kwargs, _ = given
    return with_parameters(
        module, parameters, lambda: modules.after_hooks(module, args, kwargs, result)
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
