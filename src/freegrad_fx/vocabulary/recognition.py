"""Recognises activations: which op a node calls, on which argument, and whether in place.

Nodes are never changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .._torch.operators import schema
from .activations import CASES, OPS, TABLE
from .op import Op, Spelling

__all__ = ["recognise"]


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
    key: int | str | None = first
    if len(node.args) <= first:
        key = next((k for k in _TENSOR_KEYWORDS if k in node.kwargs), None)
    if entry is None or key is None or not isinstance(_argument(node, key, key), fx.Node):
        return None
    # A flag that the graph computes is a node, and therefore counts as true
    flag = _argument(node, entry.inplace_position, "inplace") or getattr(module, "inplace", False)
    return Spelling(
        op=_narrowed(entry.op, node),
        key=key,
        inplace=entry.inplace or bool(flag),
        writes_out=node.kwargs.get("out") is not None,
    )


def _narrowed(op: Op, node: fx.Node) -> Op:
    case, given = CASES.get(op.name, (op.name, {}))
    arguments = [_argument(node, i, name) for i, name in enumerate(given, start=1)]
    return OPS[case] if arguments == list(given.values()) else op


def _argument(node: fx.Node, position: int | str | None, name: int | str) -> Any:
    if isinstance(position, int) and position < len(node.args):
        return node.args[position]
    return node.kwargs.get(str(name))
