"""Marks the calls of modules that a trace opens, so that hooks can run around them; see `graph.marks`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx, nn

from .._torch import tree
from .._torch.modules import has_hooks
from ..graph.marks import begins, ends, part
from ..graph.nodes import new_node
from ..ops.hooked import values_in
from ..sites.remarks import Lost, add_once
from .proxies import FlagProxy, RecordingProxy, TensorProxy

__all__ = ["begin_call", "end_call"]


def begin_call(
    tracer: Any, m: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.Node | None:
    """Mark the beginning of the call of a module that a tracer is about to open.

    Returns:
        The mark; None if a graph cannot hold the arguments.
    """
    if not _can_be_held((args, kwargs)):
        _note_unmarked(tracer, m, path)
        return None
    return new_node(
        tracer.graph, "call_function", begins, (path, _as_nodes(args), _as_nodes(kwargs))
    )


def end_call(tracer: Any, m: nn.Module, path: str, begin: fx.Node | None, result: Any) -> Any:
    """Mark the end of the call of a module.

    Args:
        tracer: The tracer.
        m: The module.
        path: Its path.
        begin: The result of `begin_call`.
        result: The result of the forward.

    Returns:
        The result. A value in it that the module received and returns has a new proxy, which only those have that
        receive it from the module.
    """
    if begin is None:
        return result
    if not _can_be_held(result):
        tracer.graph.erase_node(begin)
        _note_unmarked(tracer, m, path)
        return result
    given = begin.args[1:3]
    end = new_node(tracer.graph, "call_function", ends, (begin, _as_nodes(result), *given))
    new = {
        index: tracer.proxy(new_node(tracer.graph, "call_function", part, (end, index)))
        for index, value in enumerate(values_in(result))
        if type(value) is RecordingProxy and value.node < begin
    }
    if not new:
        return result
    index = iter(range(len(values_in(result))))
    return tree.map_leaves(lambda value: new.get(next(index), value), result)


def _note_unmarked(tracer: Any, m: nn.Module, path: str) -> None:
    tracer.unmarked.add(path)
    if has_hooks(m):
        reason = "its arguments or its result are objects that a graph cannot hold; register them on its submodules"
        add_once(tracer.lost, Lost(path, f"the hooks of {type(m).__name__}", reason))


def _as_nodes(value: Any) -> Any:
    # The tracer would make nodes of namedtuples
    if isinstance(value, tuple):
        inside = map(_as_nodes, value)
        return type(value)(*inside) if hasattr(value, "_fields") else tuple(inside)
    if isinstance(value, list):
        return [_as_nodes(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _as_nodes(inner) for key, inner in value.items()}
    return value.node if isinstance(value, fx.Proxy) else value


_HELD = (
    RecordingProxy, TensorProxy, FlagProxy, type(None), bool, int, float, complex, str,
    torch.dtype, torch.device, torch.memory_format, torch.layout,
)  # fmt: skip


def _can_be_held(value: Any) -> bool:
    """Whether a graph can hold a value without further nodes."""
    kind = type(value)
    if kind in (tuple, list) or (isinstance(value, tuple) and _is_importable(kind)):
        return all(map(_can_be_held, value))
    if kind is dict:
        return all(type(key) is str and _can_be_held(inner) for key, inner in value.items())
    return kind in _HELD


def _is_importable(kind: type[Any]) -> bool:
    """Whether a pickle finds a class by its name."""
    return getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind
