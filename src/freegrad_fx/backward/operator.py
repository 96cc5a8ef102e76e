"""The operator ``freegrad_fx::decoupled``, by which compilers and their caches identify a rule."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._torch.dynamo import takes_for_constant
from ..core.rule import Rule, of_token
from .again import Operands
from .functions import Call
from .node import apply
from .several import answers_for_several, apply_several

__all__ = ["are_floats", "described", "operands"]


def operands(
    rule: Rule,
    site: str,
    parameters: dict[str, Any],
    save: str,
    operation: Operands | None = None,
    floats: bool = False,
) -> tuple[list[Any], list[Any], str]:
    """The arguments of ``freegrad_fx::decoupled`` after `y` and `x`, without `read`.

    Args:
        rule: As for `decouple`.
        site: As for `decouple`.
        parameters: As for `decouple`.
        save: As for `decouple`.
        operation: As for `decouple`.
        floats: The result of `are_floats` for the classes of the parameters; False is always right.

    Returns:
        The parameters that are neither numbers nor plain values, which have to be tensors, and the further operands
        of `operation`; the parameters that are
        numbers, which a compiler can make dynamic; and everything else as JSON text, ``""`` if it cannot be serialised.
    """
    token = rule.declaration.token
    if not token:
        return [], [], ""
    if operation is not None:
        return _with_operands(rule, site, parameters, save, operation, floats)
    if floats:
        return [], [*parameters.values()], _written(token, site, save, tuple(parameters), ())
    found: list[dict[str, Any]] = [{}, {}, {}]
    # One loop without helper functions, because Dynamo traces it for every site
    for name, value in parameters.items():
        kind = type(value)
        # an operator takes integers of 64 bits
        if kind is float or (kind is int and -(2**63) <= value < 2**63):
            found[1][name] = value
        elif kind in _PLAIN:
            found[2][name] = value
        else:
            found[0][name] = value
    tensors, numbers, plain = found
    names = (*tensors, *numbers, *plain)
    call = _written(token, site, save, names, tuple(plain.values()))
    return [*tensors.values()], [*numbers.values()], call


def _with_operands(
    rule: Rule,
    site: str,
    parameters: dict[str, Any],
    save: str,
    operation: Operands,
    floats: bool,
) -> tuple[list[Any], list[Any], str]:
    """`operands` for an operation with several operands. They precede the parameters that are tensors."""
    tensors, numbers, call = operands(rule, site, parameters, save, None, floats)
    further = [value for value in [*operation.values.values()][1:] if value is not None]
    held = {n: value for n, value in operation.constants.items() if isinstance(value, Tensor)}
    absent = tuple(name for name, value in operation.values.items() if value is None)
    described = _written_with(
        call,
        operation.operation,
        tuple(operation.values),
        absent,
        tuple((n, value) for n, value in operation.constants.items() if n not in held),
        tuple(held),
    )
    return [*further, *held.values(), *tensors], numbers, described


@takes_for_constant
def _written_with(
    call: str,
    operation: str,
    names: tuple[str, ...],
    absent: tuple[str, ...],
    constants: tuple[tuple[str, Any], ...],
    held: tuple[str, ...],
) -> str:
    """The text of a call, with its operation; ``""`` if JSON cannot represent it.

    Args:
        call: The text without the operation.
        operation: The name of the operation.
        names: The operands.
        absent: Those that the call leaves out.
        constants: The further arguments that are no tensors.
        held: The names of those that are tensors.
    """
    given = operation, names, absent, constants, held
    try:
        text = json.dumps([*json.loads(call), given])
    except (TypeError, ValueError):
        return ""
    return text if _operation_in(text) == (*given[:3], dict(constants), held) else ""


def _operation_in(
    call: str,
) -> tuple[str, tuple[str, ...], tuple[str, ...], dict[str, Any], tuple[str, ...]] | None:
    _, _, _, _, _, _, *operation = json.loads(call)
    if not operation:
        return None
    name, names, absent, constants, held = operation[0]
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in constants}
    return name, tuple(names), tuple(absent), values, tuple(held)


_PLAIN = (bool, int, str, tuple, type(None))


@takes_for_constant
def are_floats(kinds: tuple[type[Any], ...]) -> bool:
    """Whether these are the classes of numbers alone, as those of the parameters of nearly all rules."""
    return all(kind is float for kind in kinds)


# Dynamo calls it during tracing, and treats the result as a constant
@takes_for_constant
def _written(
    token: str, site: str, save: str, names: tuple[str, ...], values: tuple[Any, ...]
) -> str:
    try:
        text = json.dumps([token, site, save, names, values, _digest()])
    except (TypeError, ValueError):  # a tuple can contain values that JSON cannot represent
        return ""
    return text if _read(text)[3:] == (names, values) else ""


def _read(call: str) -> tuple[str, str, str, tuple[str, ...], tuple[Any, ...]]:
    token, site, save, names, values, *_ = json.loads(call)
    found = tuple(tuple(value) if isinstance(value, list) else value for value in values)
    return token, site, save, tuple(names), found


def described(call: str) -> tuple[str, str]:
    """The names of the rule and the site, given the last argument of the operator."""
    token, site, *_ = _read(call)
    return of_token(token).name, site


@functools.cache
def _digest() -> str:
    """A hash of the source of this package, so that caches are not shared between versions."""
    texts = [file.read_bytes() for file in sorted(Path(__file__).parent.parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def _run_operator(
    y: Tensor,
    x: Tensor,
    tensors: list[Tensor],
    numbers: list[int | float],
    call: str,
    read: Tensor | None = None,
) -> Tensor:
    token, site, save, names, values = _read(call)
    rule, operation = of_token(token), Operands("", {"x": x}, {})
    if found := _operation_in(call):
        name, named, absent, constants, held = found
        count = len(named) - len(absent) - 1 + len(held)
        others, tensors = iter(tensors[:count]), tensors[count:]
        given = {n: None if n in absent else next(others) for n in named[1:]}
        constants.update((n, next(others)) for n in held)
        operation = Operands(name, {named[0]: x, **given}, constants)
    parameters = dict(zip(names, [*tensors, *numbers, *values], strict=True))
    described = Call(rule, site, parameters, save, False)
    if answers_for_several(rule.declaration, parameters):
        return apply_several(y, operation, described, read)
    return apply(y, x, described, read)


# Composite, so that autograd and AOTAutograd trace into it
_library: Any = torch.library.Library("freegrad_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "decoupled(Tensor y, Tensor x, Tensor[] tensors, Scalar[] numbers, str call, Tensor? read=None) -> Tensor"
)
_library.impl("decoupled", _run_operator, "CompositeImplicitAutograd")
