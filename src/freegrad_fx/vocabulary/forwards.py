"""Replacement forwards of the vocabulary with values of their parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import TableError, unknown
from .activations import OPS, TABLE

__all__ = ["BoundForward", "as_bound", "default_dim", "forward"]

_BY_FUNCTION = {f: op for op in TABLE if op.keeps_shape for f in op.functions}


class BoundForward(functools.partial[Tensor]):
    """An operation with values of its parameters, made by `forward`. Equal to another one with the same values.

    Attributes:
        op: The canonical name of the operation.
    """

    op: str

    def _key(self) -> tuple[Any, ...]:
        # a tensor is compared by identity, as in a rule: its value can change
        values = sorted(self.keywords.items())
        return self.op, *((n, id(v) if isinstance(v, Tensor) else v) for n, v in values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BoundForward) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        values = [repr(self.op), *(f"{name}={value!r}" for name, value in self.keywords.items())]
        return f"forward({', '.join(values)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self.op, self.keywords)


def forward(op: str, /, **values: Any) -> BoundForward:
    """Return an operation with values of its parameters, for the argument `forward` of an entry or a rule.

    Formula: ``forward(op, **values)(x) = op(x, **values)``.

    In a file, it is written ``forward = { op = "ternarize", threshold = 0.05 }``.

    Args:
        op: The canonical name of an operation that keeps the shape, such as ``"heaviside"``, ``"ternarize"``,
            ``"quantize"`` or ``"clamp"``.
        **values: Values of its parameters, by PyTorch's names, or those of the functions of `vocabulary`.

    Raises:
        TableError: The operation is unknown or changes the shape, or it cannot be computed with these values.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> step = fg.forward("heaviside", value_at_zero=1.0)
        >>> step(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0., 1., 1.])
        >>> spikes = fg.rules.arctan(forward=step)
    """
    valid = {f.name: f for f in _BY_FUNCTION.values()}
    if op not in valid:
        raise TableError(unknown("forward", op, valid))
    made = _made(op, values)
    try:
        made(torch.empty(1, 1, device="meta"))
    except (RuntimeError, TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in values.items()) or "no parameters"
        raise TableError(f"forward {op!r} cannot be computed with {given}: {error}") from error
    return made


def as_bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `functools.partial` of a function of the vocabulary as what `forward` makes, and others unchanged."""
    if type(function) is not functools.partial or function.args:
        return function
    op = _BY_FUNCTION.get(function.func)
    return function if op is None else _made(op.name, function.keywords, function.func)


@functools.cache
def default_dim(op: str) -> int | None:
    """The default of the parameter `dim` of the forward of an op; None if it has no such parameter."""
    function = OPS[op].function if op in OPS else None
    found = (
        inspect.signature(function).parameters.get("dim") if inspect.isfunction(function) else None
    )
    return found.default if found is not None and isinstance(found.default, int) else None


def _made(
    op: str, values: dict[str, Any], function: Callable[..., Tensor] | None = None
) -> BoundForward:
    if op == "heaviside" and "threshold" in values:
        raise TableError(
            "the forward 'heaviside' has its step at 0, because a rule reads the input of the site, not its distance "
            "from a threshold. Leave threshold out, and subtract it in the model; or write the step in the model: "
            "freegrad_fx.vocabulary.heaviside(x, threshold=...), or (x > threshold).float()."
        )
    made = BoundForward(function or OPS[op].function or OPS[op].functions[0], **values)
    made.op = op
    return made
