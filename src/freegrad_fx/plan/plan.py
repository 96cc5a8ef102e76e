"""The decisions for a model, and their forms: text, HTML, JSON and plain data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core.markup import html_view
from ..sites.remarks import Cache, Lost, Opaque, Remark
from ..table import Entry, RuleTable
from .decision import Bytes, Decision, backward_of, named, site_as_dict
from .diff import PlanDiff, diff
from .layout import aligned, as_json, filled, folded, plain, terminal_width

__all__ = ["Plan"]

_COLUMNS = ("site", "spelling", "backward", "line", "entry")
_LONG = 24
"""The number of sites above which repeated blocks are folded into one row."""
_KEPT = "kept"
"""The head of the column that shows what sites keep for the backward, natively and with their rules."""


@dataclass(frozen=True)
class Plan:
    """The decision for every site of a model, and the code that no rule can reach.

    Attributes:
        model: The name of the model's class.
        decisions: The decisions, in execution order: those for operations, then those for parameters.
        table: The rule table.
        opaque: Calls that were not traced into, in which activations can be computed.
        lost: What the model does and the graph does not.
        verified: For a capture from example inputs: whether it was compared with the original, and how, as text.
        steps: Steps that the model computes as comparisons, which have no gradient.
        eager: The names of the sites that a compiled program has run in Python, outside of the captured graphs.
        memory: What the forward keeps in total for the backward, for the example inputs; None if it is not known.
        uncounted: Why `memory` is not known although there are example inputs, as text.
    """

    model: str
    decisions: tuple[Decision, ...]
    table: RuleTable
    opaque: tuple[Opaque, ...] = ()
    lost: tuple[Lost, ...] = ()
    verified: str = ""
    steps: tuple[Remark, ...] = ()
    eager: tuple[str, ...] = ()
    memory: Bytes | None = None
    uncounted: str = ""

    @property
    def hits(self) -> tuple[int, ...]:
        """For each entry of the table, the number of sites that it decides."""
        decided = Counter(decision.entry for decision in self.decisions)
        return tuple(decided[index] for index in range(len(self.table.entries)))

    @property
    def meant(self) -> tuple[int, ...]:
        """For each entry of the table, the number of sites that it matches, whichever entry decides them."""
        return tuple(hits + sum(taken.values()) for hits, taken in self._counted())

    @property
    def unmatched(self) -> tuple[Entry, ...]:
        """The entries that match no site, though they are not optional."""
        counted = zip(self.table.entries, self.meant, strict=True)
        return tuple(entry for entry, sites in counted if not (sites or entry.optional))

    @property
    def shadowed(self) -> tuple[Entry, ...]:
        """The entries whose sites are all decided by earlier entries."""
        counted = zip(self.table.entries, self._counted(), strict=True)
        return tuple(entry for entry, (hits, taken) in counted if taken and not hits)

    @property
    def misplaced(self) -> dict[int, str]:
        """The problems of entries that one earlier entry, which decides other sites too, leaves no site; by index."""
        found, entries, hits = dict[int, str](), self.table.entries, self.hits
        for index, (own, taken) in enumerate(self._counted()):
            first = min(taken, default=-1)
            optional = entries[index].optional
            if not own and not optional and len(taken) == 1 and hits[first] > taken[first]:
                found[index] = (
                    f"the entry {entries[index].selector!r} has no effect: the entry {entries[first].selector!r} comes "
                    f"before it and decides all its sites. Put the narrower entry first"
                )
        return found

    def with_action(self, action: str) -> tuple[Decision, ...]:
        """The decisions with an action: ``"rewrite"``, ``"ambient"``, ``"native"`` or ``"skip"``."""
        return tuple(decision for decision in self.decisions if decision.action == action)

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int | None = None, *, fold: bool | None = None) -> str:
        """The plan as an aligned table.

        Args:
            width: The maximal length of a line; 0 for no limit. Default: the width of the terminal.
            fold: Whether the sites of repeated blocks are one row if they differ only in the number of the block:
                ``blocks.0-7.act:silu[0] ×8``. Default: if there are more than 24 sites.
        """
        width = terminal_width() if width is None else width
        table = aligned(self._rows(fold), width)
        remarks = [filled(remark, width) for remark in self._remarks(fold)]
        parts = [self._totals(), table if self.decisions else "", "\n".join(remarks)]
        return "\n\n".join(part for part in parts if part)

    def _repr_html_(self) -> str:
        return html_view(self._totals(), self._rows(), self._remarks())

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data: dicts, lists, tuples, text and numbers. Functions and tensors become text."""
        unmatched = set(map(id, self.unmatched))
        shadowed = set(map(id, self.shadowed))
        return {
            "model": self.model,
            "sites": [site_as_dict(decision) for decision in self.decisions],
            "entries": [
                {
                    "selector": entry.selector,
                    "rules": None if entry.rules is None else [repr(r) for r in entry.rules],
                    "forward": plain(entry.forward),
                    "hits": hits,
                    "unmatched": id(entry) in unmatched,
                    "shadowed": id(entry) in shadowed and not hits,
                    "decided_by": {index: taken[index] for index in sorted(taken)},
                    "memory": None if memory is None else dict(vars(memory)),
                }
                for entry, (hits, taken), memory in zip(
                    self.table.entries, self._counted(), self._memory_by_entry(), strict=True
                )
            ],
            "opaque": [vars(o) for o in self.opaque],
            "lost": [vars(o) for o in self.lost],
            "steps": [vars(s) for s in self.steps],
            "verified": self.verified,
            "eager": list(self.eager),
            "memory": None if self.memory is None else dict(vars(self.memory)),
        }

    def to_json(self, indent: int | None = None) -> str:
        """The plan as JSON."""
        return as_json(self.to_dict(), indent)

    def diff(self, other: Plan) -> PlanDiff:
        """Compare with another plan, of this model or of another one. ``print`` the result."""
        return diff((self.model, other.model), self.decisions, other.decisions)

    def _counted(self) -> list[tuple[int, Counter[int]]]:
        """For each entry, the sites that it decides, and how many of its others each earlier entry decides."""
        taken = [Counter[int]() for _ in self.table.entries]
        for decision in self.decisions:
            if decision.entry is not None:
                for index in decision.also:
                    taken[index][decision.entry] += 1
        return list(zip(self.hits, taken, strict=True))

    def _memory_by_entry(self) -> list[Bytes | None]:
        """For each entry what the sites that it decides keep; None if no site of it has been counted."""
        found: list[Bytes | None] = [None] * len(self.table.entries)
        for decision in self.decisions:
            index = decision.entry
            if decision.memory is not None and index is not None:
                found[index] = (found[index] or Bytes(0, 0)) + decision.memory
        return found

    # -- text

    def _rows(self, fold: bool | None = None) -> list[tuple[str, ...]]:
        rows = [_COLUMNS, *(self._row(d) for d in self.decisions)]
        if self.memory is not None:
            cells = [_KEPT, *("" if d.memory is None else str(d.memory) for d in self.decisions)]
            rows = [(*row[:3], cell, *row[3:]) for row, cell in zip(rows, cells, strict=True)]
        return [rows[0], *folded(rows[1:])] if self._folds(fold) else rows

    def _folds(self, fold: bool | None) -> bool:
        """Whether rows of repeated blocks are one row."""
        return len(self.decisions) > _LONG if fold is None else fold

    def _totals(self) -> str:
        counts = [f"{len(self.with_action(a))} {w}" for a, w in _ACTIONS if self.with_action(a)]
        return (
            f"{self.model}, {_sites(len(self.decisions))}: {', '.join(counts) or 'nothing to do'}."
        )

    def _row(self, decision: Decision) -> tuple[str, ...]:
        site = decision.site
        name = " = ".join(site.names) or site.name
        entry = "" if decision.entry is None else self.table.entries[decision.entry].selector
        backward, source = backward_of(decision), _short(site.source)
        return (name, site.spelling, backward, source, entry)

    def _remarks(self, fold: bool | None = None) -> Iterable[str]:
        counted = zip(self._counted(), self._memory_by_entry(), strict=True)
        for number, ((hits, taken), memory) in enumerate(counted, start=1):
            entry = self.table.entries[number - 1]
            effect = _effect(hits, taken, entry.optional)
            kept = "" if memory is None else f"; keeps {memory}"
            yield f"Entry {number}, {entry.selector!r}: {effect}{kept}."
        if self.memory is not None:
            yield (
                f"Kept for the backward, natively → with the rules: {self.memory} for the example inputs. What several "
                f"operations keep is counted at the first."
            )
        elif self.uncounted:
            yield f"What is kept for the backward is not known: {self.uncounted}."
        for forward in dict.fromkeys(d.forward for d in self.decisions if d.forward is not None):
            count = sum(d.forward == forward for d in self.decisions)
            yield f"THE FORWARD IS CHANGED at {_sites(count)}, to {named(forward)}."
        for remark in dict.fromkeys(d.remark for d in self.decisions if d.remark):
            count = sum(d.remark == remark for d in self.decisions)
            yield f"Note, {_sites(count)}: {remark}."
        if self.eager:
            names = ", ".join(self.eager)
            yield f"Run in Python, outside of the captured graphs, {_sites(len(self.eager))}: {names}."
        for step in self.steps:
            yield f"Note: {step}."
        opaque = [(str(call),) for call in self.opaque]
        for (text,) in opaque if fold is False else folded(opaque):
            yield f"Opaque: {text}."
        caches = [str(lost) for lost in self.lost if isinstance(lost, Cache)]
        if caches:
            more = f" (so are {len(caches) - 1} more)" if caches[1:] else ""
            yield f"Note: {caches[0]}{more}."
        for lost in self.lost:
            if not isinstance(lost, Cache):
                yield f"LOST: {lost}."
        if self.verified:
            yield f"{self.verified}."


def _effect(hits: int, taken: Counter[int], optional: bool) -> str:
    """What an entry does: how many sites it decides, and which entries, numbered from 1, decide its others."""
    if not taken:
        return _sites(hits) if hits or optional else "MATCHES NOTHING"
    numbers = ", ".join(str(index + 1) for index in sorted(taken))
    by = f"decided by {'entry' if len(taken) == 1 else 'entries'} {numbers}"
    if not hits:
        return f"no site; {taken.total()} matched, all {by}"
    return f"{_sites(hits)}; {taken.total()} more matched, {by}"


_ACTIONS = (
    ("rewrite", "rewritten"),
    ("ambient", "ambient"),
    ("native", "left native"),
    ("skip", "SKIPPED"),
)


def _short(source: str) -> str:
    """The last two parts of a path, which are enough to find a file."""
    return os.sep.join(source.split(os.sep)[-2:])


def _sites(count: int) -> str:
    return f"{count} site" if count == 1 else f"{count} sites"
