"""The signature of a rule: which names it can have, and how it is read.

Two signatures are accepted: the package's own, ``rule(grad, x, y, *, parameters)``, and FreeGrad's,
``fn(ctx, grad_out, tin, **params)``, which is converted into the first.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from ..errors import RuleError
from .parameter import Parameter
from .text import shown

__all__ = [
    "BITS",
    "INPUTS",
    "KINDS",
    "LOSS_SCALE",
    "MASK",
    "NATIVE",
    "OF_MASK",
    "OPERANDS",
    "OPERATION",
    "OPTIONS",
    "OVER",
    "RESERVED",
    "RULE_PARAMETER",
    "SAVES",
    "Formula",
    "Packs",
    "adapted",
    "arguments_of",
    "read_formula",
]

Packs: TypeAlias = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
"""What is kept in the place of a tensor that a native call has saved, or NotImplemented; and the tensor again."""

INPUTS = ("x", "y")
"""The arguments of a formula besides the gradient."""

OPERANDS = ("x", "weight", "bias", "a", "b", "query", "key", "value")
"""The names of operands, which a formula reads by these names."""

OPERATION = "f"
"""The keyword of a formula by which it gets the native operation, as a function of its operands."""

MASK = "mask"
"""The argument that replaces ``x`` in a formula that reads ``x`` only through a mask."""

BITS = "bits"
"""The value of the option `save` for a mask of eight entries to a byte."""

OF_MASK = (MASK, BITS)
"""The values of the option `save` that need a mask."""

SAVES = ("x", *OF_MASK)
"""The values of the option `save`. The first is the default."""

KINDS = ("operation", "parameter")
"""The kinds of sites."""

NATIVE = "native"
"""The name that stands for the native backward in a table file. No rule can have this name."""

OVER = ("parameter", "module", "all")
"""The values of the option `over`. The first is the default."""

OPTIONS = ("save", "compile", "over")
"""The keywords of a rule that select how it runs."""

LOSS_SCALE = "loss_scale"
"""The parameter that holds the scale of the gradients, for rules that act on gradients which are not scaled."""

RESERVED = (
    *("grad", *INPUTS, MASK, "rule", "site", "forward", "ambient", *OPTIONS, LOSS_SCALE),
    *(OPERATION, "operation", "operands", "native"),
)
"""Names that a parameter of a rule cannot have."""

RULE_PARAMETER = "rule_parameter_"
"""How the names begin by which a model holds the tensors that are parameters of its rules."""

_VOCABULARY = (
    "The signature declares a rule: `grad` first; then any of `x` (the input of the operation; `mask` instead, if "
    f"mask= is given; or its operands by their names: {', '.join(OPERANDS[1:])}) and `y` (its output); then, after "
    "`*`, the parameters with their defaults, and `f` for the native operation. For example: "
    "def rule(grad, x, *, slope: float = 25.0). FreeGrad's signature is accepted too: "
    "def rule(ctx, grad_out, tin, slope=25.0)."
)


@dataclass(frozen=True)
class Formula:
    """The formula of a rule, as its signature and its mask declare it.

    Attributes:
        function: The formula, called as ``function(grad, [x], [y], **parameters)``.
        inputs: Which operands and ``"y"`` it reads, in the order of the signature.
        parameters: Its parameters, by name.
        operation: Whether it uses the native operation, ``f``.
        gate: The formula as a function of a mask instead of ``x``; None if it does not read a mask.
        mask_parameters: The parameters that the mask depends on.
    """

    function: Callable[..., Tensor]
    inputs: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    operation: bool = False
    gate: Callable[..., Tensor] | None = None
    mask_parameters: tuple[str, ...] = ()


def read_formula(
    name: str, function: Callable[..., Tensor], mask: Callable[..., Tensor] | None
) -> Formula:
    """Read the signature of a rule, and combine it with its mask.

    Args:
        name: The name of the rule, for errors.
        function: The decorated function.
        mask: The function that computes the mask from ``x``, if there is one.

    Raises:
        RuleError: The signature is not in the vocabulary, or it does not fit `mask`.
    """
    inputs, parameters, operation = _read_signature(name, function)
    if (MASK in inputs) is not (mask is not None):
        given, missing = (
            ("has the argument `mask`", "mask= is not given")
            if mask is None
            else ("is registered with mask=", "its signature does not have the argument `mask`")
        )
        raise RuleError(
            f"rule {name!r} {given}, but {missing}. Use both together: @register({name!r}, mask=function_of_x) and "
            f"def rule(grad, mask)."
        )
    if mask is None:
        return Formula(function, inputs, parameters, operation)
    if operation or not {*inputs} <= {MASK, "y"}:
        raise RuleError(
            f"rule {name!r} is registered with mask=, which is for a formula of `x` alone: it cannot read other "
            f"operands or `f`. Leave out mask=, and read `x`."
        )
    names = _mask_parameters(name, mask, parameters)
    inputs = tuple("x" if argument == MASK else argument for argument in inputs)
    return Formula(_gated(function, mask, names), inputs, parameters, False, function, names)


def arguments_of(name: str, what: str, function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Return the name and the kind of each argument of a function.

    Args:
        name: The name of the rule, for errors.
        what: What the function is, for errors.
        function: The function.

    Raises:
        RuleError: The signature of the function cannot be read.
    """
    try:
        return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        raise RuleError(
            f"{what}={function!r} of rule {name!r} is not a function whose signature can be read. Wrap it in a "
            f"Python function."
        ) from None


# --- the signature ---


def _read_signature(
    name: str, function: Callable[..., Tensor]
) -> tuple[tuple[str, ...], dict[str, Parameter], bool]:
    """Return what the formula reads besides the gradient, its parameters, and whether it uses ``f``."""
    signature = _signature(name, function)
    hints = _hints(function)
    inputs: list[str] = []
    parameters: dict[str, Parameter] = {}
    operation = False
    for position, (argument, spec) in enumerate(signature.parameters.items()):
        if argument == OPERATION and spec.kind is spec.KEYWORD_ONLY and spec.default is spec.empty:
            operation = True
        elif spec.kind is spec.KEYWORD_ONLY:
            parameters[argument] = _parameter(name, spec, hints)
        elif spec.kind is spec.POSITIONAL_OR_KEYWORD and spec.default is spec.empty:
            _check_input(name, position, argument)
            inputs += [argument] if position else []
        else:
            raise RuleError(
                f"rule {name!r} has the argument `{spec}`, which is neither an input nor, after `*`, a parameter. "
                f"{_VOCABULARY}"
            )
    if {"x", MASK}.issubset(inputs) or inputs[:2] == ["y", MASK]:
        raise RuleError(
            f"the argument `mask` of rule {name!r} must replace `x` and follow `grad`. {_VOCABULARY}"
        )
    if "grad" not in signature.parameters:
        raise RuleError(f"rule {name!r} has no argument `grad`. {_VOCABULARY}")
    return tuple(inputs), parameters, operation


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
        # an annotation names something local to the author's code: the types of the defaults are used instead
        return {}


def _parameter(name: str, spec: inspect.Parameter, hints: Mapping[str, Any]) -> Parameter:
    if spec.name in RESERVED:
        raise RuleError(
            f"a parameter of rule {name!r} is named {spec.name!r}, which is reserved. Rename it. {_VOCABULARY}"
        )
    of_default = Any if spec.default is spec.empty else type(spec.default)
    return Parameter(spec.name, hints.get(spec.name, of_default), spec.default)


def _check_input(name: str, position: int, argument: str) -> None:
    if position == 0 and argument != "grad":
        raise RuleError(
            f"the first argument of rule {name!r} is {argument!r}; it must be 'grad'. {_VOCABULARY}"
        )
    if position > 0 and argument not in (*INPUTS, *OPERANDS, MASK):
        raise RuleError(f"rule {name!r} has the unknown argument {argument!r}. {_VOCABULARY}")


# --- the mask ---


def _mask_parameters(
    name: str, mask: Callable[..., Tensor], parameters: Mapping[str, Parameter]
) -> tuple[str, ...]:
    """Return the parameters of the rule that its mask depends on."""
    x, *others = arguments_of(name, "mask", mask) or [("", None)]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wrong = [
        n for n, kind in others if kind is not inspect.Parameter.KEYWORD_ONLY or n not in parameters
    ]
    if x[1] not in positional or wrong:
        problem = f"has the argument {wrong[0]!r}" if wrong else "does not take x"
        raise RuleError(
            f"mask={shown(mask)} of rule {name!r} {problem}. It must take x and, after `*`, only parameters of the "
            f"rule: {', '.join(parameters) or 'this rule has none'}."
        )
    return tuple(n for n, _ in others)


def _gated(
    gate: Callable[..., Tensor], mask: Callable[..., Tensor], mask_parameters: tuple[str, ...]
) -> Callable[..., Tensor]:
    """Combine a formula of a mask with the mask: a formula of ``x``."""

    @functools.wraps(gate)
    def function(grad: Tensor, x: Tensor, *others: Tensor, **values: Any) -> Tensor:
        return gate(
            grad, mask(x, **{key: values[key] for key in mask_parameters}), *others, **values
        )

    signature = inspect.signature(gate)
    named = [p.replace(name="x") if p.name == MASK else p for p in signature.parameters.values()]
    function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return function


# --- FreeGrad's signature ---


def adapted(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], bool]:
    """Convert a function with FreeGrad's signature to the package's own. Any other function is returned unchanged.

    Formula: rule(grad, x, *, ...) = function(None, grad, x, ...). As in FreeGrad, ``ctx`` is None. The arguments
    after ``tin`` are parameters.

    Returns:
        The function, and whether it accepts parameters that it does not name. ``**params`` accepts them. ``**_`` does
        not: FreeGrad's own rules use it for arguments that they ignore.
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
