"""Finds norms that a model computes in separate operations: RMSNorm as in nearly every language model, and LayerNorm.

The mean of squares leads to a square root, which divides what was squared. A factor and a term that are parameters,
and conversions of dtypes, belong to the norm if its module computes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from ..graph.nodes import parameter_of
from ..graph.provenance import origin
from ..vocabulary.activations import OPS
from .compound import (
    Compound,
    given,
    is_cast,
    is_number,
    name_of,
    obstacle_inside,
    uses_of,
    without_casts,
)

__all__ = ["norm_at"]


@dataclass
class _Found:
    """What is known of a norm so far."""

    dims: int = 0
    eps: float = 0.0
    parts: dict[fx.Node, None] = field(default_factory=dict)
    reads: dict[str, tuple[fx.Node, int | str]] = field(default_factory=dict)
    centred: bool = False


def norm_at(node: fx.Node, root: nn.Module) -> Compound | None:
    """The norm whose denominator a node computes; None if it computes none.

    Args:
        node: A node.
        root: The module whose parameters the graph reads.
    """
    found = _Found()
    squared = _mean_of_squares(node, found)
    if squared is None:
        return None
    divisor = name_of(node) == "sqrt"
    for chain, product, numerator in _products(node, divisor):
        one = replace(found, parts={**found.parts, **dict.fromkeys([node, *chain])})
        if (base := _common(squared, numerator, product, one)) is not None:
            return _norm(product, base, one, root)
    return None


def _mean_of_squares(node: fx.Node, found: _Found) -> fx.Node | None:
    """What is squared, if a node is the root of the mean of its squares, or the inverse of that."""
    name = name_of(node)
    if name not in ("sqrt", "rsqrt") and not (name == "pow" and given(node, 1, "exponent") == -0.5):
        return None
    mean = given(node, 0, "input", "self")
    if name_of(mean) == "add" and not mean.kwargs:
        terms = [term for term in mean.args if not is_number(term)]
        if len(terms) != 1 or len(mean.args) != 2:
            return None
        found.eps = float(next(term for term in mean.args if is_number(term)))
        found.parts[mean] = None
        mean = terms[0]
    found.dims = _dims(mean)
    if not found.dims:
        return None
    square: Any = mean.args[0]
    squared = given(square, 0, "input", "self") if isinstance(square, fx.Node) else None
    name = name_of(square)
    if name == "mul":
        squares = len(square.args) == 2 and square.args[0] is square.args[1]
    else:
        squares = name == "square" or (name == "pow" and given(square, 1, "exponent") == 2)
    if not squares or not isinstance(squared, fx.Node):
        return None
    found.parts.update(dict.fromkeys([mean, square]))
    return squared


def _dims(mean: Any) -> int:
    """The number of the last dimensions over which a node is a mean that keeps them; 0 for other nodes."""
    if name_of(mean) != "mean" or not mean.args or not isinstance(mean.args[0], fx.Node):
        return 0
    dims = given(mean, 1, "dim", "axis")
    dims = [dims] if isinstance(dims, int) else dims
    if given(mean, 2, "keepdim") is not True or not isinstance(dims, list | tuple):
        return 0
    if not all(type(dim) is int for dim in dims) or given(mean, 3, "dtype") is not None:
        return 0
    if any(dim >= 0 for dim in dims):
        example = mean.meta.get("example_value", mean.meta.get("val"))
        if not isinstance(example, Tensor):
            return 0
        dims = [dim if dim < 0 else dim - example.dim() for dim in dims]
    return len(dims) if sorted(dims) == [*range(-len(dims), 0)] else 0


def _products(node: fx.Node, divisor: bool) -> Iterator[tuple[list[fx.Node], fx.Node, fx.Node]]:
    """The products with a factor, or the quotients with a divisor: what leads to each, it, and the other operand."""
    for user in uses_of(node):
        name, args = name_of(user), user.args
        inverts = (name == "div" and len(args) == 2 and args[0] == 1 and args[1] is node) or (
            name == "reciprocal"
        )
        if is_cast(user) or (name == "mul" and 1 in args) or (divisor and inverts):
            for chain, product, other in _products(user, divisor and not inverts):
                yield [user, *chain], product, other
        elif len(args) != 2 or user.kwargs:
            continue
        elif divisor and name == "div" and args[1] is node and isinstance(args[0], fx.Node):
            yield [], user, args[0]
        elif not divisor and name == "mul":
            factor = args[0] if args[1] is node else args[1]
            if isinstance(factor, fx.Node):
                yield [], user, factor


def _common(
    squared: fx.Node, numerator: fx.Node, product: fx.Node, found: _Found
) -> fx.Node | None:
    """The input that is squared and divided; None if these are different tensors.

    Conversions of the input belong to the norm, unless another module makes them, or other code uses what they return.
    """
    centred = _centred(squared, numerator, found.dims)
    if centred is not None:
        found.centred = True
        found.parts.update(dict.fromkeys([squared, numerator, centred[2]]))
        squared, numerator = centred[:2]
    first, second = without_casts(squared), without_casts(numerator)
    for base in reversed(first):
        if base not in second:
            continue
        casts = [*first[: first.index(base)], *second[: second.index(base)]]
        inside = {*found.parts, *casts, product}
        if all(
            inside.issuperset(uses_of(cast)) and origin(cast).owner == origin(product).owner
            for cast in casts
        ):
            found.parts.update(dict.fromkeys(casts))
            return base
    return None


def _centred(
    squared: fx.Node, numerator: fx.Node, dims: int
) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The tensor and the source of its mean, if two nodes are its difference from its mean; and the mean."""
    if name_of(squared) != "sub" or len(squared.args) != 2 or squared.kwargs:
        return None
    same = name_of(numerator) == "sub" and numerator.args == squared.args and not numerator.kwargs
    x, mean = squared.args
    if not (same and isinstance(x, fx.Node) and isinstance(mean, fx.Node)) or _dims(mean) != dims:
        return None
    source = mean.args[0]
    return (x, source, mean) if isinstance(source, fx.Node) else None


def _norm(product: fx.Node, base: fx.Node, found: _Found, root: nn.Module) -> Compound | None:
    """The norm of an input, with what belongs to it behind the product."""
    parts, result = found.parts, product
    parts[product] = None
    where = origin(product).owner
    weight: tuple[fx.Node, int] | None = None
    bias: tuple[fx.Node, int] | None = None
    while len(uses := uses_of(result)) == 1 and origin(uses[0]).owner == where:
        user = uses[0]
        learnt = _learnt(user, result, found.dims, root)
        if is_cast(user):
            pass
        elif name_of(user) == "mul" and learnt is not None and not weight and not bias:
            weight = user, learnt
        elif name_of(user) == "add" and learnt is not None and found.centred and not bias:
            bias = user, learnt
        else:
            break
        parts[user] = None
        result = user
    ordered = tuple(sorted(parts))
    if ordered[-1] is not result:
        return None
    for part in ordered:
        if base in part.all_input_nodes:
            reads: dict[str, tuple[fx.Node, int | str]] = {"x": (part, _place(part, base))}
            break
    reads |= {n: read for n, read in (("weight", weight), ("bias", bias)) if read is not None}
    obstacle = obstacle_inside(ordered, result)
    op = OPS["layer_norm" if found.centred else "rms_norm"]
    names = dict.fromkeys(name_of(part) for part in ordered if not is_cast(part))
    constants = {"dims": found.dims, "eps": found.eps}
    return Compound(op, ordered, reads, constants, ", ".join(names), obstacle)


def _place(part: fx.Node, value: fx.Node) -> int | str:
    """The place of an argument of a node."""
    if value in part.args:
        return part.args.index(value)
    return next(key for key, other in part.kwargs.items() if other is value)


def _learnt(user: fx.Node, result: fx.Node, dims: int, root: nn.Module) -> int | None:
    """The index of the other operand, if it is a parameter of the normalised dimensions, or one plus a number."""
    if len(user.args) != 2 or user.kwargs or result not in user.args:
        return None
    index = 1 if user.args[0] is result else 0
    source: Any = user.args[index]
    while isinstance(source, fx.Node):
        parameter = parameter_of(source, root)
        if parameter is not None:
            return index if parameter.dim() == dims else None
        if is_cast(source):
            source = source.args[0]
        elif name_of(source) == "add" and len(source.args) == 2:
            source = next((a for a in source.args if not is_number(a)), None)
        else:
            return None
    return None
