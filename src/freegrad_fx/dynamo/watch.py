"""Detects the operations that a compiled program runs where no rule can act: not in its graphs, and not intercepted.

Dynamo leaves code that it cannot capture to Python, where `outside` intercepts the calls of PyTorch's functions. A
dispatch mode receives every operation of such code that was not intercepted, for whatever reason. PyTorch compiles as
if the mode was not active.
This file does not know programs or rules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._torch import tree
from .._torch.dispatch import DispatchMode, current_dispatch_mode
from ..graph.provenance import META, Origin, is_users
from ..sites.operations import find_sites
from ..sites.site import Located
from ..vocabulary.activations import OPS
from ..vocabulary.op import Op
from .frames import frames

__all__ = [
    "Watch",
    "activation_call",
    "located",
    "operations",
    "possible_activations",
]


class Watch(DispatchMode):  # type: ignore[misc]
    """A dispatch mode that passes every operation to a function.

    Args:
        seen: Called with the operation and its arguments before the operation runs.
    """

    supports_higher_order_operators = True

    def __init__(self, seen: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__()
        self._seen = seen
        self._paused = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Tell Dynamo to compile as if this mode was not active."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Pass an operation to the function, then run it."""
        kwargs = kwargs or {}
        if not self._paused:
            self._seen(func, args, kwargs)
        return func(*args, **kwargs)

    def unseen(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Call a function whose operations are not passed on."""
        innermost = current_dispatch_mode() is self
        if innermost:  # operations are faster without the mode
            self.__exit__(None, None, None)
        self._paused += 1
        try:
            return function(*args)
        finally:
            self._paused -= 1
            if innermost:
                self.__enter__()


# --- activations by operation of ATen ---


def possible_activations(func: Any) -> tuple[str, ...]:
    """The names of the activations that ATen computes with an operation."""
    return operations().get(func, ())


def _listed() -> list[Op]:
    """The ops whose calls are looked for. PyTorch and optimizers themselves compute sums and products everywhere."""
    return [op for op in OPS.values() if not op.on_demand]


@functools.cache
def operations() -> dict[Any, tuple[str, ...]]:
    """The names of the activations by operation of ATen.

    The first call has to be outside of dispatch modes, because operators are not decomposed inside of one.
    """
    found: dict[Any, dict[str, None]] = {o: {op.name: None} for op in _listed() for o in op.aten}
    for op in _listed():
        if op.function is not None and not hasattr(op.function, "__code__"):
            x = torch.ones(1)
            with _Record() as record, torch.no_grad():
                op.function(x)
            for func in record.operations:
                found.setdefault(func, {})[op.name] = None
    return {func: tuple(names) for func, names in found.items()}


class _Record(DispatchMode):  # type: ignore[misc]
    """A dispatch mode that lists the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.operations.append(func)
        return func(*args, **(kwargs or {}))


@functools.cache
def _written_in_python() -> dict[int, tuple[CodeType, str]]:
    """The activations that PyTorch implements in Python, such as `F.softsign`, by the identity of their code.

    Code that Dynamo generates cannot be hashed if a dict is among its constants, for example where a function that is
    made in the forward is alive across a graph break.
    """
    return {
        id(function.__code__): (function.__code__, op.name)
        for op in _listed()
        for function in op.functions
        if hasattr(function, "__code__")
    }


def activation_call() -> tuple[FrameType, str] | None:
    """The frame and the name of the activation that is running, if PyTorch implements it in Python; else None."""
    known = _written_in_python()
    for frame in frames():
        if is_users(frame.f_code):
            return None
        if found := known.get(id(frame.f_code)):
            return frame, found[1]
    return None


# --- sites of single operations ---


def located(target: Any, args: Any, kwargs: Any, where: Origin) -> Located | None:
    """The site of one operation; None if it is not a site."""
    graph = fx.Graph()

    def as_node(value: Any) -> Any:
        return graph.placeholder("x") if isinstance(value, Tensor) else value

    nodes, keywords = tree.map_leaves(as_node, (args, kwargs))
    node = graph.call_function(target, nodes, keywords)
    node.meta[META] = where
    sites = find_sites(graph, nn.Module())
    return sites[0] if sites else None
