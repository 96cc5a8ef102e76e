"""Recognises activations: which op a node calls, on which argument, and whether in place.

Nodes are never changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .._torch.operators import schema
from .activations import CASES, OPS, TABLE
from .op import Op, Spelling

__all__ = ["may_be_recognised", "recognise", "recognise_call"]


@dataclass(frozen=True)
class _Entry:
    """The meaning of a node's target, independent of the arguments."""

    op: Op
    inplace: bool
    inplace_position: int | None = None  # index of the `inplace` argument


_Target: TypeAlias = tuple[str, Any]  # `op` and `target` of a node; for modules, the class


def _entries(op: Op) -> Iterator[tuple[_Target, _Entry]]:
    out_of_place, in_place = _Entry(op, inplace=False), _Entry(op, inplace=True)
    for module in op.modules:
        yield ("call_module", module), out_of_place
    for function in op.functions:
        parameters = inspect.signature(function).parameters if inspect.isfunction(function) else {}
        position = list(parameters).index("inplace") if "inplace" in parameters else None
        yield ("call_function", function), _Entry(op, False, position)
    for function in op.inplace_functions:
        yield ("call_function", function), in_place
    for method in op.methods:
        yield ("call_method", method), out_of_place
        if hasattr(Tensor, f"{method}_"):
            yield ("call_method", f"{method}_"), in_place
    packets = {overload.overloadpacket: overload for overload in op.aten}
    for target, overload in [*zip(op.aten, op.aten, strict=True), *packets.items()]:
        alias = schema(overload).arguments[0].alias_info
        writes = alias is not None and alias.is_write
        yield ("call_function", target), in_place if writes else out_of_place


def _index(table: tuple[Op, ...]) -> dict[_Target, _Entry]:
    index: dict[_Target, _Entry] = {}
    for target, entry in (pair for op in table for pair in _entries(op)):
        first = index.setdefault(target, entry)
        if first is not entry:
            raise ValueError(f"{target[1]} spells both {first.op.name!r} and {entry.op.name!r}")
    return index


_SPELLINGS = _index(TABLE)

_FUNCTIONS: dict[Any, _Entry] = {
    getattr(Tensor, target) if kind == "call_method" else target: entry
    for (kind, target), entry in _SPELLINGS.items()
    if kind != "call_module"
}


# The last three are NumPy's names, which torch.* also accepts.
_TENSOR_KEYWORDS = ("input", "self", "x", "a", "x1")


def recognise(node: fx.Node, module: nn.Module | None, first: int = 0) -> Spelling | None:
    """Return how `node` calls an activation, or None if it does not call one.

    Args:
        node: The node.
        module: The module that the node calls, or None.
        first: The index in `node.args` of the first argument of the called module or function.
    """
    called = ("call_module", type_before_parametrizations(module)) if module is not None else None
    entry = _SPELLINGS.get(called or (node.op, node.target))
    inplace = bool(getattr(module, "inplace", False))
    # A flag that the graph computes is a node, and therefore counts as true
    if entry is None:
        return None
    return _spelling(entry, node.args, node.kwargs, fx.Node, first, inplace)


def may_be_recognised(function: Callable[..., Any]) -> bool:
    """Whether `recognise_call` can find that a call of a function calls an activation."""
    return function in _FUNCTIONS


def recognise_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Spelling | None:
    """Return how a call that is about to run calls an activation, or None if it does not call one.

    Args:
        function: A function of PyTorch, as ``__torch_function__`` receives it.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    entry = _FUNCTIONS.get(function)
    return None if entry is None else _spelling(entry, args, kwargs, Tensor)


def _spelling(
    entry: _Entry,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    kind: type,
    first: int = 0,
    inplace: bool = False,
) -> Spelling | None:
    key: int | str | None = first
    if len(args) <= first:
        key = next((k for k in _TENSOR_KEYWORDS if k in kwargs), None)
    if key is None or not isinstance(_argument(args, kwargs, key, key), kind):
        return None
    flag = _argument(args, kwargs, entry.inplace_position, "inplace")
    return Spelling(
        op=_narrowed(entry.op, args, kwargs),
        key=key,
        inplace=entry.inplace or inplace or bool(flag),
        writes_out=kwargs.get("out") is not None,
    )


def _narrowed(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Op:
    case, given = CASES.get(op.name, (op.name, {}))
    arguments = [_argument(args, kwargs, i, name) for i, name in enumerate(given, start=1)]
    return OPS[case] if arguments == list(given.values()) else op


def _argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int | str | None, name: int | str
) -> Any:
    if isinstance(position, int) and position < len(args):
        return args[position]
    return kwargs.get(str(name))
