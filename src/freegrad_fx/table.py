"""Rule tables: ordered entries, each a selector and the backward it gives; the first that matches a site decides.

This file knows rules and the vocabulary; it has never seen a graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from .activations import GROUPS, OPS
from .errors import PlanError, RuleError, unknown
from .rules.rule import Composition, Rule, RuleLike, get
from .sites import Located

__all__ = ["Entry", "RuleTable", "RulesLike"]

RulesLike: TypeAlias = "RuleLike | Mapping[str | type[Any], RuleLike | None] | RuleTable"

_LATER = ("params", "all")


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
        selector: What it selects, as the user wrote it.
        ops: Canonical names of the ops selected.
        types: Classes of modules and of autograd.Functions selected.
        rules: The rules, the first for the gradient that comes in; None keeps the native backward.
    """

    selector: str
    ops: frozenset[str]
    types: tuple[type[Any], ...]
    rules: tuple[Rule, ...] | None

    @property
    def forward(self) -> str | None:
        """The canonical name of the operation that replaces the forward, or None."""
        return next((rule.forward for rule in self.rules or () if rule.forward), None)

    def matches(self, located: Located) -> bool:
        """Whether the entry means this site."""
        if located.called is not None and issubclass(located.called, self.types):
            return True
        return located.op is not None and located.op.name in self.ops


@dataclass(frozen=True)
class RuleTable:
    """Ordered entries. The first that matches a site decides; a site that none matches keeps its native backward."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, rules: RulesLike | None) -> RuleTable:
        """Read what `transform` accepts as rules.

        Args:
            rules: A rule name, a `Rule` or a composition (given to the group ``"activations"``), or a dict from op
                names, classes (of modules or of autograd.Functions) and groups to rules. Classes come before ops,
                ops before groups; a rule None keeps the native backward.

        Raises:
            PlanError: A key is no op, group or class.
            RuleError: A rule is unknown, or a parameter of it has no value.
            NotImplementedError: The rules are for parameters, which are not supported yet.
        """
        if isinstance(rules, RuleTable):
            return rules
        if isinstance(rules, Mapping):
            entries = [_entry(key, rule) for key, rule in rules.items()]
            return cls(tuple(sorted(entries, key=_specificity)))
        if rules is None:
            raise NotImplementedError(
                "transform() without rules is not supported yet. Give it a rule name, a Rule or a dict; "
                "freegrad_fx.rules.available() lists the names."
            )
        return cls((_entry("activations", rules),))

    @property
    def types(self) -> tuple[type[Any], ...]:
        """The classes that entries name; a capture has to keep the modules among them whole."""
        return tuple(dict.fromkeys(t for entry in self.entries for t in entry.types))

    def decide(self, located: Located) -> int | None:
        """The index of the entry that decides a site, or None."""
        matching: Iterable[int] = (
            index for index, entry in enumerate(self.entries) if entry.matches(located)
        )
        return next(iter(matching), None)


def _specificity(entry: Entry) -> int:
    return 0 if entry.types else 2 if entry.selector in GROUPS else 1


def _entry(key: Any, rule: RuleLike | None) -> Entry:
    rules = None if rule is None else _rules(rule)
    if isinstance(key, type) and issubclass(key, nn.Module | torch.autograd.Function):
        return Entry(key.__name__, frozenset(), (key,), rules)
    if key in _LATER:
        raise NotImplementedError(
            f"rules on parameters ({key!r}) are not supported yet. Use 'activations', another group, or op names."
        )
    # "softmax" is an op and a group: the group, which has the op in it
    if key in GROUPS:
        return Entry(key, GROUPS[key], (), rules)
    if key in OPS:
        return Entry(key, frozenset({key}), (), rules)
    remedy = (
        f"The groups among them: {', '.join(GROUPS)}. A key is an op, a group, or a class of modules or of "
        f"autograd.Functions; not a function and not the path of a module."
    )
    name = f"{key.__name__}()" if hasattr(key, "__name__") else key
    raise PlanError(unknown("op or group", name, [*OPS, *GROUPS], remedy))


def _rules(rule: RuleLike) -> tuple[Rule, ...]:
    if not isinstance(rule, str | Rule | Composition):
        raise RuleError(
            f"a rule is a name, a Rule or a composition, got {rule!r} of type {type(rule).__name__}. "
            f"Declare a function as a rule with @freegrad_fx.register('name'); chain several rules with "
            f"freegrad_fx.compose(...); give different ops different rules with a dict."
        )
    parts = rule.parts if isinstance(rule, Composition) else (get(rule),)
    for part in parts:
        part.require_bound()
        if get(part.name).function is not part.function:
            raise RuleError(
                f"rule {part.name!r} has been registered anew since this Rule was made; use get({part.name!r})."
            )
        if tensors := [
            name for name, value in part.bound.items() if isinstance(value, torch.Tensor)
        ]:
            raise NotImplementedError(
                f"the parameter {tensors[0]!r} of rule {part.name!r} is a tensor; tensors as parameters are not "
                f"supported yet. Bind a number."
            )
    return parts
