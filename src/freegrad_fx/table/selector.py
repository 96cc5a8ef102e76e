"""Which sites an entry of a table means. Knows the vocabulary and what a site is; it has seen no rule and no graph."""

from __future__ import annotations

import fnmatch
import functools
import inspect
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import nn

from ..activations import GROUPS, OPS
from ..errors import TableError, unknown
from ..sites import Located, Site

__all__ = ["Calls", "Names", "Selector", "Types", "brief", "call_text", "class_name", "imported"]

Class: TypeAlias = type[Any]
Names: TypeAlias = "str | list[str] | tuple[str, ...]"
"""A text, or several of which any may hold."""
Types: TypeAlias = "str | Class | list[str | Class] | tuple[str | Class, ...]"
"""A class or the qualified name of one, or several."""
Calls: TypeAlias = "int | slice | list[int | slice] | tuple[int | slice, ...]"
"""The index of a call or a slice of indices, or several."""

PARAMETERS = "params"
ALL = "all"
OP_NAMES = (*OPS, *GROUPS, PARAMETERS, ALL)
"""What can stand in the field `op`."""


@dataclass(frozen=True, eq=False)
class Selector:
    """Conditions on a site, all of which have to hold; of the values of a field any has to. Made by `on`.

    Attributes:
        op: Canonical names, groups, ``"params"`` and ``"all"``; empty where the calls of classes are meant.
        module: Patterns for the path of the owner.
        type: Classes, or their qualified names.
        parameter: Patterns for the names of a parameter.
        call: Indices and slices of calls.
        where: A predicate on the site.
    """

    op: tuple[str, ...] = ()
    module: tuple[str, ...] = ()
    type: tuple[str | Class, ...] = ()
    parameter: tuple[str, ...] = ()
    call: tuple[int | slice, ...] = ()
    where: Callable[[Site], Any] | None = None

    @classmethod
    def of(
        cls,
        op: Names | None,
        module: Names | None,
        type: Types | None,
        parameter: Names | None,
        call: Calls | None,
        where: Callable[[Site], Any] | None,
    ) -> Selector:
        """Read the fields as a user gives them. Raises `TableError` for what no field can be."""
        if where is not None and not callable(where):
            raise TableError(f"where is a function of a Site, got {brief(where)}")
        return cls(
            _read_ops(op, by_type=type is not None, by_parameter=parameter is not None),
            _several("module", module, _read_pattern),
            _several("type", type, _read_type),
            _several("parameter", parameter, _read_pattern),
            _several("call", call, _read_call),
            where,
        )

    @property
    def by_class(self) -> bool:
        """Whether it means the calls of classes: a type, and neither op nor parameter."""
        return not self.op

    @functools.cached_property
    def wants_parameters(self) -> bool:
        """Whether it can match a parameter."""
        return bool({PARAMETERS, ALL} & {*self.op})

    # A plan asks every entry about every site: what can be computed once is.

    @functools.cached_property
    def _ops(self) -> frozenset[str]:
        """The ops that names and groups stand for. A group that has the name of an op has the op in it."""
        groups = {**GROUPS, ALL: GROUPS["activations"], PARAMETERS: ()}
        return frozenset(op for name in self.op for op in groups.get(name, (name,)))

    @functools.cached_property
    def _modules(self) -> list[re.Pattern[str]]:
        return [_compiled(pattern) for pattern in self.module]

    @functools.cached_property
    def _names(self) -> list[re.Pattern[str]]:
        return [_compiled(pattern) for pattern in self.parameter]

    def matches(self, located: Located) -> bool:
        """Whether it means this site.

        Raises:
            TableError: `where` raises an exception.
        """
        site = located.site
        if site.kind == "parameter":
            if not self.wants_parameters:
                return False
            if self.parameter and not _any_match(self._names, site.names):
                return False
        elif self.parameter:
            return False
        elif self.op:
            if located.op is None or located.op.name not in self._ops:
                return False
        elif located.called is None or not self._is_of_type(located.called):
            return False
        if self.module and not _any_match(self._modules, _owner_paths(site)):
            return False
        if self.type and self.op and not self._is_of_type(located.owner):
            return False
        if self.call and not any(_is_call(call, site.call) for call in self.call):
            return False
        return self.where is None or self._asks(self.where, site)

    def _is_of_type(self, kind: Class) -> bool:
        return any(wanted in kind.__mro__ for t in self.type for wanted in _classes(t, kind))

    def _asks(self, where: Callable[[Site], Any], site: Site) -> bool:
        try:
            return bool(where(site))
        except Exception as error:
            raise TableError(
                f"the `where` of the entry {str(self)!r} raised {error.__class__.__name__}: {error}; "
                f"it was asked about the site {site.name}: {site}"
            ) from error

    def classes_in(self, model: nn.Module) -> Iterator[Class]:
        """The classes whose calls it means. Names stand for classes of the model's modules, and for imported ones."""
        for wanted in self.type if self.by_class else ():
            if isinstance(wanted, str):
                for module in model.modules():
                    yield from _classes(wanted, type(module))
                kind = imported(wanted)
                if isinstance(kind, type) and issubclass(kind, nn.Module | torch.autograd.Function):
                    yield kind
            else:
                yield wanted

    def given(self) -> dict[str, Any]:
        """What `on` has to be given to make it: the fields that are not empty, a lone value without its tuple."""
        found = {
            "op": () if self.op == (PARAMETERS,) and self.parameter else self.op,
            "module": self.module,
            "type": tuple(map(class_name, self.type)),
            "parameter": self.parameter,
            "call": self.call,
        }
        given: dict[str, Any] = {
            name: values[0] if len(values) == 1 else list(values)
            for name, values in found.items()
            if values
        }
        return given if self.where is None else {**given, "where": self.where}

    def __str__(self) -> str:
        parts = ["|".join(self.op)] if self.op and "op" in self.given() else []
        types = "|".join(t if isinstance(t, str) else t.__name__ for t in self.type)
        parts += [types if self.by_class else f"type={types}"] if types else []
        parts += [
            f"{name}={'|'.join(map(call_text, values))}"
            for name, values in (
                ("module", self.module),
                ("parameter", self.parameter),
                ("call", self.call),
            )
            if values
        ]
        parts += [f"where={getattr(self.where, '__qualname__', self.where)}"] if self.where else []
        return ", ".join(parts)

    def _key(self) -> tuple[Any, ...]:
        calls = tuple(c if isinstance(c, int) else (c.start, c.stop, c.step) for c in self.call)
        types = tuple(map(class_name, self.type))
        return (self.op, self.module, types, self.parameter, calls, self.where)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selector) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __deepcopy__(self, memo: dict[int, Any]) -> Selector:
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A transformed model is saved with its plan, and has to be, whatever the table asks."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        state["type"] = tuple(
            t if isinstance(class_name(t), str) or isinstance(t, str) else _qualified(t)
            for t in self.type
        )
        try:
            pickle.dumps(self.where)
        except Exception:  # what the user's function or object raises
            state["where"] = _NotSaved(getattr(self.where, "__qualname__", "a function"))
        return state


@dataclass(frozen=True)
class _NotSaved:
    """Stands for a `where` that could not be pickled."""

    name: str

    def __call__(self, site: Site) -> bool:
        raise RuntimeError("a function that cannot be imported is not saved with its table")

    def __repr__(self) -> str:
        return self.name


# --- reading the fields ---


def _several(field: str, given: Any, read: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    """The values of a field, of which one alone needs no list."""
    if given is None:
        return ()
    values = tuple(read(field, v) for v in (given if isinstance(given, list | tuple) else [given]))
    if not values:
        raise TableError(f"{field} is an empty list, which no site can match; leave it out")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise TableError(f"{field} has {value!r} twice")
    return values


def _read_ops(given: Any, by_type: bool, by_parameter: bool) -> tuple[str, ...]:
    ops = _several("op", given, _read_op)
    if by_parameter:
        if others := [op for op in ops if op not in (PARAMETERS, ALL)]:
            raise TableError(
                f"parameter selects parameters, op={others[0]!r} does not; leave one of the two out"
            )
        return (PARAMETERS,)
    return ops or (() if by_type else ("activations",))


def _read_op(field: str, op: Any) -> str:
    if isinstance(op, str) and op in OP_NAMES:
        return op
    remedy = "Patterns for paths go into `module`, names of parameters into `parameter`."
    if isinstance(op, type):
        remedy = f"A class goes into `type`: on(type={op.__name__})."
    name = op if isinstance(op, str) else brief(op)
    raise TableError(unknown("op or group", name, OP_NAMES, remedy))


def _read_pattern(field: str, pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise TableError(
            f"{field} is a glob ('layer4.*') or a regular expression ('re:layer[34]'), got {brief(pattern)}"
        )
    if pattern.startswith("re:"):
        try:
            _compiled(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise TableError(f"{field} {pattern!r} is no regular expression: {error}") from None
    elif _open_bracket(pattern):
        raise TableError(
            f"{field} {pattern!r} is no glob: a '[' has no ']'. A set of characters is [abc]; for '[' itself write [[]."
        )
    return pattern


def _open_bracket(glob: str) -> bool:
    """Whether a '[' begins a set of characters that nothing ends. A ']' that stands first is one of the set."""
    start = glob.find("[")
    while start >= 0:
        first = start + 1 + (glob[start + 1 : start + 2] == "!")
        end = glob.find("]", first + 1)
        if end < 0:
            return True
        start = glob.find("[", end)
    return False


_FORM_OF_A_TYPE = (
    "type is a class of modules or of autograd.Functions, or the qualified name of one"
)


def _read_type(field: str, kind: Any) -> str | Class:
    if isinstance(kind, str):
        return _read_type_name(kind)
    if inspect.isclass(kind) and issubclass(kind, nn.Module | torch.autograd.Function):
        return kind
    raise TableError(f"{_FORM_OF_A_TYPE} ('torch.nn.ReLU'), got {brief(kind)}")


def _read_type_name(name: str) -> str:
    parts = name.split(".")
    if len(parts) < 2 or not all(parts):
        hint = f" Did you mean 'torch.nn.{name}'?" if hasattr(nn, name) else ""
        raise TableError(f"{_FORM_OF_A_TYPE} ('torch.nn.ReLU'), got {name!r}.{hint}")
    if name.startswith("torch.") and not isinstance(imported(name), type):
        names = [f"torch.nn.{n}" for n, kind in vars(nn).items() if isinstance(kind, type)]
        raise TableError(unknown("type", name, names))
    return name


_FORM_OF_A_CALL = "call is the index of a call (0 is the first), or a slice of indices"


def _read_call(field: str, call: Any) -> int | slice:
    if isinstance(call, int) and not isinstance(call, bool):
        _refuse_negative(call)
        return call
    if not isinstance(call, slice):
        raise TableError(f"{_FORM_OF_A_CALL}, got {brief(call)}")
    for bound in (call.start, call.stop, call.step):
        if bound is not None and (not isinstance(bound, int) or isinstance(bound, bool)):
            raise TableError(f"{_FORM_OF_A_CALL}, got {brief(call)}")
        _refuse_negative(bound or 0)
    if call.step == 0:
        raise TableError(f"the step of a slice of calls is 1 or more, got {brief(call)}")
    return slice(call.start or 0, call.stop, call.step or 1)


def _refuse_negative(index: int) -> None:
    if index < 0:
        raise TableError(
            f"{_FORM_OF_A_CALL}, got {brief(index)}; calls are counted from the first, as the number of them is not "
            f"known when the table is made"
        )


def brief(value: Any) -> str:
    """A value in an error: on one line, and never an error itself."""
    try:
        text = f"{value.__name__}()" if inspect.isroutine(value) else repr(value)
    except Exception:  # a number of more digits than Python writes, or a repr of the user's
        text = "a value"
    text = text if len(text) <= 60 else f"{text[:40]}…{text[-19:]}"
    return f"{text} of type {type(value).__name__}"


# --- matching ---


def _compiled(pattern: str) -> re.Pattern[str]:
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # of sets that a later Python may read otherwise
        return re.compile(pattern.removeprefix("re:"))


def _any_match(patterns: Iterable[re.Pattern[str]], names: Iterable[str]) -> bool:
    for pattern in patterns:
        for name in names:
            if pattern.fullmatch(name):
                return True
    return False


def _owner_paths(site: Site) -> tuple[str, ...]:
    """The path of the owner; of a tied parameter, of each of them."""
    if len(site.names) < 2:
        return (site.path,)
    return tuple(name.rpartition(".")[0] for name in site.names)


def _is_call(wanted: int | slice, index: int) -> bool:
    if isinstance(wanted, int):
        return index == wanted
    stop = index + 1 if wanted.stop is None else wanted.stop
    return index in range(wanted.start, stop, wanted.step)


def call_text(call: Any) -> str:
    """A slice as people write it, ``1:3``; anything else as it is."""
    if not isinstance(call, slice):
        return str(call)
    step = "" if call.step == 1 else f":{call.step}"
    return f"{call.start or ''}:{'' if call.stop is None else call.stop}{step}"


def _classes(wanted: str | Class, kind: Class) -> list[Class]:
    """The class that is wanted, if `kind` is it or a subclass of it."""
    if not isinstance(wanted, str):
        return [wanted] if wanted in kind.__mro__ else []
    public = imported(wanted)
    return [base for base in kind.__mro__ if base is public or _qualified(base) == wanted]


def imported(name: str) -> Any:
    """What a dotted name stands for in the modules that are imported; None if it is none. Runs no code."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:cut]))
        if found is not None:
            for part in parts[cut:]:
                found = getattr(found, "__dict__", {}).get(part)
            return found
    return None


def class_name(kind: str | Class) -> str | Class:
    """The name under which a class is found, ``torch.nn.ReLU``; the class itself where no name leads to it."""
    if isinstance(kind, str):
        return kind
    if vars(nn).get(kind.__name__) is kind:
        return f"torch.nn.{kind.__name__}"
    name = _qualified(kind)
    return name if imported(name) is kind else kind


def _qualified(kind: Class) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
