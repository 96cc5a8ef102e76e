"""The declaration of a rule: all that is the same for every rule of its name, whatever its parameters are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import RuleError
from .constraint import Constraint
from .contract import KINDS
from .parameter import Parameter

__all__ = ["Declaration", "tells_sign"]


@dataclass(frozen=True, eq=False)
class Declaration:
    """What `register` makes of a function. Immutable, and one for each name.

    Attributes:
        name: The name in the registry.
        function: The formula, called as ``function(grad, [x], [y], **parameters)``.
        inputs: Which of ``"x"`` and ``"y"`` the formula reads. Nothing else is saved for the backward.
        parameters: The declared parameters.
        keeps_shape: Whether the result has the shape of ``grad``.
        reference: The paper or the peer the formula comes from.
        requires: What has to hold of the parameters' values.
        kinds: The kinds of sites that it can serve: ``"operation"``, ``"parameter"``.
        sparse: Whether it maps a sparse gradient entry by entry, so that it can serve an embedding with
            ``sparse=True``.
        mask: What the formula reads of ``x``, where that is a mask alone: a function of ``x`` and parameters.
        mask_parameters: The parameters that the mask depends on.
        gate: The formula, called as ``gate(grad, mask, [y], **parameters)``, where it reads a mask.
        fast: The formula in fewer passes over memory, for eager mode; see `register`.
        examples: Values for the parameters that the formula is checked with, beside the defaults.
        token: A text that stands for the formula, another one for another formula; ``""`` where no text can.
        own: Whether it is one of this package, whose formulas are tested to change no argument.
        takes_more: Whether it takes parameters that it does not declare, as FreeGrad's rules may.
    """

    name: str
    function: Callable[..., Tensor]
    inputs: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    keeps_shape: bool = True
    reference: str = ""
    requires: tuple[Constraint, ...] = ()
    kinds: tuple[str, ...] = KINDS
    sparse: bool = False
    mask: Callable[..., Tensor] | None = None
    mask_parameters: tuple[str, ...] = ()
    gate: Callable[..., Tensor] | None = None
    fast: Callable[..., Tensor] | None = None
    examples: tuple[Mapping[str, Any], ...] = ()
    token: str = ""
    own: bool = False
    takes_more: bool = False

    @property
    def formula(self) -> str:
        """The first line of the docstring of the rule: its mathematics."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def defaults(self) -> dict[str, Any]:
        """The parameters that have a default, with it."""
        return {p.name: p.default for p in self.parameters.values() if not p.required}

    @property
    def reads_sign(self) -> bool:
        """Whether the formula asks of ``x`` only where it is positive, which an output may tell as well."""
        return self.mask is not None and getattr(self.mask, _SIGN, None) is self.mask

    def mask_of(self, x: Tensor, parameters: Mapping[str, Any]) -> Tensor:
        """The mask that the formula reads of ``x``, for these parameters."""
        assert self.mask is not None
        return self.mask(x, **{name: parameters[name] for name in self.mask_parameters})

    def check(self, bound: Mapping[str, Any]) -> None:
        """Raise `RuleError` if values are not what the rule requires of its parameters."""
        for constraint in self.requires:
            if not constraint.holds(bound):
                got = ", ".join(f"{name}={bound[name]!r}" for name in constraint.names)
                raise RuleError(f"rule {self.name!r} requires {constraint.text}, got {got}")


_SIGN = "_freegrad_fx_tells_sign"


def tells_sign(mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a mask of ``x`` that is ``x > 0``: it can be read from any tensor that is positive where ``x`` is."""
    setattr(mask, _SIGN, mask)  # itself: a function that wraps it takes over its attributes
    return mask
