"""Which nodes of a graph compute numbers, because they describe the shape of a tensor."""

from __future__ import annotations

import builtins
import operator
from typing import Any

import torch
from torch import fx

__all__ = ["known_number"]

_METHODS = frozenset({"size", "stride", "dim", "ndimension", "numel", "nelement", "storage_offset"})
_PROPERTIES = frozenset({"shape", "ndim"})
_OF_SEQUENCES = frozenset({"shape", "size", "stride"})
_ARITHMETIC = frozenset(
    getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs")
)


def known_number(node: fx.Node) -> Any:
    """A number of the type that a node computes, or a `torch.Size`, if the node describes a tensor; None otherwise.

    Args:
        node: ``x.shape``, ``x.size(1)``, an item of such a result, or arithmetic with these and with numbers.
    """
    name, args = _description(node)
    if name:
        return torch.Size() if name in _OF_SEQUENCES and len(args) < 2 and not node.kwargs else 1
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        of, index = node.args
        whole = isinstance(of, fx.Node) and type(known_number(of)) is torch.Size
        return (torch.Size() if isinstance(index, slice) else 1) if whole else None
    if node.target is builtins.len:
        return 1
    if node.target not in _ARITHMETIC:
        return None
    values: list[Any] = [known_number(a) if isinstance(a, fx.Node) else a for a in node.args]
    if not values or not all(type(value) in (int, float) for value in values):
        return None
    # The values do not matter for the type
    target: Any = node.target
    return target(*(type(value)(1) for value in values))


def _description(node: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """The name of the method or property by which a node describes a tensor, and the arguments; ``""`` otherwise."""
    if node.op == "call_method" and node.target in _METHODS:
        return str(node.target), node.args
    if node.target is getattr and node.args[1] in _PROPERTIES:
        return str(node.args[1]), ()
    return "", ()
