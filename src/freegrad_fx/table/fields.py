"""Validates and normalises the arguments of `on`."""

from __future__ import annotations

import fnmatch
import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import TableError, unknown
from ..sites.site import OUTPUT, REPLACE
from ..vocabulary.activations import GROUPS, OPS
from .classes import Class, imported

__all__ = [
    "ALL",
    "AT",
    "OP_NAMES",
    "PARAMETERS",
    "Calls",
    "Names",
    "Types",
    "brief",
    "call_text",
    "compiled",
    "read_at",
    "read_call",
    "read_ops",
    "read_order",
    "read_pattern",
    "read_reaches",
    "read_type",
    "several",
]

Names: TypeAlias = "str | list[str] | tuple[str, ...]"
"""A string, or several strings of which one has to match."""
Types: TypeAlias = "str | Class | list[str | Class] | tuple[str | Class, ...]"
"""A class or the qualified name of one, or several."""
Calls: TypeAlias = "int | slice | list[int | slice] | tuple[int | slice, ...]"
"""The index of a call or a slice of indices, or several."""

PARAMETERS = "params"
ALL = "all"
OP_NAMES = (*OPS, *GROUPS, PARAMETERS, ALL)
"""The valid values of the field `op`."""

ALL_OPS = "list(freegrad_fx.vocabulary.OPS) and list(freegrad_fx.vocabulary.GROUPS)"
"""The code that lists them, for errors."""

AT = (REPLACE, OUTPUT)
"""The valid values of the field `at`, besides the operands of the ops."""


def several(field: str, given: Any, read: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    """The values of a field as a tuple; a single value can be given without a list."""
    if given is None:
        return ()
    values = tuple(read(field, v) for v in (given if isinstance(given, list | tuple) else [given]))
    if not values:
        raise TableError(f"{field} is an empty list, which matches no site; leave {field} out")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise TableError(f"{field} contains {value!r} twice")
    return values


def read_ops(given: Any, by_type: bool, by_parameter: bool) -> tuple[str, ...]:
    """The ops to select, including the default. Raises `TableError` if one is unknown."""
    ops = several("op", given, _read_op)
    if by_parameter:
        if others := [op for op in ops if op not in (PARAMETERS, ALL)]:
            raise TableError(
                f"parameter selects only parameters, but op={others[0]!r} selects operations; leave out one of the two"
            )
        return (PARAMETERS,)
    return ops or (() if by_type else ("activations",))


def _read_op(field: str, op: Any) -> str:
    if isinstance(op, str) and op in OP_NAMES:
        return op
    remedy = "Use `module` for patterns of paths, and `parameter` for names of parameters."
    if isinstance(op, type):
        remedy = f"Use `type` for a class: on(type={op.__name__})."
    name = op if isinstance(op, str) else brief(op)
    raise TableError(unknown("op or group", name, OP_NAMES, remedy, everything=ALL_OPS))


def read_at(given: Any, ops: Collection[str] | None) -> tuple[str, ...]:
    """The placements to select, including the default.

    Args:
        given: One placement, or several.
        ops: The ops that are selected; None for calls of classes, and empty for parameters.

    Raises:
        TableError: None of the ops has such an operand, or no operation is selected.
    """
    placements = several("at", given, _read_name)
    if not placements or placements == (REPLACE,):
        return (REPLACE,)
    if ops is not None and not ops:
        raise TableError(
            f"at={brief(given)} is a place at an operation, and the entry selects parameters, whose gradient a rule "
            f"gets without at=; leave out at, or select operations by op"
        )
    operands = ("x",) if ops is None else dict.fromkeys(n for op in ops for n in OPS[op].operands)
    for name in placements:
        if name not in (*AT, *operands):
            whose = "a call of a class" if ops is None else " and ".join(sorted(ops)[:5])
            raise TableError(unknown(f"place at {whose}:", name, (*AT, *operands)))
    return placements


def read_order(first: Any, last: Any, parameters: bool) -> str:
    """Which of the operations that match is selected: ``"first"``, ``"last"``, or ``""`` for all.

    Args:
        first: The argument `first` of `on`.
        last: The argument `last` of `on`.
        parameters: Whether parameters are selected.

    Raises:
        TableError: Both are true, one is no boolean, or parameters are selected, which have no order.
    """
    for field, value in (("first", first), ("last", last)):
        if not isinstance(value, bool):
            raise TableError(f"{field} has to be True or False, got {brief(value)}")
    if first and last:
        raise TableError("first and last exclude each other; make an entry for each")
    order = "first" if first else "last" if last else ""
    if order and parameters:
        raise TableError(
            f"{order} selects an operation by the order in which operations run, and the entry selects parameters; "
            f"select parameters by name: on(parameter='layer1.*')"
        )
    return order


REACHES = ("norm", "attention", "gate")
"""The valid names in `RuleTable.reaches`."""


def read_reaches(given: Any) -> tuple[str, ...]:
    """What a table has to reach, each once. Raises `TableError` if a name is unknown."""
    if not isinstance(given, Iterable) or isinstance(given, Mapping):
        raise TableError(f"reaches has to be a list of names, such as ['norm'], got {brief(given)}")
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if not isinstance(name, str) or name not in REACHES:
            raise TableError(unknown("name in reaches:", name, REACHES))
    return tuple(dict.fromkeys(names))


def _read_name(field: str, name: Any) -> str:
    if not isinstance(name, str):
        raise TableError(
            f"{field} has to be {OUTPUT!r}, {REPLACE!r} or the name of an operand, got {brief(name)}"
        )
    return name


def read_pattern(field: str, pattern: Any) -> str:
    """Return a pattern unchanged. Raises `TableError` unless it is a valid glob or regular expression."""
    if not isinstance(pattern, str):
        raise TableError(
            f"{field} has to be a glob ('layer4.*') or a regular expression ('re:layer[34]'), got {brief(pattern)}"
        )
    if pattern.startswith("re:"):
        try:
            compiled(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise TableError(
                f"{field} {pattern!r} is not a valid regular expression: {error}"
            ) from None
    elif _open_bracket(pattern):
        raise TableError(
            f"{field} {pattern!r} is not a valid glob: a '[' has no ']'. A set of characters is written [abc]; for a "
            f"literal '[' write [[]."
        )
    return pattern


def _open_bracket(glob: str) -> bool:
    """Whether a '[' starts a set of characters that is not closed. A ']' directly after '[' belongs to the set."""
    start = glob.find("[")
    while start >= 0:
        first = start + 1 + (glob[start + 1 : start + 2] == "!")
        end = glob.find("]", first + 1)
        if end < 0:
            return True
        start = glob.find("[", end)
    return False


_FORM_OF_A_TYPE = (
    "type has to be a class of modules or of autograd.Functions, or the qualified name of one"
)


def read_type(field: str, kind: Any) -> str | Class:
    """Return a class or its name unchanged. Raises `TableError` if it cannot be valid."""
    if isinstance(kind, str):
        return _type_named(kind)
    if inspect.isclass(kind) and issubclass(kind, nn.Module | torch.autograd.Function):
        return kind
    raise TableError(f"{_FORM_OF_A_TYPE} ('torch.nn.ReLU'), got {brief(kind)}")


def _type_named(name: str) -> str:
    parts = name.split(".")
    if len(parts) < 2 or not all(parts):
        hint = f" Did you mean 'torch.nn.{name}'?" if hasattr(nn, name) else ""
        raise TableError(f"{_FORM_OF_A_TYPE} ('torch.nn.ReLU'), got {brief(name)}.{hint}")
    if name.startswith("torch.") and not isinstance(imported(name), type):
        names = [f"torch.nn.{n}" for n, kind in vars(nn).items() if isinstance(kind, type)]
        raise TableError(unknown("type", name, names, everything="dir(torch.nn)"))
    return name


_MOST_CALLS = 10**9 - 1
_FORM_OF_A_CALL = "call has to be the index of a call (0 is the first) or a slice of indices"


def read_call(field: str, call: Any) -> int | slice:
    """Return an index, or a slice with explicit start and step. Raises `TableError` if it is invalid."""
    if isinstance(call, int) and not isinstance(call, bool):
        _require_index(call)
        return call
    if not isinstance(call, slice):
        raise TableError(f"{_FORM_OF_A_CALL}, got {brief(call)}")
    for bound in (call.start, call.stop, call.step):
        if bound is not None and (not isinstance(bound, int) or isinstance(bound, bool)):
            raise TableError(f"{_FORM_OF_A_CALL}, got {brief(call)}")
        _require_index(bound or 0)
    if call.step == 0:
        raise TableError(f"the step of a slice of calls has to be at least 1, got {brief(call)}")
    return slice(call.start or 0, call.stop, call.step or 1)


def _require_index(index: int) -> None:
    if index < 0:
        raise TableError(
            f"{_FORM_OF_A_CALL}, got {brief(index)}; negative indices are not supported, because the number of "
            f"calls is not known when the table is made"
        )
    # Python refuses to print an integer of several thousand digits, so it could not be written to a file
    if index > _MOST_CALLS:
        raise TableError(
            f"{_FORM_OF_A_CALL}, got {brief(index)}; the largest index is {_MOST_CALLS}"
        )


def brief(value: Any) -> str:
    """A value for an error message: on one line, and without raising an exception itself."""
    try:
        text = f"{value.__name__}()" if inspect.isroutine(value) else repr(value)
    except Exception:  # an integer with too many digits, or a user's repr that raises
        text = "a value"
    text = text if len(text) <= 60 else f"{text[:40]}…{text[-19:]}"
    return f"{text} of type {type(value).__name__}"


def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of either kind as a regular expression for the whole name; for use with ``fullmatch``."""
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern))
    with warnings.catch_warnings():
        # of sets of characters that a later Python may interpret differently
        warnings.simplefilter("ignore", FutureWarning)
        return re.compile(pattern.removeprefix("re:"))


def call_text(call: Any) -> str:
    """A slice in the notation ``1:3``; any other value as text."""
    if not isinstance(call, slice):
        return str(call)
    step = "" if call.step == 1 else f":{call.step}"
    return f"{call.start or ''}:{'' if call.stop is None else call.stop}{step}"
