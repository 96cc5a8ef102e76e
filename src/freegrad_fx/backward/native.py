"""The native operation of a site as rules of several operands get it: `f`, a function of its operands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RuleError, unknown
from ..vocabulary.operands import operation_of
from .again import Recipe, recipe_of

__all__ = ["Native", "autocast_of_now"]


def autocast_of_now(device: str) -> tuple[str, torch.dtype] | None:
    """The device type and the dtype of the autocast region that is active for a device type; None outside of one."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return device, torch.get_autocast_dtype(device)
    return None


class Native:
    """The native operation of a site, as a formula gets it: a function of its operands.

    It knows the operands that the formula reads. Others can be given by keyword.
    """

    def __init__(
        self,
        operation: str,
        known: Mapping[str, Any],
        present: tuple[str, ...],
        constants: Mapping[str, Any],
        autocast: tuple[str, torch.dtype] | None,
        where: str,
        needs: frozenset[str] = frozenset(),
    ) -> None:
        """Make the function.

        Args:
            operation: The canonical name of the operation.
            known: The operands that the formula reads, by name.
            present: The operands of the call.
            constants: The further arguments of the operation.
            autocast: The device type and the dtype of the autocast region of the call.
            where: The rule and the site, for errors.
            needs: The operands whose gradient is needed.

        Raises:
            RuleError: The operation is not known as a function of its operands.
        """
        found = operation_of(operation)
        if found is None:
            of = repr(operation) if operation else "of this site"
            raise RuleError(
                f"{where} uses `f`, but the operation {of} is not known as a function of its operands. Use the rule "
                f"at another operation, or write the formula without `f`."
            )
        self._operation = found
        self._present = present
        self._constants = constants
        self._autocast = autocast
        self._where = where
        self._needs = needs
        self._known = self._named(known)

    @property
    def operation(self) -> str:
        """The canonical name of the operation."""
        return self._operation.name

    @property
    def constants(self) -> Mapping[str, Any]:
        """The further arguments of the operation, by PyTorch's names."""
        return self._constants

    @property
    def needs(self) -> frozenset[str]:
        """The operands that the rule answers for and whose gradient is needed."""
        return self._needs

    def __call__(self, **operands: Tensor) -> Tensor:
        """Compute the operation.

        Args:
            **operands: Operands to use instead of those of the call, by name.

        Raises:
            RuleError: An operand is unknown, or neither given nor read by the formula.
        """
        given = {**self._known, **self._named(operands)}
        self._require(given, self._present)
        with self._as_in_forward():
            return self._operation(given, self._constants)

    def recipe(self, operand: str, longest: int) -> Recipe | None:
        """How an operand can be computed again in the backward, from what is kept anyway. For the lean form of a rule.

        Args:
            operand: The name of the operand, which the lean form reads.
            longest: The number of operations that may be computed again.

        Returns:
            A value to keep, whose method `compute` computes the operand; None if the operand itself has to be kept.
        """
        (value,) = (self._known.get(name) for name in self._named({operand: None}))
        return recipe_of(value, longest)

    def gradient(self, operand: str, grad: Tensor, **operands: Tensor) -> Tensor:
        """Compute the native gradient of one operand.

        Args:
            operand: The name of the operand.
            grad: The gradient of the output.
            **operands: Operands to use instead of those of the call, by name.

        Raises:
            RuleError: An operand is unknown, or needed and neither given nor read by the formula.
        """
        given = {**self._known, **self._named(operands)}
        (name,) = self._named({operand: None})
        additive = self._operation.additive
        self._require(given, [n for n in self._present if n == name or n not in additive])
        found = self._product(name, grad, given)
        if found is not None:
            return found
        others = {n: v for n, v in given.items() if n != name}

        def function(value: Tensor) -> Tensor:
            return self._operation({name: value, **others}, self._constants)

        with self._as_in_forward():
            result, pull, *_ = torch.func.vjp(function, given[name])
            return pull(grad.to(result.dtype))[0]  # type: ignore[no-any-return]

    def _product(self, name: str, grad: Tensor, given: Mapping[str, Any]) -> Tensor | None:
        """The gradient of an operand of a bilinear operation; None if it has to be computed from the operation."""
        product = (self._operation.products or {}).get(name)
        dtypes = {value.dtype for value in (grad, *given.values()) if isinstance(value, Tensor)}
        if product is None or (len(dtypes) > 1 and self._autocast is None):
            return None
        like = given[name]
        with self._as_in_forward():
            found = product(grad, given, self._constants)
        if found is None:
            return None
        found = found if found.shape == like.shape else found.sum_to_size(like.shape)
        return found.to(like.dtype)

    def _named(self, operands: Mapping[str, Any]) -> dict[str, Any]:
        """The operands by the names that the operation has; ``x`` is the first one."""
        names = self._operation.operands
        found = {}
        for name, value in operands.items():
            name = names[0] if name == "x" else name
            if name not in names:
                of = f"operand of {self._operation.name!r} in {self._where}:"
                raise RuleError(unknown(of, name, names))
            found[name] = value
        return found

    def _require(self, given: Mapping[str, Any], names: Iterable[str]) -> None:
        for name in names:
            if given.get(name) is None:
                raise RuleError(
                    f"{self._where} uses `f` without its operand {name!r}. Name the operand in the signature of the "
                    f"rule, or give it to `f`: {name}=..."
                )

    def _as_in_forward(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        kind, dtype = self._autocast
        return torch.autocast(kind, dtype=dtype)
