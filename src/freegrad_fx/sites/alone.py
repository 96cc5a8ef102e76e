"""An operation as a function of its activated tensor alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

from .._torch import tree

__all__ = ["Alone", "call_alone", "node_alone", "other_constants"]

Alone: TypeAlias = Callable[[Tensor], Tensor]


def node_alone(node: fx.Node, key: int | str, module: nn.Module | None) -> Alone | None:
    """The operation of a node with its other arguments; None if the graph computes one of them.

    Args:
        node: The node.
        key: The position of the activated tensor among its arguments.
        module: The module that it calls, or None.
    """
    if module is not None:
        return _module_alone(module)
    function: Any = (
        getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    )
    return call_alone(function, node.args, node.kwargs, key)


def call_alone(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], key: int | str
) -> Alone | None:
    """A call with all arguments but one; None if another one is not a constant."""
    others = [
        *(a for i, a in enumerate(args) if i != key),
        *(v for n, v in kwargs.items() if n != key),
    ]
    if any(isinstance(value, Tensor | fx.Node) for value in tree.leaves(others)):
        return None

    def alone(x: Tensor) -> Tensor:
        if isinstance(key, int):
            result: Tensor = function(*args[:key], x, *args[key + 1 :], **kwargs)
        else:
            result = function(*args, **{**kwargs, key: x})
        return result

    return alone


def other_constants(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], key: int | str
) -> tuple[str, ...]:
    """The arguments of a call that are no tensors, in a form that can be compared."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return tuple(f"{k}={v!r}" for k, v in given if k != key and not isinstance(v, Tensor))


def _module_alone(module: nn.Module) -> Alone | None:
    """The forward of a module in train mode, without its hooks; None if the module has parameters or buffers."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None

    def alone(x: Tensor) -> Tensor:
        result: Tensor = copy.deepcopy(module).train().forward(x)
        return result

    return alone
