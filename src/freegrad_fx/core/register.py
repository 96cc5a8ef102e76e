"""`register`: makes a rule of a function."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..errors import RuleError, unknown
from .constraint import read_constraints
from .contract import (
    KINDS,
    MASK,
    NATIVE,
    adapted,
    arguments_of,
    gated,
    mask_parameters,
    read_signature,
)
from .declaration import Declaration
from .fingerprint import fingerprint
from .rule import Rule, add, available
from .text import shown

__all__ = ["register"]


def register(
    name: str,
    *,
    reference: str = "",
    keeps_shape: bool = True,
    requires: str = "",
    kinds: str | tuple[str, ...] = KINDS,
    sparse: bool = False,
    mask: Callable[..., Tensor] | None = None,
    fast: Callable[..., Tensor] | None = None,
    examples: Iterable[Mapping[str, Any]] = (),
    overwrite: bool = False,
) -> Callable[[Callable[..., Tensor]], Rule]:
    """Declare a backward rule. The decorated function becomes a `Rule`.

    The signature is the declaration. ``grad`` is the gradient that comes in, ``x`` the operation's input, ``y`` its
    output; only what the signature names is saved for the backward. Everything after ``*`` is a parameter. A rule is
    a pure function of tensors: no in-place change of its arguments, no ``.item()``, no Python branch on data. It
    returns the gradient for ``x``, of the shape and dtype of ``x``.

    FreeGrad's signature ``fn(ctx, grad_out, tin, **params)`` is taken too: ``ctx`` is None, ``tin`` is ``x``, for a
    parameter its value, and what follows are parameters.

    Args:
        name: The name by which tables refer to the rule.
        reference: The paper or library that the formula comes from.
        keeps_shape: False for a rule that turns a gradient of the output's shape into one of another shape.
        requires: What has to hold of the parameters, as mathematics: ``"a <= b"``, ``"0 <= p < 1, eps > 0"``.
        kinds: ``"operation"`` or ``"parameter"`` for a rule that can serve one kind of sites alone.
        sparse: True for a rule that maps a sparse gradient entry by entry.
        mask: For a rule that asks of ``x`` only where the gradient passes: a function of ``x`` and, by keyword, of
            parameters of the rule, that returns booleans. The signature of the rule then has ``mask`` in the place of
            ``x``, and ``save="mask"`` can store it in 1 byte for each entry.
        fast: The same formula in fewer passes over memory, of the same signature (with ``x`` for ``mask``). It runs
            in the place of the rule in eager mode, where nothing is differentiated twice and no transform of torch.func
            is active, and may return ``NotImplemented`` for arguments that it is not for. The formula itself is always
            right; this makes it fast.
        examples: Values for the parameters that the rule is checked with, beside its defaults.
        overwrite: Replace a rule of that name instead of refusing.

    Raises:
        RuleError: The name is taken, the signature is not in the vocabulary, `requires` or `kinds` cannot be read, or
            the defaults are not what the rule requires, or `mask` or `fast` has another signature.

    Example:
        >>> import freegrad_fx as fg
        >>> @fg.register("halve_negative", overwrite=True)
        ... def halve_negative(grad, x, *, factor: float = 0.5):
        ...     \"\"\"grad where x ≥ 0, factor·grad elsewhere\"\"\"
        ...     return grad * (1 - (1 - factor) * (x < 0).to(grad.dtype))
        >>> halve_negative(factor=0.1)
        halve_negative(factor=0.1)
    """
    _check_name(name)
    served = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in served or ("",):
        if kind not in KINDS:
            raise RuleError(unknown(f"kind of site for rule {name!r}:", kind, KINDS))

    def declare(written: Callable[..., Tensor]) -> Rule:
        function, takes_more = adapted(written)
        if name in available() and not overwrite:
            raise RuleError(
                f"a rule {name!r} is already registered. Choose another name, or say overwrite=True."
            )
        inputs, parameters = read_signature(name, function)
        gate = function if MASK in inputs else None
        _check_mask(name, gate, mask)
        of_mask: tuple[str, ...] = ()
        if gate is not None and mask is not None:
            of_mask = mask_parameters(name, mask, parameters)
            function = gated(gate, mask, of_mask)
            inputs = tuple("x" if given == MASK else given for given in inputs)
        _check_fast(name, fast, function, mask)
        declaration = Declaration(
            name=name,
            function=function,
            inputs=inputs,
            parameters=types.MappingProxyType(parameters),
            keeps_shape=keeps_shape,
            reference=reference,
            requires=read_constraints(name, requires, parameters),
            kinds=served,
            sparse=sparse,
            mask=mask,
            mask_parameters=of_mask,
            gate=gate,
            fast=fast,
            examples=tuple(examples),
            token=_token(name, gate or function, mask),
            own=_is_own(gate or function, mask),
            takes_more=takes_more,
        )
        rule = Rule.of(declaration)
        for example in declaration.examples:
            rule(**example)
        add(rule)
        return rule

    return declare


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise RuleError(f"a rule is registered under a name, got {name!r}: @register('my_rule')")
    if name == NATIVE:
        raise RuleError(f"{NATIVE!r} stands for no rule in a table's file. Choose another name.")


def _check_mask(
    name: str, gate: Callable[..., Tensor] | None, mask: Callable[..., Tensor] | None
) -> None:
    if (gate is None) is not (mask is None):
        raise RuleError(
            f"rule {name!r} names `mask` in its signature and is registered without mask=, or the other way round: "
            f"@register({name!r}, mask=function_of_x) goes with def rule(grad, mask)."
        )


def _check_fast(
    name: str,
    fast: Callable[..., Tensor] | None,
    formula: Callable[..., Tensor],
    mask: Callable[..., Tensor] | None,
) -> None:
    if fast is not None and arguments_of(name, "fast", fast) != arguments_of(
        name, "formula", formula
    ):
        raise RuleError(
            f"fast={shown(fast)}{inspect.signature(fast)} has not the arguments of rule {name!r}, "
            f"{inspect.signature(formula)}" + ": it is given x, not its mask." * (mask is not None)
        )


def _token(name: str, formula: Callable[..., Tensor], mask: Callable[..., Tensor] | None) -> str:
    """A text that stands for a formula: another one has another text, in every process.

    Caches of compiled code go by it, those on disk too. ``""`` for one that reads variables, whose values may change.
    """
    if _is_own(formula, mask):
        places = [f"{f.__module__}.{f.__qualname__}" for f in (formula, mask) if f is not None]
        return f"{name}@{'+'.join(places)}"
    content = fingerprint(formula, mask)
    return f"{name}@{content}" if content else ""


def _is_own(*functions: Callable[..., Tensor] | None) -> bool:
    """Whether functions stand in this package."""
    package = __name__.partition(".")[0]
    return all(
        str(getattr(f, "__module__", "")).partition(".")[0] == package
        and "<locals>" not in f.__qualname__
        for f in functions
        if f is not None
    )
