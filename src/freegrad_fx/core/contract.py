"""The vocabulary of a rule's signature, which is its declaration, and how a signature is read.

Two signatures are understood: the package's own, ``rule(grad, x, y, *, parameters)``, and FreeGrad's,
``fn(ctx, grad_out, tin, **params)``, which is made into the first.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import RuleError
from .parameter import Parameter
from .text import shown

__all__ = [
    "INPUTS",
    "KINDS",
    "MASK",
    "NATIVE",
    "OPTIONS",
    "RESERVED",
    "SAVES",
    "adapted",
    "arguments_of",
    "gated",
    "mask_parameters",
    "read_signature",
]

INPUTS = ("x", "y")
"""What a formula can read beside the gradient."""

MASK = "mask"
"""What a formula names that reads ``x`` through a mask alone."""

SAVES = ("x", MASK)
"""What can be saved for the backward of a rule that reads ``x``; the first is the default."""

KINDS = ("operation", "parameter")
"""The kinds of sites."""

NATIVE = "native"
"""What a file writes for no rule, so that no rule can have this name."""

OPTIONS = ("save", "compile")
"""How a rule runs, beside its parameters."""

RESERVED = ("grad", *INPUTS, MASK, "rule", "site", "forward", "ambient", *OPTIONS)
"""The names that no parameter of a rule can have."""

_VOCABULARY = (
    "A rule is declared by its signature: `grad` first, then any of `x` (the operation's input; or `mask`, what the "
    "function given as mask= makes of it) and `y` (its output), then, after `*`, its parameters with their defaults: "
    "def rule(grad, x, *, slope: float = 25.0). Or as FreeGrad's rules are: def rule(ctx, grad_out, tin, slope=25.0)."
)


def read_signature(
    name: str, function: Callable[..., Tensor]
) -> tuple[tuple[str, ...], dict[str, Parameter]]:
    """Read what a rule needs from its signature.

    Returns:
        What it reads beside the gradient, in order: ``"x"`` or ``"mask"``, and ``"y"``; and its parameters.

    Raises:
        RuleError: Something in the signature is outside of the vocabulary.
    """
    signature = _signature(name, function)
    hints = _hints(function)
    inputs: list[str] = []
    parameters: dict[str, Parameter] = {}
    for position, (argument, spec) in enumerate(signature.parameters.items()):
        if spec.kind is spec.KEYWORD_ONLY:
            parameters[argument] = _parameter(name, spec, hints)
        elif spec.kind is spec.POSITIONAL_OR_KEYWORD and spec.default is spec.empty:
            _check_input(name, position, argument)
            inputs += [argument] if position else []
        else:
            raise RuleError(f"rule {name!r} has the argument `{spec}`. {_VOCABULARY}")
    if {"x", MASK}.issubset(inputs) or inputs[:2] == ["y", MASK]:
        raise RuleError(
            f"in rule {name!r}, `mask` stands in the place of `x`, first. {_VOCABULARY}"
        )
    if "grad" not in signature.parameters:
        raise RuleError(f"rule {name!r} takes no `grad`. {_VOCABULARY}")
    return tuple(inputs), parameters


def _signature(name: str, function: Callable[..., Tensor]) -> inspect.Signature:
    if not callable(function):
        raise RuleError(f"rule {name!r} must be a function, got {function!r}. {_VOCABULARY}")
    try:
        return inspect.signature(function)
    except ValueError:  # a builtin, whose signature Python cannot read
        raise RuleError(
            f"rule {name!r} is {function!r}, which has no signature to read. {_VOCABULARY}"
        ) from None


def _hints(function: Callable[..., Tensor]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        # names that only the author's scope knows: the defaults tell the types
        return {}


def _parameter(name: str, spec: inspect.Parameter, hints: Mapping[str, Any]) -> Parameter:
    if spec.name in RESERVED:
        raise RuleError(
            f"rule {name!r} calls a parameter {spec.name!r}, which is reserved. {_VOCABULARY}"
        )
    of_default = Any if spec.default is spec.empty else type(spec.default)
    return Parameter(spec.name, hints.get(spec.name, of_default), spec.default)


def _check_input(name: str, position: int, argument: str) -> None:
    if position == 0 and argument != "grad":
        raise RuleError(f"the first argument of rule {name!r} is {argument!r}. {_VOCABULARY}")
    if position > 0 and argument not in (*INPUTS, MASK):
        raise RuleError(f"rule {name!r} asks for {argument!r}. {_VOCABULARY}")


def arguments_of(name: str, what: str, function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """The arguments of a function; raise `RuleError` where they cannot be read."""
    try:
        return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        raise RuleError(
            f"{what}={function!r} of rule {name!r} is no function whose arguments can be read. Write one in "
            f"Python, which may call it."
        ) from None


def mask_parameters(
    name: str, mask: Callable[..., Tensor], parameters: Mapping[str, Parameter]
) -> tuple[str, ...]:
    """The parameters of a rule that a mask depends on. Raises `RuleError` if it asks for anything else."""
    x, *others = arguments_of(name, "mask", mask) or [("", None)]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wrong = [
        n for n, kind in others if kind is not inspect.Parameter.KEYWORD_ONLY or n not in parameters
    ]
    if x[1] not in positional or wrong:
        raise RuleError(
            f"mask={shown(mask)} of rule {name!r} asks for {wrong[0] if wrong else 'nothing'!r}; it takes x and, by "
            f"keyword, parameters of the rule: {', '.join(parameters) or 'there are none'}."
        )
    return tuple(n for n, _ in others)


def gated(
    gate: Callable[..., Tensor], mask: Callable[..., Tensor], mask_reads: tuple[str, ...]
) -> Callable[..., Tensor]:
    """The function of ``x`` that a function of a mask of ``x`` is."""

    @functools.wraps(gate)
    def function(grad: Tensor, x: Tensor, *others: Tensor, **values: Any) -> Tensor:
        return gate(grad, mask(x, **{key: values[key] for key in mask_reads}), *others, **values)

    signature = inspect.signature(gate)
    named = [p.replace(name="x") if p.name == MASK else p for p in signature.parameters.values()]
    function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return function


# --- FreeGrad's signature ---


def adapted(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], bool]:
    """Return a function of FreeGrad's signature as one of ours, and any other as it is.

    Formula: rule(grad, x, *, ...) = function(None, grad, x, ...). As in FreeGrad, ``ctx`` is None. What follows
    ``tin`` are parameters.

    Returns:
        The function, and whether it takes parameters that it does not name: by ``**params``, not by ``**_``, as
        FreeGrad's own rules call what they do not read.
    """
    try:
        ctx, grad, x, *others = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return function, False
    leading = all((p.kind, p.default) == (p.POSITIONAL_OR_KEYWORD, p.empty) for p in (ctx, grad, x))
    if ctx.name != "ctx" or not leading or any(p.kind is p.VAR_POSITIONAL for p in others):
        return function, False

    @functools.wraps(function)
    def rule(grad: Tensor, x: Tensor, **parameters: Any) -> Tensor:
        return function(None, grad, x, **parameters)

    more = [p for p in others if p.kind is p.VAR_KEYWORD]
    named = [p.replace(kind=p.KEYWORD_ONLY) for p in others if p not in more]
    inputs = [grad.replace(name="grad"), x.replace(name="x")]
    rule.__signature__ = inspect.Signature([*inputs, *named])  # type: ignore[attr-defined]
    return rule, any(p.name != "_" for p in more)
