"""A parameter of a rule: its annotation, its default, and the values that it accepts. Does not know any rule."""

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
from .own import Own

__all__ = ["Parameter"]


@dataclass(frozen=True)
class Parameter:
    """One keyword-only parameter of a rule.

    Attributes:
        name: The name of the parameter.
        annotation: The annotation in the signature of the rule; the type of the default if there is no annotation.
        default: The default value; `inspect.Parameter.empty` if there is none.
    """

    name: str
    annotation: Any
    default: Any = inspect.Parameter.empty

    @property
    def required(self) -> bool:
        """Whether the parameter has no default, so that the caller must bind it."""
        return self.default is inspect.Parameter.empty

    def check(self, rule: str, value: Any) -> Any:
        """Return `value` converted to the annotated type.

        An int is converted if a float is expected, and a NumPy number becomes a Python number. A tensor is accepted in
        place of a number.

        Args:
            rule: The name of the rule, for errors.
            value: The value to check.

        Raises:
            TypeError: The value has another type.
            RuleError: The value is NaN, or too large for a float.
        """
        accepted = self.types
        if isinstance(value, Own):
            return value
        if isinstance(value, float) and math.isnan(value):
            raise RuleError(f"parameter {self.name!r} of rule {rule!r} is NaN; it must be a number")
        if accepted is None:
            return value
        if isinstance(value, tuple) and tuple in accepted:
            element = Parameter(self.name, _element_type(self.annotation))
            return tuple(element.check(rule, item) for item in value)
        if type(value) in accepted:
            return value
        # a bool is an instance of int in Python, but almost certainly a mistake here
        if not isinstance(value, bool):
            # NumPy scalars, and ints for a float: a plain Python number is stored
            if int in accepted and isinstance(value, numbers.Integral):
                return int(value)
            if float in accepted and isinstance(value, numbers.Real):
                return self.check(rule, self._as_float(rule, value))
            if isinstance(value, accepted):
                return value
            if isinstance(value, Tensor) and {int, float} & {*accepted}:
                return self._real(rule, value, accepted)
        wanted = " or ".join(t.__name__ for t in accepted)
        raise TypeError(
            f"parameter {self.name!r} of rule {rule!r} must be {wanted}, got {value!r} of type {type(value).__name__}"
        )

    def _real(self, rule: str, value: Tensor, accepted: tuple[type, ...]) -> Tensor:
        if value.is_complex() and complex not in accepted:
            raise TypeError(
                f"parameter {self.name!r} of rule {rule!r} must be real, got a tensor of {value.dtype}"
            )
        return value

    def _as_float(self, rule: str, value: numbers.Real) -> float:
        try:
            return float(value)
        except OverflowError:
            raise RuleError(
                f"parameter {self.name!r} of rule {rule!r} is too large for a float"
            ) from None

    @property
    def types(self) -> tuple[type, ...] | None:
        """The accepted types of values; None if any value is accepted."""
        return _accepted_types(self.annotation)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _element_type(annotation: Any) -> Any:
    """The element type of an annotation such as ``tuple[int, ...]``; Any if the annotation does not state it."""
    given = [typing.get_args(p) for p in _alternatives(annotation) if typing.get_origin(p) is tuple]
    return next((args[0] for args in given if args[1:] == (...,)), Any)


def _accepted_types(annotation: Any) -> tuple[type, ...] | None:
    """The types that an annotation names; None if it names anything but plain types, so that any value is accepted."""
    parts = tuple(typing.get_origin(part) or part for part in _alternatives(annotation))
    plain = all(isinstance(part, type) and part not in (Any, object) for part in parts)
    return parts if plain else None
