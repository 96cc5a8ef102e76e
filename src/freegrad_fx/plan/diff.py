"""The differences between the decisions of two plans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.markup import html_view
from .decision import Decision, backward_of, site_as_dict
from .layout import aligned, as_json, terminal_width

__all__ = ["PlanDiff", "diff"]

_COLUMNS = ("site", "before", "after")


@dataclass(frozen=True)
class PlanDiff:
    """The sites at which two plans differ. It is true if there is at least one.

    Sites are matched by kind, path, op, call index and mode. Two decisions differ if their action, rules, forward or
    reason for a skip differ. The entry that decides a site is not compared.

    Attributes:
        models: The names of the classes of the two models.
        changed: The sites of both plans whose decisions differ, each with both decisions.
        removed: The sites of the first plan only. A parameter that is native in one plan and not listed in the other
            does not count as a difference.
        added: The sites of the second plan only.
        same: How many sites have equal decisions.
    """

    models: tuple[str, str]
    changed: tuple[tuple[Decision, Decision], ...]
    removed: tuple[Decision, ...]
    added: tuple[Decision, ...]
    same: int

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed or self.added)

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int | None = None) -> str:
        """The differences as an aligned table.

        Args:
            width: The maximal length of a line; 0 for no limit. Default: the width of the terminal.
        """
        width = terminal_width() if width is None else width
        rows = [_COLUMNS, *self._rows()]
        return f"{self._totals()}\n\n{aligned(rows, width)}" if self else self._totals()

    def _repr_html_(self) -> str:
        return html_view(self._totals(), [_COLUMNS, *self._rows()])

    def to_dict(self) -> dict[str, Any]:
        """The differences as plain data."""
        return {
            "models": self.models,
            "changed": [[site_as_dict(a), site_as_dict(b)] for a, b in self.changed],
            "removed": [site_as_dict(decision) for decision in self.removed],
            "added": [site_as_dict(decision) for decision in self.added],
            "same": self.same,
        }

    def to_json(self, indent: int | None = None) -> str:
        """The differences as JSON."""
        return as_json(self.to_dict(), indent)

    def _totals(self) -> str:
        models = " → ".join(dict.fromkeys(self.models))
        counts = (
            (len(self.changed), "changed"),
            (len(self.removed), "only before"),
            (len(self.added), "only after"),
            (self.same, "the same"),
        )
        return f"{models}: {', '.join(f'{count} {word}' for count, word in counts if count) or 'no sites'}."

    def _rows(self) -> Iterable[tuple[str, str, str]]:
        for before, after in self.changed:
            yield _site(before), backward_of(before), backward_of(after)
        for before in self.removed:
            yield _site(before), backward_of(before), _missing(before)
        for after in self.added:
            yield _site(after), _missing(after), backward_of(after)


def diff(
    models: tuple[str, str], before: Sequence[Decision], after: Sequence[Decision]
) -> PlanDiff:
    """Compare the decisions of two plans, site by site.

    Args:
        models: The names of the classes of the two models.
        before: The decisions of the first plan.
        after: The decisions of the second plan.
    """
    first, second = _by_site(before), _by_site(after)
    both = [(first[key], second[key]) for key in first if key in second]
    changed = tuple(pair for pair in both if _outcome(pair[0]) != _outcome(pair[1]))
    return PlanDiff(
        models,
        changed,
        _only_in(first, second),
        _only_in(second, first),
        len(both) - len(changed),
    )


def _only_in(plan: dict[Any, Decision], other: dict[Any, Decision]) -> tuple[Decision, ...]:
    return tuple(
        decision
        for key, decision in plan.items()
        if key not in other and (decision.site.kind, decision.action) != ("parameter", "native")
    )


def _missing(decision: Decision) -> str:
    """The text for a site that a plan does not have. A plan lists parameters only if rules for some are asked for."""
    return "not listed" if decision.site.kind == "parameter" else "no such site"


def _by_site(decisions: Sequence[Decision]) -> dict[Any, Decision]:
    return {(decision.site.key, decision.modes): decision for decision in decisions}


def _outcome(decision: Decision) -> Any:
    reason = decision.reason if decision.action == "skip" else ""
    return (decision.action, decision.rules, decision.forward, reason)


def _site(decision: Decision) -> str:
    return decision.site.name + (f" (in {decision.modes})" if decision.modes else "")
