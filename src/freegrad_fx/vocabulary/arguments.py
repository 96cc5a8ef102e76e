"""Which argument of a function of PyTorch is which operand of an op."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .._torch.operators import schema
from .op import Op

__all__ = ["FIRST", "Layout", "argument_names", "layout_of", "name_of"]

Layout = tuple[tuple[str, int | None, tuple[str, ...]], ...]
"""For each operand of an op its name, the index of the argument, None if it has none, and its possible keywords."""


# The last three are NumPy's names, which torch.* also accepts.
FIRST = ("input", "self", "x", "a", "x1")
"""The possible keywords of the first argument."""


def layout_of(op: Op, target: Any) -> Layout:
    """Where a function, an operator, or the name of a method takes the operands of an op."""
    names = argument_names(target)
    reads = op.reads
    if name_of(target) in op.swapped:
        reads = tuple(zip(op.operands, (given for _, given in reversed(reads)), strict=True))
    found: list[tuple[str, int | None, tuple[str, ...]]] = []
    taken: set[int] = set()
    for operand, given in reads:
        if not given:  # the only operand, the first argument
            found.append((operand, 0, FIRST))
            continue
        positions = (names.index(n) for n in given if n in names and names.index(n) not in taken)
        position = next(positions, None)
        taken |= set() if position is None else {position}
        keywords = (names[position],) if position is not None else ()
        found.append((operand, position, tuple(dict.fromkeys((*keywords, *given)))))
    return tuple(found)


def name_of(target: Any) -> str:
    """The name of a function or operator, or of a method, without its overload."""
    if isinstance(target, str):
        return target
    return str(getattr(target, "__name__", "")).partition(".")[0]


# Functions with several signatures, and operators of Python
_POWER = ["input", "exponent"]
_NAMES = {
    "einsum": ["equation"],  # the operands follow, as arguments or in a list
    "mean": ["input", "dim", "keepdim", "dtype"],
    **dict.fromkeys(("pow", "pow_", "ipow", "__pow__", "__ipow__"), _POWER),
}


def argument_names(target: Any) -> list[str]:
    """The names of the arguments of a function or operator, or of the method of a name, in order."""
    if name_of(target) in _NAMES and not hasattr(target, "overloadpacket"):
        return _NAMES[name_of(target)]
    if hasattr(target, "overloadpacket"):
        return [argument.name for argument in schema(target).arguments]
    if hasattr(target, "overloads"):
        return argument_names(getattr(target, target.overloads()[0]))
    function: Callable[..., Any] | None = (
        target if callable(target) else getattr(torch.Tensor, target, None)
    )
    try:
        names = list(inspect.signature(function).parameters)  # type: ignore[arg-type]
        if names != ["args", "kwargs"]:
            return names
    except (TypeError, ValueError):
        pass
    # a builtin, or a function that chooses another one, has the arguments of the operator of its name
    packet = getattr(torch.ops.aten, name_of(target).strip("_"), None)
    return [] if packet is None else argument_names(packet)
