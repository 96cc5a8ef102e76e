"""Which parameters a rule acts on together."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.contract import OVER
from ..core.rule import Rule

__all__ = ["acts_together", "groups"]


def acts_together(rules: Sequence[Rule]) -> bool:
    """Whether one of the rules acts on several parameters together."""
    return any(rule.over != OVER[0] for rule in rules)


def groups(paths: Sequence[str], over: str) -> list[list[int]]:
    """The parameters of an entry that a rule acts on together, by their indices.

    Args:
        paths: For each parameter, the path of the module that holds it.
        over: The option `over` of the rule.
    """
    if over == "all":
        return [[*range(len(paths))]]
    found: dict[str | int, list[int]] = {}
    for index, path in enumerate(paths):
        found.setdefault(path if over == "module" else index, []).append(index)
    return [*found.values()]
