"""Which argument of a function of PyTorch is which operand of an op."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .._torch.operators import schema
from .op import Op

__all__ = ["Layout", "layout_of"]

Layout = tuple[tuple[str, int | None, tuple[str, ...]], ...]
"""For each operand of an op its name, the index of the argument, None if it has none, and its possible keywords."""


def layout_of(op: Op, target: Any) -> Layout:
    """Where a function, an operator, or the name of a method takes the operands of an op."""
    names = _argument_names(target)
    reads = op.reads
    if _name(target) in op.swapped:
        reads = tuple(zip(op.operands, (given for _, given in reversed(reads)), strict=True))
    found = []
    taken: set[int] = set()
    for operand, given in reads:
        positions = (names.index(n) for n in given if n in names and names.index(n) not in taken)
        position = next(positions, None)
        taken |= set() if position is None else {position}
        keywords = (names[position],) if position is not None else ()
        found.append((operand, position, tuple(dict.fromkeys((*keywords, *given)))))
    return tuple(found)


def _name(target: Any) -> str:
    if isinstance(target, str):
        return target
    return str(getattr(target, "__name__", "")).partition(".")[0]


def _argument_names(target: Any) -> list[str]:
    if hasattr(target, "overloadpacket"):
        return [argument.name for argument in schema(target).arguments]
    if hasattr(target, "overloads"):
        return _argument_names(getattr(target, target.overloads()[0]))
    function: Callable[..., Any] | None = (
        target if callable(target) else getattr(torch.Tensor, target, None)
    )
    try:
        return list(inspect.signature(function).parameters)  # type: ignore[arg-type]
    except (
        TypeError,
        ValueError,
    ):  # a builtin, which has the arguments of the operator of its name
        packet = getattr(torch.ops.aten, _name(target).strip("_"), None)
        return [] if packet is None else _argument_names(packet)
