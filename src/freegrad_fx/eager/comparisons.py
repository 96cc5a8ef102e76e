"""Comparisons whose result becomes numbers, in eager code: the comparison and the conversion are two calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._torch.tensors import version
from ..ops.comparisons import difference
from ..vocabulary.activations import OPS
from ..vocabulary.comparisons import compares, converted, converts, sides
from ..vocabulary.op import Spelling

__all__ = ["difference_of", "may_be_a_step", "note_comparison"]

_differences = WeakTensorKeyDictionary()
"""The differences of the sides of comparisons, by the result of the comparison, with its version, while it exists."""


def _version(mask: Tensor) -> int:
    return 0 if mask.is_inference() else version(mask)


def may_be_a_step(function: Callable[..., Any]) -> bool:
    """Whether a function of PyTorch may be a part of a comparison whose result becomes numbers."""
    return bool(compares(function) or converts(function))


def note_comparison(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> None:
    """Keep the difference of what a call has compared, because the model may write into it before it uses the result.

    Args:
        function: The function that was called; nothing is done unless it compares.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: Its result.
    """
    if name := compares(function):
        pair = sides(name, args, kwargs)
        if pair is not None:
            _differences[result] = difference(*pair), _version(result)


def difference_of(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Spelling, Tensor] | None:
    """How a call that is about to run converts the result of a comparison; None if it does not.

    Returns:
        The spelling of the step, and the difference of the sides, the larger one first where the result is 1.
    """
    name = converts(function)
    found = converted(name, args, kwargs) if name else None
    if found is None:
        return None
    key, positive = found
    source = args[key]
    if not isinstance(source, Tensor) or source not in _differences:
        return None
    known, before = _differences[source]
    if before != _version(source):
        return None  # the model has written into the mask
    spelling = Spelling(OPS["comparison"], key, inplace=False, writes_out=False)
    return spelling, known if positive else -known
