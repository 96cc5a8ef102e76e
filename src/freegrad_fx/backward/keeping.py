"""What a rule with a lean form keeps: tensors, recipes of tensors, and other values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..core.lean import KEPT, Lean
from .again import Recipe, hold

__all__ = ["kept_again", "saved_of"]


class _Saved:
    """What stands in the place of a tensor that is saved."""


_SAVED = _Saved()


def saved_of(
    values: tuple[Any, ...], lean: Lean, read: Mapping[str, Tensor], known: tuple[Any, ...]
) -> tuple[dict[str, Tensor], tuple[Any, ...], bool]:
    """The tensors that are saved for what a lean form keeps.

    Args:
        values: What the lean form keeps.
        lean: The lean form.
        read: What it reads.
        known: Tensors among the further arguments of the operation.

    Returns:
        The tensors; the values, with marks in the places of the tensors; and whether a tensor has been computed from
        the operands, which a second derivative would take for a constant.
    """
    saved = {name: read[name] for name in lean.saves if name in read}
    given = {id(value) for value in (*read.values(), *known)}
    once, marked = False, list[Any]()
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            saved[f"{KEPT}{place}"] = value
            computed = not value.requires_grad and value.is_floating_point()
            once = once or (computed and id(value) not in given)
            marked.append(_SAVED)
        elif isinstance(value, Recipe):
            saved.update((f"{KEPT}{place}.{i}", t) for i, t in enumerate(value.tensors()))
            marked.append(value.mapped(lambda v: _SAVED if isinstance(v, Tensor) else v))
        else:
            marked.append(value)
    operands = {id(tensor): tensor for tensor in read.values()}
    for tensor in saved.values():
        if id(tensor) in operands:
            hold(tensor)
    return saved, tuple(marked), once


def kept_again(marked: tuple[Any, ...], tensors: Iterator[Tensor]) -> tuple[Any, ...]:
    """What a lean form keeps, with the tensors that were saved.

    Args:
        marked: The values, as `saved_of` returns them.
        tensors: The tensors, in order.
    """
    return tuple(_filled(value, tensors) for value in marked)


# A function in `kept_again` that calls itself would be a cycle, which holds the tensors until garbage is collected
def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Recipe):
        return value.mapped(lambda inner: _filled(inner, tensors))
    return next(tensors) if value is _SAVED else value
