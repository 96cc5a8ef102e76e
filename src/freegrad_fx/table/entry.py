"""A table entry: a selector and the backward for the selected sites. Entries are made with `on`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..core.rule import Composition, Forward, Rule, RuleLike, get
from ..core.text import shown
from ..errors import RuleError, TableError, unknown
from ..sites.site import REPLACE, Located, Site
from ..vocabulary.activations import FORWARDS
from ..vocabulary.forwards import as_bound
from .fields import Calls, Names, Types, brief
from .selector import Selector

__all__ = ["FORWARDS", "Entry", "Selection", "on"]


@dataclass(frozen=True)
class Entry:
    """An entry of a table.

    Attributes:
        sites: The selector of the sites.
        rules: The rules; the first receives the incoming gradient. None keeps the native backward.
        forward: The replacement forward: the canonical name of an operation, or a function. None keeps the forward.
        optional: Whether the entry may match nothing.
    """

    sites: Selector
    rules: tuple[Rule, ...] | None
    forward: Forward | None = None
    optional: bool = False

    @classmethod
    def of(
        cls,
        sites: Selector,
        rule: RuleLike | None,
        forward: Forward | None = None,
        optional: bool = False,
    ) -> Entry:
        """Make an entry from a rule in any form that `Selection.backward` accepts."""
        if rule is None:
            if forward is not None:
                raise TableError(
                    f"entry {str(sites)!r} replaces the forward by {shown(forward)} but has no rule; a replaced "
                    f"forward needs one, for example 'straight_through'"
                )
            return cls(sites, None, optional=optional)
        rules = _rules(rule)
        named = {forward, *(part.forward for part in rules)} - {None}
        if len(named) > 1:
            both = " and ".join(sorted(map(shown, named)))
            raise TableError(f"entry {str(sites)!r} and its rules name different forwards: {both}")
        replacement = _read_forward(next(iter(named), None))
        if replacement is not None and sites.at != (REPLACE,):
            raise TableError(
                f"entry {str(sites)!r} replaces the forward by {shown(replacement)}, which is the operation, not a "
                f"place at it; give the forward to an entry without at="
            )
        own = tuple(replace(part, forward=None) for part in rules)
        return cls(sites, own, replacement, optional)

    @functools.cached_property
    def selector(self) -> str:
        """The selector as text."""
        return str(self.sites)

    def matches(self, located: Located) -> bool:
        """Whether the entry selects a site."""
        return self.sites.matches(located)

    def texts(self) -> tuple[str, str, str, str]:
        """The sites, the backward, the forward, and whether the entry may match nothing, for people."""
        backward = " → ".join(map(str, self.rules or ()))
        replaced = self.forward or ""
        forward = replaced if isinstance(replaced, str) else shown(replaced)
        sites = self.selector or "activations"
        return sites, backward or "native", forward, "yes" if self.optional else ""

    def __repr__(self) -> str:
        fields = self.sites.given()
        op = fields.pop("op", None)
        given = [repr(op)] if op is not None else []
        given += [f"{name}={_source(value)}" for name, value in fields.items()]
        given += [f"forward={_source(self.forward)}"] if self.forward is not None else []
        given += ["optional=True"] if self.optional else []
        return f"on({', '.join(given)}).backward({_backward(self.rules)})"


def _source(value: Any) -> str:
    """A value as Python code, if possible."""
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
    """A rule as Python code that does not refer to the module in which it is defined."""
    return f"get({rule.name!r})({', '.join(_values(rule))})" if rule.given else repr(rule.name)


@dataclass(frozen=True)
class Selection:
    """Selected sites, to be completed with `backward`. Made by `on`.

    Attributes:
        sites: The selector of the sites.
        forward: The replacement forward, or None.
        optional: Whether the entry may match nothing.
    """

    sites: Selector
    forward: Forward | None = None
    optional: bool = False

    def backward(self, rule: RuleLike | None, /, **parameters: Any) -> Entry:
        """Complete the entry with a rule.

        Args:
            rule: A rule name, a `Rule`, a composition, or None to keep the native backward.
            **parameters: Values for the rule's parameters, and for its options `save` and `compile`; see `Rule`.

        Returns:
            The entry, for use in a `RuleTable`.

        Raises:
            RuleError: The rule is unknown, lacks a parameter value, or a value is invalid.
            TypeError: A value has the wrong type.
            TableError: There are parameters but no rule, or two different forwards.
        """
        if parameters:
            if rule is None:
                raise TableError(
                    f"entry {str(self.sites)!r} keeps the native backward, which does not take parameters; got "
                    f"{', '.join(parameters)}"
                )
            if isinstance(rule, str | Rule):
                rule = get(rule)(**parameters)
            elif isinstance(rule, Composition):
                rule = rule(**parameters)  # raises, and explains where its parameters go
        return Entry.of(self.sites, rule, self.forward, self.optional)


def on(
    op: Names | None = None,
    *,
    module: Names | None = None,
    type: Types | None = None,
    parameter: Names | None = None,
    call: Calls | None = None,
    at: Names | None = None,
    first: bool = False,
    last: bool = False,
    forward: Forward | None = None,
    where: Callable[[Site], Any] | None = None,
    optional: bool = False,
) -> Selection:
    """Select sites for an entry of a `RuleTable`: ``on("relu", module="layer4.*").backward("rectangular")``.

    A site is selected if it matches every given field. If a field is a list, one of its values has to match. Patterns
    match the whole name. A pattern is a glob, in which ``*`` also matches dots, or ``re:`` followed by a regular
    expression.

    Args:
        op: Canonical names (``"relu"``), groups (``"activations"``, ``"softmax"``, ``"quantizers"``, ``"heaviside"``),
            ``"params"`` for every parameter, or ``"all"`` for activations and parameters. The default is
            ``"activations"``. If `type` or `parameter` is given, these select the ops. Operations such as ``"linear"``
            belong to no group, and are sites only for tables that name them.
        module: Patterns for the path of the module that is called, whose forward calls a function, or that holds the
            parameter; ``""`` is the root.
        type: Classes, or qualified names of classes (``"torch.nn.ReLU"``). Subclasses match, too. Without `op` and
            `parameter`, every call of such a module or `autograd.Function` becomes a site, and the module is kept as
            one opaque call. With `op` or `parameter`, the module at the site's path has to be of such a class.
        parameter: Patterns for the name of a parameter, for example ``"*.weight"``. For a tied parameter, one of its
            names has to match.
        call: Selects among the sites of one op at one path: an index from 0, or a slice.
        at: Where at the operation the rule acts. ``"replace"``, the default: it takes the place of the backward.
            ``"output"``: it gets the gradient of the output, and the backward of the operation gets what it returns.
            The name of an operand, ``"x"`` for an activation: it gets the gradient that this operation gives the
            operand, and returns the gradient that flows on. Each is a site of its own, of which the first entry that
            matches it decides.
        first: Selects only the first operation that matches the other fields, in the order in which the forward calls
            them: in each graph of a transformed model, and in each call of the model in a `use` block.
        last: Selects only the last one. A `use` block cannot know it, and `compile` and `backend` refuse both.
        forward: The replacement forward of the sites: an op's name, one with parameters (see `forward`), or a function
            of one tensor. It does not take part in the selection; it is equivalent to ``rule(forward=...)``.
        where: A function that takes a `Site` and returns whether to select it. A table with such a function cannot be
            written to a file.
        optional: Whether the entry may match nothing. Otherwise that is a warning, and an error under `strict`.

    Returns:
        The selected sites; call its method `backward` to complete the entry.

    Raises:
        TableError: The value of a field is invalid.

    Example:
        >>> import freegrad_fx as fg
        >>> fg.on("relu", module=["layer3.*", "layer4.*"]).backward("rectangular", a=-1.0, b=1.0)
        on('relu', module=['layer3.*', 'layer4.*']).backward('rectangular', a=-1.0, b=1.0)
    """
    sites = Selector.of(op, module, type, parameter, call, where, at, first, last)
    if not isinstance(optional, bool):
        raise TableError(f"optional has to be True or False, got {brief(optional)}")
    return Selection(sites, _read_forward(forward), optional)


def _read_forward(forward: Any) -> Forward | None:
    """Return a replacement forward unchanged. Raises `TableError` if it is invalid."""
    if isinstance(forward, str) and forward not in FORWARDS:
        raise TableError(
            unknown(
                "forward", forward, FORWARDS, everything="list(freegrad_fx.vocabulary.FORWARDS)"
            )
        )
    if forward is not None and not isinstance(forward, str) and not callable(forward):
        raise TableError(
            f"forward has to be the name of an op or a function of a tensor, got {forward!r}"
        )
    return forward if forward is None or isinstance(forward, str) else as_bound(forward)


def _rules(rule: RuleLike) -> tuple[Rule, ...]:
    if not isinstance(rule, str | Rule | Composition):
        if getattr(rule, "__module__", "") == "freegrad_fx.tables" and callable(rule):
            name = f"freegrad_fx.tables.{rule.__name__}"
            raise RuleError(f"{name} is a function that returns a table. Call it: {name}()")
        raise RuleError(
            f"a rule has to be a name, a Rule or a composition, got {rule!r} of type {type(rule).__name__}. "
            f"Declare a function as a rule with @freegrad_fx.register('name'). Combine several rules with "
            f"freegrad_fx.compose(...). Give different ops different rules with a dict."
        )
    parts = rule.parts if isinstance(rule, Composition) else (get(rule),)
    for part in parts:
        part.require_bound()
        if get(part.name).function is not part.function:
            raise RuleError(
                f"rule {part.name!r} has been registered again since this Rule was made; use get({part.name!r})."
            )
    return parts
