"""Which sites an entry of a table selects. Independent of rules and graphs."""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ..errors import TableError
from ..sites.site import REPLACE, Located, Site
from ..vocabulary.activations import GROUPS
from .classes import Class, class_name, imported, matching_classes, qualified
from .fields import (
    ALL,
    PARAMETERS,
    Calls,
    Names,
    Types,
    brief,
    call_text,
    compiled,
    read_at,
    read_call,
    read_ops,
    read_order,
    read_pattern,
    read_type,
    several,
)

__all__ = ["Selector", "operation_key"]


@dataclass(frozen=True, eq=False)
class Selector:
    """Conditions on a site. All fields have to match; of several values in a field, one has to. Made by `on`.

    Attributes:
        op: Canonical names, groups, ``"params"`` and ``"all"``; empty if calls of classes are selected.
        module: Patterns for the path of the owner.
        type: Classes, or their qualified names.
        parameter: Patterns for the names of a parameter.
        call: Indices and slices of calls.
        where: A predicate on the site.
        at: Placements.
        order: ``"first"`` or ``"last"``, to select the first or the last of the operations that match; ``""`` for all.
        only: The operations among which `order` has chosen, by their keys; None if it has not been asked.
    """

    op: tuple[str, ...] = ()
    module: tuple[str, ...] = ()
    type: tuple[str | Class, ...] = ()
    parameter: tuple[str, ...] = ()
    call: tuple[int | slice, ...] = ()
    where: Callable[[Site], Any] | None = None
    at: tuple[str, ...] = (REPLACE,)
    order: str = ""
    only: frozenset[Any] | None = None

    @classmethod
    def of(
        cls,
        op: Names | None,
        module: Names | None,
        type: Types | None,
        parameter: Names | None,
        call: Calls | None,
        where: Callable[[Site], Any] | None,
        at: Names | None = None,
        first: bool = False,
        last: bool = False,
    ) -> Selector:
        """Make a selector from the arguments of `on`. Raises `TableError` if one is invalid."""
        if where is not None and not callable(where):
            raise TableError(f"where has to be a function of a Site, got {brief(where)}")
        ops = read_ops(op, by_type=type is not None, by_parameter=parameter is not None)
        return cls(
            ops,
            several("module", module, read_pattern),
            several("type", type, read_type),
            several("parameter", parameter, read_pattern),
            several("call", call, read_call),
            where,
            read_at(at, _ops_of(ops) if ops else None),
            read_order(first, last, PARAMETERS in ops or ALL in ops),
        )

    @property
    def by_class(self) -> bool:
        """Whether it selects calls of classes, with `type` and without `op` and `parameter`."""
        return not self.op

    @functools.cached_property
    def wants_parameters(self) -> bool:
        """Whether it can select a parameter."""
        return bool({PARAMETERS, ALL} & {*self.op}) and REPLACE in self.at

    @property
    def selects_operations(self) -> bool:
        """Whether it can select an operation."""
        return not self.parameter and (self.by_class or bool(self.ops))

    # Every entry is matched against every site, so what does not depend on the site is cached.

    @functools.cached_property
    def ops(self) -> frozenset[str]:
        """The ops that the names and groups denote."""
        return _ops_of(self.op)

    @functools.cached_property
    def _modules(self) -> list[re.Pattern[str]]:
        return [compiled(pattern) for pattern in self.module]

    @functools.cached_property
    def _names(self) -> list[re.Pattern[str]]:
        return [compiled(pattern) for pattern in self.parameter]

    @functools.cached_property
    def places(self) -> tuple[tuple[str, str], ...] | None:
        """The names of parameters, or the paths, of which a site that it selects has one; None if patterns decide."""
        field, names = (PARAMETERS, self.parameter) if self.parameter else ("module", self.module)
        if not names or any(n.startswith("re:") or {*n} & {*"*?["} for n in names):
            return None
        return tuple((field, name) for name in names)

    def matches(self, located: Located) -> bool:
        """Whether it selects a site.

        Raises:
            TableError: `where` raised an exception.
        """
        site = located.site
        if site.at not in self.at:
            return False
        if site.kind == "parameter":
            if not self.wants_parameters:
                return False
            if self.parameter and not _any_match(self._names, site.names):
                return False
        elif self.parameter:
            return False
        elif self.op:
            if located.op is None or located.op.name not in self.ops:
                return False
        elif located.called is None or not self._is_of_type(located.called):
            return False
        if self.module and not _any_match(self._modules, _owner_paths(site)):
            return False
        if self.type and self.op and not any(map(self._is_of_type, located.owners)):
            return False
        if self.call and not any(_is_call(call, site.call) for call in self.call):
            return False
        if self.only is not None and operation_key(site) not in self.only:
            return False
        return self.where is None or self._asks(self.where, site)

    def _is_of_type(self, kind: Class) -> bool:
        return any(matching_classes(wanted, kind) for wanted in self.type)

    def _asks(self, where: Callable[[Site], Any], site: Site) -> bool:
        try:
            return bool(where(site))
        except Exception as error:
            raise TableError(
                f"the `where` of the entry {str(self)!r} raised {error.__class__.__name__}: {error}; "
                f"it was called with the site {site.name}: {site}"
            ) from error

    def classes_in(self, model: nn.Module) -> Iterator[Class]:
        """The classes whose calls it selects. Names are resolved among the model's modules and imported modules."""
        for wanted in self.type if self.by_class else ():
            if isinstance(wanted, str):
                for module in model.modules():
                    yield from matching_classes(wanted, type(module))
                kind = imported(wanted)
                if isinstance(kind, type) and issubclass(kind, nn.Module | torch.autograd.Function):
                    yield kind
            else:
                yield wanted

    def given(self) -> dict[str, Any]:
        """The arguments of `on` that make this selector. Empty fields are left out; single values are not in lists."""
        found = {
            "op": () if self.op == (PARAMETERS,) and self.parameter else self.op,
            "module": self.module,
            "type": tuple(map(class_name, self.type)),
            "parameter": self.parameter,
            "call": self.call,
            "at": () if self.at == (REPLACE,) else self.at,
        }
        given: dict[str, Any] = {
            name: values[0] if len(values) == 1 else list(values)
            for name, values in found.items()
            if values
        }
        given |= {self.order: True} if self.order else {}
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
                ("at", () if self.at == (REPLACE,) else self.at),
            )
            if values
        ]
        parts += [self.order] * bool(self.order)
        parts += [f"where={getattr(self.where, '__qualname__', self.where)}"] if self.where else []
        return ", ".join(parts)

    def _key(self) -> tuple[Any, ...]:
        calls = tuple(c if isinstance(c, int) else (c.start, c.stop, c.step) for c in self.call)
        types = tuple(map(class_name, self.type))
        return (
            self.op,
            self.module,
            types,
            self.parameter,
            calls,
            self.where,
            self.at,
            self.order,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selector) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __deepcopy__(self, memo: dict[int, Any]) -> Selector:
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Replace what cannot be pickled, because a transformed model is saved together with its plan."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        state["type"] = tuple(
            t if isinstance(class_name(t), str) or isinstance(t, str) else qualified(t)
            for t in self.type
        )
        try:
            pickle.dumps(self.where)
        except Exception:  # pickling a user's object can raise any exception
            state["where"] = _NotSaved(getattr(self.where, "__qualname__", "a function"))
        return state


@dataclass(frozen=True)
class _NotSaved:
    """Replaces a `where` that could not be pickled."""

    name: str

    def __call__(self, site: Site) -> bool:
        raise RuntimeError(
            "this `where` was not saved with its table, because it cannot be pickled; make the table again"
        )

    def __repr__(self) -> str:
        return self.name


def operation_key(site: Site) -> Any:
    """A key of the operation to which a site belongs: the same for all places at it."""
    return site.key[:-1]


def _ops_of(names: Iterable[str]) -> frozenset[str]:
    """The ops that names and groups denote. A group with the name of an op contains that op."""
    groups = {**GROUPS, ALL: GROUPS["activations"], PARAMETERS: ()}
    return frozenset(op for name in names for op in groups.get(name, (name,)))


def _any_match(patterns: Iterable[re.Pattern[str]], names: Iterable[str]) -> bool:
    for pattern in patterns:
        for name in names:
            if pattern.fullmatch(name):
                return True
    return False


def places_of(site: Site) -> tuple[tuple[str, str], ...]:
    """The places of a site, of which `Selector.places` names one if the selector selects the site."""
    paths = (("module", path) for path in _owner_paths(site))
    return (*paths, *((PARAMETERS, name) for name in site.names))


def _owner_paths(site: Site) -> tuple[str, ...]:
    """The path of the owner; for a tied parameter, the paths of all owners."""
    if len(site.names) < 2:
        return (site.path,)
    return tuple(name.rpartition(".")[0] for name in site.names)


def _is_call(wanted: int | slice, index: int) -> bool:
    if isinstance(wanted, int):
        return index == wanted
    stop = index + 1 if wanted.stop is None else wanted.stop
    return index in range(wanted.start, stop, wanted.step)
