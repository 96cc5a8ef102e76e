"""Comparisons whose result becomes numbers, such as ``(mem > threshold).float()``: a spelling of a step function.

The comparison and the conversion are two calls. The conversion is the operation of the site: its result is the step of
the difference of the two sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function_variadic

__all__ = [
    "COMPARISONS",
    "Step",
    "compared",
    "compares",
    "converted",
    "converts",
    "function_name",
    "sides",
    "step_at",
]

COMPARISONS = {
    "gt": "a > b", "greater": "a > b",
    "ge": "a >= b", "greater_equal": "a >= b",
    "lt": "a < b", "less": "a < b",
    "le": "a <= b", "less_equal": "a <= b",
}  # fmt: skip
"""The names of the comparisons, and how they are written."""

_CASTS = ("float", "double", "half", "bfloat16", "type_as")
_CASTS_WITH_DTYPE = ("to", "type", "_to_copy")


@dataclass(frozen=True)
class Step:
    """A comparison in a graph whose result becomes numbers.

    Attributes:
        node: The conversion.
        key: The index of the comparison among the arguments of the conversion.
        compared: The comparison.
        larger: The side that is the larger one where the result is 1: a node or a number.
        smaller: The other side.
    """

    node: fx.Node
    key: int
    compared: fx.Node
    larger: Any
    smaller: Any


def step_at(node: fx.Node) -> Step | None:
    """The step that a node of a graph completes; None if it does not convert a comparison into numbers."""
    if node.op not in ("call_function", "call_method"):
        return None
    found = converted(function_name(node), node.args, node.kwargs)
    if found is None:
        return None
    key, positive = found
    source = node.args[key]
    if not isinstance(source, fx.Node) or (name := function_name(source)) not in COMPARISONS:
        return None
    pair = sides(name, source.args, source.kwargs)
    if pair is None or any(user.target is compared for user in node.users):
        return None
    if any(map(_writes, source.users)):
        return None  # what is converted is not the result of the comparison alone
    return Step(node, key, source, *(pair if positive else pair[::-1]))


def _writes(user: fx.Node) -> bool:
    """Whether a use of a mask writes into it."""
    name = function_name(user)
    return name == "setitem" or (name.endswith("_") and not name.endswith("__"))


def sides(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """What a comparison compares: the side that is the larger one where it holds, then the other.

    Args:
        name: The name of the comparison.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    given = [*args, *(kwargs[n] for n in ("self", "input", "other") if n in kwargs)]
    if len(given) != 2 or kwargs.get("out") is not None:
        return None
    left, right = given
    return (right, left) if name.startswith("l") else (left, right)


def converted(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, bool] | None:
    """The position of what a call converts into floating point numbers, and whether true becomes 1; None if it is none.

    The conversions are casts to a floating point dtype, the choice between 1.0 and 0.0, and the product with 1.0.
    """
    if name in _CASTS or (
        name in _CASTS_WITH_DTYPE and any(map(_is_float, (*args[1:], *kwargs.values())))
    ):
        return (0, True) if args else None
    if name == "where" and len(args) == 3:
        kinds, chosen = {*map(type, args[1:])}, args[1:]
        numbers = float in kinds and kinds <= {int, float}  # two integers stay integers
        return (0, chosen == (1, 0)) if numbers and chosen in ((1, 0), (0, 1)) else None
    if name == "mul" and len(args) == 2:
        ones = [type(value) is float and value == 1 for value in args]
        return (ones.index(False), True) if any(ones) and not all(ones) else None
    return None


def _is_float(argument: Any) -> bool:
    """Whether an argument of a conversion may be a floating point dtype, or a tensor of one."""
    if isinstance(argument, fx.Node):
        # `.to(x.dtype)`, `.to(x)`; not `.to(x.device)`
        return argument.target is not getattr or argument.args[1] == "dtype"
    dtype = argument.dtype if isinstance(argument, Tensor) else argument
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def function_name(node: fx.Node) -> str:
    """The name of the function or method that a node calls, without an overload; ``""`` for other nodes."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", "")).partition(".")[0]
    return ""


def _spelled(names: tuple[str, ...]) -> dict[Any, str]:
    """The functions of PyTorch of these names, as ``__torch_function__`` receives them."""
    places = (Tensor, torch)
    return {getattr(p, n): n.strip("_") for n in names for p in places if hasattr(p, n)}


_COMPARING = _spelled((*COMPARISONS, *(f"__{name}__" for name in ("gt", "ge", "lt", "le"))))
_CONVERTING = _spelled((*_CASTS, "to", "type", "where", "mul", "multiply", "__mul__", "__rmul__"))
_CONVERTING = {f: n.removeprefix("r").replace("multiply", "mul") for f, n in _CONVERTING.items()}


def compares(function: Callable[..., Any]) -> str:
    """The name of the comparison that a function of PyTorch computes; ``""`` for other functions."""
    return _COMPARING.get(function, "")


def converts(function: Callable[..., Any]) -> str:
    """The name for `converted` of a function of PyTorch that may convert; ``""`` for other functions."""
    return _CONVERTING.get(function, "")


def compared(x: Tensor, value: Tensor) -> Tensor:
    """Return `value`, the step of `x` that the model has computed as a comparison.

    Formula: H(x); its own derivative is zero.

    Args:
        x: The difference of the sides of the comparison.
        value: The result.
    """
    if has_torch_function_variadic(x, value):
        return handle_torch_function(compared, (x, value), x, value)
    return value
