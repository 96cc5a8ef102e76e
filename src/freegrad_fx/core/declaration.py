"""The declaration of a rule: everything that does not depend on the values of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import RuleError
from .answers import Learns
from .constraint import Constraint
from .contract import INPUTS, KINDS, SAVES, Packs
from .lean import Lean
from .parameter import Parameter

__all__ = ["Declaration", "Uses", "tells_sign"]


class Uses(NamedTuple):
    """What a rule uses of the operands of a call.

    Attributes:
        reads: The operands whose values it reads.
        answers: The operands that it gives a gradient to.
        takes: The operands that it has to be given.
    """

    reads: frozenset[str]
    answers: frozenset[str]
    takes: frozenset[str]


@dataclass(frozen=True, eq=False)
class Declaration:
    """What `register` reads from a function and its own arguments. Immutable; there is one for each name.

    Attributes:
        name: The name in the registry.
        function: The formula, called as ``function(grad, [x], [y], **parameters)``.
        inputs: Which operands and ``"y"`` the formula reads. Only these are saved for the backward.
        parameters: The declared parameters, by name.
        keeps_shape: Whether the result has the shape of ``grad``.
        reference: The paper or the library that the formula comes from.
        requires: The constraints on the values of the parameters.
        kinds: The kinds of sites that the rule can serve: ``"operation"``, ``"parameter"``.
        sparse: Whether the formula maps a sparse gradient entry by entry, so that the rule can serve an embedding with
            ``sparse=True``.
        mask: For a formula that reads ``x`` only through a mask, the function that computes the mask from ``x`` and
            parameters; otherwise None.
        mask_parameters: The parameters that the mask depends on.
        mask_bits: The bits of an entry of the mask, or the name of the parameter that says how many: 1 for booleans,
            more for bytes.
        save: What is saved unless an entry says something else: a value of the option `save`.
        of_site: Computes values of parameters from the name of a site, called as ``of_site(name, **parameters)``.
        of_op: Computes values of parameters from the operation at a site, called as ``of_op(function, **parameters)``.
        gate: For a formula that reads a mask, the formula, called as ``gate(grad, mask, [y], **parameters)``.
        fast: The formula in fewer passes over memory, for eager mode; see `register`.
        lean: The same gradients from less than the formula reads; see `register`.
        pointwise: Whether an entry of the result depends only on the entries at its place, by the same few operations
            for all places and shapes; see `register`.
        examples: Values of the parameters that the rule is tested with, besides the defaults.
        token: A text that identifies the formula in every process; ``""`` if the formula reads variables, so that no
            text can identify it.
        own: Whether this package defines the formula. Such formulas are tested not to change their arguments.
        meant_for: The canonical names of the operations that the formula is meant for; empty for all.
        peers: The libraries that have the rule, each with its name there: ``"snnTorch atan"``.
        joint: Whether the formula can act on several gradients that are joined into one: it reads nothing else, and
            regards the gradient as a list of numbers, without dimensions.
        linear: Whether the result is linear in the gradient.
        reducing: Whether an entry of the result depends on other entries of the gradient or of ``x``.
        random: Whether the result depends on random numbers.
        relevance: Whether the result is the relevance of the operand itself, not what it is multiplied by.
        takes_more: Whether the rule accepts parameters that it does not declare, as rules of FreeGrad can.
        answers: The operands that the rule gives a gradient to; empty for the first operand of the operation.
        learns: The parameters that the rule gives a gradient to, each with the function that computes it; None if the
            formula returns it in a dict.
        operation: Whether the formula uses the native operation, ``f``.
        several: Whether the formula reads or answers for other operands than the first one, returns a dict, or has a
            lean form.
        native_if: The argument of the operation where the call keeps its native backward if it is true; ``""`` if there
            is none.
        packs: The functions that pack and unpack what a call with its native backward has saved; see `register`. None
            if the rule replaces the backward.
        again: The canonical name of the operation whose output the rule lets others compute again; ``""`` for none.
        needs_operation: What the rule needs of an operation besides ``x`` and ``y``, for errors; ``""`` if nothing.
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
    mask_bits: int | str = 1
    save: str = SAVES[0]
    of_op: Callable[..., Mapping[str, Any]] | None = None
    of_site: Callable[..., Mapping[str, Any]] | None = None
    gate: Callable[..., Tensor] | None = None
    fast: Callable[..., Tensor] | None = None
    lean: Lean | None = None
    pointwise: bool = False
    examples: tuple[Mapping[str, Any], ...] = ()
    token: str = ""
    own: bool = False
    takes_more: bool = False
    meant_for: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    linear: bool = True
    reducing: bool = False
    random: bool = False
    relevance: bool = False
    joint: bool = False
    answers: tuple[str, ...] = ()
    learns: Learns = field(default_factory=dict)
    operation: bool = False
    native_if: str = ""
    packs: Packs | None = None
    again: str = ""
    several: bool = field(init=False)
    needs_operation: str = field(init=False)

    def __post_init__(self) -> None:
        names = [n for n in (*self.inputs, *self.answers) if n not in INPUTS]
        needed = f"the operand {names[0]!r}" if names else "`f`" * self.operation
        object.__setattr__(self, "needs_operation", needed)
        one = not self.answers and not self.needs_operation and self.lean is None
        object.__setattr__(self, "several", not one or None in self.learns.values())

    def uses(self, operands: tuple[str, ...]) -> Uses | None:
        """What the rule uses of an operation; None if only its first operand and its output.

        Args:
            operands: The operands of the call, the first one first: ``x`` stands for that.
        """
        if not (self.needs_operation or self.again):
            return None
        first = operands[0]
        reads = {first if name == "x" else name for name in self.inputs}
        answers = {first if name == "x" else name for name in self.answers or ("x",)}
        takes = {*operands} if self.operation or self.again else {*operands} & (reads | answers)
        return Uses(frozenset(reads), frozenset(answers), frozenset(takes))

    @property
    def formula(self) -> str:
        """The first line of the docstring of the rule, which is its formula."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def module(self) -> str:
        """The module that defines the rule. Each module of ``freegrad_fx.rules`` is a family of rules."""
        return str(getattr(self.function, "__module__", ""))

    @property
    def family(self) -> str:
        """The family of the rule: for one of this package, its module in ``freegrad_fx.rules``."""
        return self.module.rpartition(".")[2] if self.own else self.module

    @property
    def defaults(self) -> dict[str, Any]:
        """The default values, by the name of the parameter. Parameters without a default are left out."""
        return {p.name: p.default for p in self.parameters.values() if not p.required}

    @property
    def reads_output(self) -> bool:
        """Whether the backward reads ``y``, so that nothing may write into the output before it."""
        return "y" in self.inputs or (self.lean is not None and "y" in self.lean.uses)

    @property
    def reads_sign(self) -> bool:
        """Whether the formula reads only whether ``x > 0``. The output of a ReLU, for example, then replaces ``x``."""
        return self.mask is not None and getattr(self.mask, _SIGN, None) is self.mask

    def mask_of(self, x: Tensor, parameters: Mapping[str, Any]) -> Tensor:
        """Compute the mask of ``x`` that the formula reads, for these parameters."""
        assert self.mask is not None
        return self.mask(x, **{name: parameters[name] for name in self.mask_parameters})

    def bits_of(self, parameters: Mapping[str, Any]) -> int:
        """The bits of an entry of the mask, for these parameters."""
        bits = self.mask_bits
        return int(parameters[bits]) if isinstance(bits, str) else bits

    def check(self, bound: Mapping[str, Any]) -> None:
        """Raise `RuleError` if values do not satisfy the constraints of the rule."""
        for constraint in self.requires:
            if not constraint.holds(bound):
                got = ", ".join(f"{name}={bound[name]!r}" for name in constraint.names)
                raise RuleError(f"rule {self.name!r} requires {constraint.text}, got {got}")


_SIGN = "_freegrad_fx_tells_sign"


def tells_sign(mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Mark a function as the mask ``x > 0``.

    Any tensor that is positive exactly where ``x`` is positive gives the same mask.
    """
    # The function itself, as a wrapper made with functools.wraps copies the attribute
    setattr(mask, _SIGN, mask)
    return mask
