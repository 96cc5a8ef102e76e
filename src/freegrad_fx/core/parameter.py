"""A parameter of a rule: its annotation, its default, and which values it takes. Knows no rule."""

from __future__ import annotations

import inspect
import math
import numbers
import types
import typing
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import RuleError

__all__ = ["Parameter"]


@dataclass(frozen=True)
class Parameter:
    """One keyword-only parameter of a rule: its annotation and its default."""

    name: str
    annotation: Any
    default: Any = inspect.Parameter.empty

    @property
    def required(self) -> bool:
        """Whether the rule has no value for it until the caller gives one."""
        return self.default is inspect.Parameter.empty

    def check(self, rule: str, value: Any) -> Any:
        """Return `value` as the annotation wants it, an int for a float; a tensor can stand for any number.

        Raises:
            TypeError: It has another type.
            RuleError: It is NaN, or too large for a float.
        """
        accepted = self.types
        if isinstance(value, float) and math.isnan(value):
            raise RuleError(f"parameter {self.name!r} of rule {rule!r} is NaN, which is no number")
        if accepted is None:
            return value
        if isinstance(value, tuple) and tuple in accepted:
            element = Parameter(self.name, _element_type(self.annotation))
            return tuple(element.check(rule, item) for item in value)
        if type(value) in accepted:
            return value
        # Python takes a bool for an int, and would so hide a mistake
        if not isinstance(value, bool):
            # numpy's scalars and ints where a float is wanted: what is stored is a plain Python number
            if int in accepted and isinstance(value, numbers.Integral):
                return int(value)
            if float in accepted and isinstance(value, numbers.Real):
                return self.check(rule, self._as_float(rule, value))
            if isinstance(value, accepted):
                return value
            if isinstance(value, Tensor) and {int, float} & {*accepted}:
                return value
        wanted = " or ".join(t.__name__ for t in accepted)
        raise TypeError(
            f"parameter {self.name!r} of rule {rule!r} must be {wanted}, got {value!r} of type {type(value).__name__}"
        )

    def _as_float(self, rule: str, value: numbers.Real) -> float:
        try:
            return float(value)
        except OverflowError:
            raise RuleError(
                f"parameter {self.name!r} of rule {rule!r} is too large for a float"
            ) from None

    @property
    def types(self) -> tuple[type, ...] | None:
        """The types of its values; None where anything is taken."""
        return _accepted_types(self.annotation)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _element_type(annotation: Any) -> Any:
    """What ``tuple[int, ...]`` says of its elements; anything where it says nothing."""
    given = [typing.get_args(p) for p in _alternatives(annotation) if typing.get_origin(p) is tuple]
    return next((args[0] for args in given if args[1:] == (...,)), Any)


def _accepted_types(annotation: Any) -> tuple[type, ...] | None:
    """The types an annotation names; None where it is not made of plain types, and anything is taken."""
    parts = tuple(typing.get_origin(part) or part for part in _alternatives(annotation))
    plain = all(isinstance(part, type) and part not in (Any, object) for part in parts)
    return parts if plain else None
