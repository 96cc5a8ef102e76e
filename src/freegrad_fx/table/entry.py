"""A line of a table: a selector, and the backward that its sites get. `on` is how one is written."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..core.rule import Composition, Forward, Rule, RuleLike, get
from ..core.text import shown
from ..errors import RuleError, TableError, unknown
from ..sites.site import Located, Site
from ..vocabulary.activations import FORWARDS
from .fields import Calls, Names, Types
from .selector import Selector

__all__ = ["FORWARDS", "Entry", "Selection", "on"]


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
        sites: Which sites it means.
        rules: The rules, the first for the gradient that comes in; None keeps the native backward.
        forward: What replaces the forward of the sites: the canonical name of an operation, or a function; or None.
    """

    sites: Selector
    rules: tuple[Rule, ...] | None
    forward: Forward | None = None

    @classmethod
    def of(cls, sites: Selector, rule: RuleLike | None, forward: Forward | None = None) -> Entry:
        """Make an entry of a rule as a user gives it; see `Selection.backward`."""
        if rule is None:
            if forward is not None:
                raise TableError(
                    f"entry {str(sites)!r} replaces the forward by {shown(forward)} and has no rule; what replaces an "
                    f"operation needs one, for instance 'straight_through'"
                )
            return cls(sites, None)
        rules = _rules(rule)
        named = {forward, *(part.forward for part in rules)} - {None}
        if len(named) > 1:
            both = " and ".join(sorted(map(shown, named)))
            raise TableError(f"entry {str(sites)!r} and its rule name different forwards: {both}")
        replacement = _read_forward(next(iter(named), None))
        return cls(sites, tuple(replace(p, forward=None) for p in rules), replacement)

    @functools.cached_property
    def selector(self) -> str:
        """What it selects, in words."""
        return str(self.sites)

    def matches(self, located: Located) -> bool:
        """Whether the entry means this site."""
        return self.sites.matches(located)

    def __repr__(self) -> str:
        fields = self.sites.given()
        op = fields.pop("op", None)
        given = [repr(op)] if op is not None else []
        given += [f"{name}={_source(value)}" for name, value in fields.items()]
        given += [f"forward={_source(self.forward)}"] if self.forward is not None else []
        return f"on({', '.join(given)}).backward({_backward(self.rules)})"


def _source(value: Any) -> str:
    """A value as Python code, where there is such."""
    if isinstance(value, list):
        return f"[{', '.join(map(_source, value))}]"
    if isinstance(value, slice):
        step = "" if value.step == 1 else f", {value.step}"
        return f"slice({value.start}, {value.stop}{step})"
    if isinstance(value, float) and math.isinf(value):
        return f"float('{value}')"
    return shown(value)


def _values(rule: Rule) -> list[str]:
    return [f"{name}={_source(value)}" for name, value in rule.given.items()]


def _backward(rules: tuple[Rule, ...] | None) -> str:
    if rules is None:
        return "None"
    if len(rules) > 1:
        return f"compose({', '.join(map(_part, rules))})"
    (rule,) = rules
    return ", ".join([repr(rule.name), *_values(rule)])


def _part(rule: Rule) -> str:
    """A rule so that it evaluates without the module that holds it."""
    return f"get({rule.name!r})({', '.join(_values(rule))})" if rule.given else repr(rule.name)


@dataclass(frozen=True)
class Selection:
    """Sites that still want a backward. Made by `on`.

    Attributes:
        sites: Which sites.
        forward: What replaces their forward, or None.
    """

    sites: Selector
    forward: Forward | None = None

    def backward(self, rule: RuleLike | None, /, **parameters: Any) -> Entry:
        """Give the sites a rule.

        Args:
            rule: A rule name, a `Rule`, a composition, or None to keep the native backward.
            **parameters: Values for the rule's parameters, and `save` and `compile`; see `Rule`.

        Raises:
            RuleError: The rule is unknown or not fully bound, or a value is not what it requires.
            TypeError: A value has the wrong type.
            TableError: There are parameters without a rule that could take them, or two different forwards.
        """
        if parameters:
            if rule is None:
                raise TableError(
                    f"entry {str(self.sites)!r} keeps the native backward, which takes no parameters; got "
                    f"{', '.join(parameters)}"
                )
            if isinstance(rule, str | Rule):
                rule = get(rule)(**parameters)
            elif isinstance(rule, Composition):
                rule = rule(**parameters)  # which says where its parameters go
        return Entry.of(self.sites, rule, self.forward)


def on(
    op: Names | None = None,
    *,
    module: Names | None = None,
    type: Types | None = None,
    parameter: Names | None = None,
    call: Calls | None = None,
    forward: Forward | None = None,
    where: Callable[[Site], Any] | None = None,
) -> Selection:
    """Select sites for an entry of a `RuleTable`: ``on("relu", module="layer4.*").backward("rectangular")``.

    All fields that are given must hold; a list in a field means any of its values. Patterns are globs on the whole
    name, in which ``*`` crosses dots, or regular expressions after ``re:``, which have to match the whole name.

    Args:
        op: Canonical names (``"relu"``), groups (``"activations"``, ``"softmax"``, ``"quantizers"``), ``"params"`` for
            every parameter, ``"all"`` for activations and parameters. Left out beside `type` or `parameter`, it is
            what they mean; else ``"activations"``.
        module: Patterns for the path of the module that is called, whose forward calls a function, or that holds the
            parameter; ``""`` is the root.
        type: Classes, or qualified names of classes (``"torch.nn.ReLU"``); subclasses are meant too. Alone, it makes
            every call of such a module or `autograd.Function` a site, and a module of this class is kept whole. Beside
            `op` or `parameter` it asks for the class of the module at the site's path.
        parameter: Patterns for the name of a parameter, ``"*.weight"``; for a tied one any of its names may match.
        call: Which of the sites of one op at one path: an index from 0, or a slice.
        forward: What replaces the forward of the sites: an op's name, or a function of one tensor. This selects
            nothing; it is the same as ``rule(forward=...)``.
        where: A function of the `Site` that says whether it is meant. A table with one cannot be written to a file.

    Raises:
        TableError: A field is not what it has to be.

    Example:
        >>> import freegrad_fx as fg
        >>> fg.on("relu", module=["layer3.*", "layer4.*"]).backward("rectangular", a=-1.0, b=1.0)
        on('relu', module=['layer3.*', 'layer4.*']).backward('rectangular', a=-1.0, b=1.0)
    """
    sites = Selector.of(op, module, type, parameter, call, where)
    return Selection(sites, _read_forward(forward))


def _read_forward(forward: Any) -> Forward | None:
    """A forward as it is. Raises `TableError` for what cannot be one."""
    if isinstance(forward, str) and forward not in FORWARDS:
        raise TableError(unknown("forward", forward, FORWARDS))
    if forward is not None and not isinstance(forward, str) and not callable(forward):
        raise TableError(f"forward is the name of an op or a function of a tensor, got {forward!r}")
    return forward  # type: ignore[no-any-return]


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
    return parts
