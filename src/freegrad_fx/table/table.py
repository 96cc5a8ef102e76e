"""Rule tables: ordered entries. The first entry that matches a site decides it."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import nn

from ..core.markup import html_view
from ..core.rule import RuleLike, available
from ..errors import RuleError, TableError, unknown
from ..sites.site import REPLACE, Located
from ..vocabulary.activations import GROUPS, OPS
from .classes import function_applied_by, qualified
from .data import dump_table, load_table
from .entry import Entry, Selection
from .fields import ALL, ALL_OPS, OP_NAMES, PARAMETERS, read_reaches
from .selector import Selector, operation_key, places_of
from .toml import dumps, entry_place, loads

__all__ = ["RuleTable", "RulesLike", "is_path"]

RulesLike: TypeAlias = (
    "RuleLike | Mapping[str | type[Any], RuleLike | None] | RuleTable | os.PathLike[str]"
)


@dataclass(frozen=True, init=False)
class RuleTable:
    """Ordered entries. The first entry that matches a site decides it; other sites keep their native backward.

    Tables are immutable. They can be compared, concatenated with ``+``, and iterated and indexed like a sequence of
    entries. After ``from freegrad_fx import *``, evaluating the `repr` gives an equal table, unless it contains a
    function or a tensor.

    Attributes:
        entries: The entries, made with `on`.
        reaches: What the table has to reach in a model, or it is an error: ``"norm"``: modules with this word in the
            name of their class, at or below which an entry has to decide something, except batch norms.
            ``"attention"``: calls inside of which PyTorch computes a softmax or an activation where no rule can act.
            ``"gate"``: products with the result of an activation, which only `transform` and `explain` look for.

    Raises:
        TableError: An element is not an entry, or `reaches` has an unknown name.

    Example:
        >>> import freegrad_fx as fg
        >>> fg.RuleTable([
        ...     fg.on("relu", module="layer4.*").backward("rectangular", a=-1.0, b=1.0),
        ...     fg.on("gelu").backward(None),
        ... ])
        RuleTable([
            on('relu', module='layer4.*').backward('rectangular', a=-1.0, b=1.0),
            on('gelu').backward(None),
        ])
    """

    entries: tuple[Entry, ...] = ()
    reaches: tuple[str, ...] = ()

    def __init__(self, entries: Iterable[Entry] = (), reaches: Iterable[str] = ()) -> None:
        given = [entries] if isinstance(entries, Entry | Selection) else list(entries)
        for number, entry in enumerate(given, start=1):
            if isinstance(entry, Selection):
                raise TableError(
                    f"entry {number} ({entry.sites}) has no backward; write on(...).backward('rule'), or "
                    f".backward(None) to keep the native backward"
                )
            if not isinstance(entry, Entry):
                raise TableError(
                    f"entry {number} has to be made with on(...).backward(...), got {entry!r}; to read a dict use "
                    f"RuleTable.of"
                )
        object.__setattr__(self, "entries", tuple(given))
        object.__setattr__(self, "reaches", read_reaches(reaches))

    @classmethod
    def of(cls, rules: RulesLike | None) -> RuleTable:
        """Make a table from any form of rules that `transform` accepts.

        Args:
            rules: One of the following.

                - A rule name, a `Rule` or a composition, for the group ``"activations"``.
                - A dict from op names, classes of modules or of autograd.Functions, groups, ``"params"`` and ``"all"``
                  to rules. Classes take precedence over ops, ops over groups, groups over ``"all"``. The value None
                  keeps the native backward.
                - The path of a TOML file; see `from_toml`. A path given as a string has to end in ``.toml``.
                - A table, which is returned unchanged.
                - None, for an empty table.

        Raises:
            TableError: A key is not an op, group or class; or the file is not a valid table.
            RuleError: A rule is unknown or lacks a parameter value.
            OSError: The file cannot be read.
        """
        if rules is None:
            return cls()
        if isinstance(rules, RuleTable):
            return rules
        lone = rules if isinstance(rules, list | tuple) else [rules]
        if any(isinstance(entry, Entry | Selection) for entry in lone):
            raise TableError("entries have to be in a table: RuleTable([on(...).backward(...)])")
        if isinstance(rules, os.PathLike) or (isinstance(rules, str) and is_path(rules)):
            return cls.from_toml(rules)
        if isinstance(rules, str) and rules not in available() and {"/", ".", "\\"} & {*rules}:
            raise RuleError(
                f"{rules!r} is neither the name of a rule nor a path that ends in '.toml'. Give the path of a table "
                f"with another ending as a pathlib.Path."
            )
        if isinstance(rules, Mapping):
            ordered = sorted(rules.items(), key=lambda item: _specificity(item[0]))
            return cls(Entry.of(_selector(key), rule) for key, rule in ordered)
        return cls([Entry.of(_selector("activations"), rules)])

    @classmethod
    def from_toml(cls, source: str | os.PathLike[str], *, allow_imports: bool = False) -> RuleTable:
        """Read a table from TOML.

        Args:
            source: A path, which has to end in ``.toml`` if it is a string; or TOML text.
            allow_imports: Whether to import rules and forwards that are named ``package.module:name``. Importing a
                module runs its code, so allow it only for tables that you trust.

        Raises:
            TableError: The text is not valid TOML or not a valid table, or has more than 16 million characters. The
                message gives the file, the entry and its line, the reason and the valid names.
            OSError: The file cannot be read.

        Example:
            >>> import freegrad_fx as fg
            >>> fg.RuleTable.from_toml('''
            ... [[rule]]
            ... op = "relu"
            ... backward = "rectangular"
            ... params = { a = -1.0, b = 1.0 }
            ... ''')
            RuleTable([
                on('relu').backward('rectangular', a=-1.0, b=1.0),
            ])
        """
        where = ""
        try:
            if isinstance(source, os.PathLike) or is_path(source):
                where = f"{os.fspath(source)}: "
                with Path(source).open("rb") as file:
                    text = _bounded(file.read(LARGEST + 1)).decode("utf-8-sig")
            else:
                text = _bounded(source).removeprefix("\ufeff")
            data = loads(text)
            entries = load_table(data, allow_imports, entry_place(text, data))
            return cls(entries, data.get("reaches", ()))
        except UnicodeDecodeError as error:
            raise TableError(f"{where}the file is not UTF-8 text: {error}") from error
        except TableError as error:
            raise TableError(f"{where}{error}") from error.__cause__  # not twice the same message

    def to_toml(self) -> str:
        """Return the table as TOML text. `from_toml` reads it back to an equal table.

        A user's rule is written as ``package.module:name``; reading it requires ``allow_imports=True``.

        Raises:
            TableError: An entry contains a `where`, a tensor, or an object that cannot be imported.
        """
        return dumps(dump_table(self.entries, self.reaches))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, allow_imports: bool = False) -> RuleTable:
        """Read a table from plain data of the same structure as in TOML.

        Args:
            data: The data, as returned by `to_dict`.
            allow_imports: See `from_toml`.

        Raises:
            TableError: The data is not a valid table.
        """
        return cls(load_table(data, allow_imports), data.get("reaches", ()))

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain data that can be written as JSON. Infinity is represented as ``"inf"``.

        Raises:
            TableError: As for `to_toml`.
        """
        return _as_json(dump_table(self.entries, self.reaches))  # type: ignore[no-any-return]

    @property
    def wants_parameters(self) -> bool:
        """Whether an entry can select a parameter."""
        return any(entry.sites.wants_parameters for entry in self.entries)

    @functools.cached_property
    def on_demand(self) -> frozenset[str]:
        """The ops that are sites only for tables that name them, and that this table names."""
        named = {name for entry in self.entries for name in entry.sites.ops}
        return frozenset(name for name in named if name in OPS and OPS[name].on_demand)

    @property
    def asks_for_operations(self) -> bool:
        """Whether a rule depends on the operation at its site."""
        rules = (rule for entry in self.entries for rule in entry.rules or ())
        return any(rule.declaration.of_op is not None for rule in rules)

    def types_in(self, model: nn.Module) -> tuple[type[Any], ...]:
        """The classes whose calls are sites. A capture must not trace into the modules among them."""
        return tuple(
            dict.fromkeys(t for entry in self.entries for t in entry.sites.classes_in(model))
        )

    @functools.cached_property
    def placements(self) -> tuple[str, ...]:
        """The places at operations, besides the operations themselves, that entries name."""
        named = dict.fromkeys(at for entry in self.entries for at in entry.sites.at)
        return tuple(at for at in named if at != REPLACE)

    @functools.cached_property
    def ordered(self) -> tuple[int, ...]:
        """The indices of the entries that select the first or the last operation."""
        return tuple(index for index, entry in enumerate(self.entries) if entry.sites.order)

    def among(self, places: Iterable[Located]) -> RuleTable:
        """The table for the operations of one run, of which its entries may select the first or the last.

        Args:
            places: The operations, in the order in which they run.
        """
        if not self.ordered:
            return self
        chosen: dict[int, Any] = {}
        for place in places:
            for index in self.ordered:
                entry = self.entries[index]
                if (entry.sites.order == "last" or index not in chosen) and self.matches_at(
                    index, place
                ):
                    chosen[index] = operation_key(place.site)
        return self.only({i: frozenset([chosen[i]] if i in chosen else ()) for i in self.ordered})

    def matches_at(self, index: int, place: Located) -> bool:
        """Whether an entry selects an operation, or a place at it."""
        entry = self.entries[index]
        return any(map(entry.matches, (place, *place.edges(self.placements))))

    def only(self, operations: Mapping[int, frozenset[Any]]) -> RuleTable:
        """The table whose entries select only some operations.

        Args:
            operations: For the index of an entry, the keys of the operations.
        """
        entries = list(self.entries)
        for index, keys in operations.items():
            entry = entries[index]
            entries[index] = replace(entry, sites=replace(entry.sites, only=keys))
        return RuleTable(entries, self.reaches)

    def gives(self, located: Located) -> Entry | None:
        """The first entry that gives a rule to a site or to a place at it; None if there is none."""
        for place in (located, *located.edges(self.placements)):
            index = self.decide(place)
            if index is not None and self.entries[index].rules is not None:
                return self.entries[index]
        return None

    def decide(self, located: Located) -> int | None:
        """The index of the first entry that selects a site, or None."""
        return next(self.matching(located), None)

    def matching(self, located: Located, start: int = 0) -> Iterator[int]:
        """The indices of the entries that select a site, in order.

        Args:
            located: The site.
            start: The index of the first entry to look at.
        """
        anywhere, named = self._by_place
        indices: Iterable[int] = anywhere
        if named:
            there = {i for place in places_of(located.site) for i in named.get(place, ())}
            indices = sorted({*anywhere, *there}) if there else anywhere
        return (i for i in indices if i >= start and self.entries[i].matches(located))

    @functools.cached_property
    def _by_place(self) -> tuple[list[int], dict[tuple[str, str], list[int]]]:
        """The entries that can select a site anywhere, and the others by the places that they name.

        Tables can have an entry for each layer of a large model, and not each entry can be tried at each site.
        """
        anywhere: list[int] = []
        named: dict[tuple[str, str], list[int]] = {}
        for index, entry in enumerate(self.entries):
            places = entry.sites.places
            if places is None:
                anywhere.append(index)
            for place in dict.fromkeys(places or ()):
                named.setdefault(place, []).append(index)
        return anywhere, named

    def __add__(self, other: object) -> RuleTable:
        """The entries of this table, then those of the other."""
        return (
            RuleTable(self.entries + other.entries, (*self.reaches, *other.reaches))
            if isinstance(other, RuleTable)
            else NotImplemented
        )

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> RuleTable: ...
    def __getitem__(self, index: int | slice) -> Entry | RuleTable:
        found = self.entries[index]
        return found if isinstance(found, Entry) else RuleTable(found, self.reaches)

    def __repr__(self) -> str:
        lines = "".join(f"    {entry!r},\n" for entry in self.entries)
        given = [f"[\n{lines}]"] if lines else []
        given += [f"reaches={list(self.reaches)!r}"] if self.reaches else []
        return f"RuleTable({', '.join(given)})"

    def _repr_html_(self) -> str:
        entries = f"{len(self)} entr{'y' if len(self) == 1 else 'ies'}"
        reaches = f"; has to reach: {', '.join(self.reaches)}" if self.reaches else ""
        rows = [("", "sites", "backward", "forward", "may match nothing")]
        rows += [
            (str(number), *entry.texts()) for number, entry in enumerate(self.entries, start=1)
        ]
        used = [any(column[1:]) for column in zip(*rows, strict=True)]
        cells = [list(itertools.compress(row, used)) for row in rows]
        return html_view(f"RuleTable: {entries}{reaches}", cells)


LARGEST = 2**24
"""The number of characters of the longest TOML text that is read. Ten thousand entries take a million."""

Text = TypeVar("Text", str, bytes)


def _bounded(text: Text) -> Text:
    """Raise `TableError` if a text is too long, so that a table from somewhere else cannot take all memory."""
    if len(text) > LARGEST:
        raise TableError(
            f"the TOML text has more than {LARGEST:,} characters. Split it into several tables, and add them: "
            f"RuleTable.from_toml(first) + RuleTable.from_toml(second)"
        )
    return text


def is_path(source: str) -> bool:
    """Whether text is the path of a TOML file."""
    return isinstance(source, str) and source.endswith(".toml") and not {"\n", "\0"} & {*source}


def _as_json(value: Any) -> Any:
    """Replace infinite numbers, which JSON cannot represent, by text."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _specificity(key: Any) -> int:
    if key == ALL:
        return 4
    if key in GROUPS or key == PARAMETERS:
        return 2 if key in OPS else 3  # "heaviside" has ops in common with "activations"
    return 0 if isinstance(key, type) else 1


def _selector(key: Any) -> Selector:
    """The selector for a key of a dict of rules."""
    if isinstance(key, type) and issubclass(key, nn.Module | torch.autograd.Function):
        return Selector(type=(key,))
    if isinstance(key, str) and key in OP_NAMES:
        return Selector(op=(key,))
    applied = function_applied_by(key)
    if applied is not None:
        raise TableError(
            f"a key has to be an op, a group, or a class of modules or of autograd.Functions, not a function. This one "
            f"applies {applied.__name__}; name that class: {{{qualified(applied)}: ...}}."
        )
    remedy = (
        f"The groups among them: {', '.join((*GROUPS, PARAMETERS, ALL))}. A key has to be an op, a group, or a class "
        f"of modules or of autograd.Functions, not a function or the path of a module. To select by path, use a "
        f"RuleTable: on('relu', module='layer4.*')."
    )
    name = f"{key.__name__}()" if hasattr(key, "__name__") else key
    raise TableError(unknown("op or group", name, OP_NAMES, remedy, everything=ALL_OPS))
