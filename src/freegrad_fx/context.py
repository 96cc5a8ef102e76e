"""Ambient rules: what `use` and `native` say for a block of code, and what the sites of a graph ask.

Knows rules; knows nothing of graphs. The state belongs to the thread, as the grad mode of torch does.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ContextDecorator
from typing import Any

from .errors import RuleError, unknown
from .rules.rule import Rule, RuleLike, compose, get

__all__ = ["SCOPES", "ambient_rules", "explicit_rules_act", "native", "use"]

SCOPES = {"activation": "activations", "parameter": "params"}
"""The scope of an ambient rule, by the kind of the sites in it."""


class _State(threading.local):
    def __init__(self) -> None:
        # Dynamo guards what stands on the object, not on its class
        self.explicit = True
        self.activations: tuple[Rule, ...] = ()
        self.params: tuple[Rule, ...] = ()


_state = _State()
_interned: dict[tuple[Rule, ...], tuple[Rule, ...]] = {}


def ambient_rules(scope: str) -> tuple[Rule, ...]:
    """The rules in force in this thread for ``"activations"`` or ``"params"``; none where the backward is native."""
    return _state.activations if scope == "activations" else _state.params


def explicit_rules_act() -> bool:
    """Whether the rules that a table has given to sites act in this thread."""
    return _state.explicit


class _Block(ContextDecorator):
    """Changes the state of the thread for a block; blocks nest, and can be entered again."""

    def __init__(self, **changes: Any) -> None:
        self._changes = changes
        self._before: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        self._before.append({name: getattr(_state, name) for name in self._changes})
        for name, value in self._changes.items():
            setattr(_state, name, value)

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.pop().items():
            setattr(_state, name, value)


class use(_Block):
    """Give every ambient site in a scope a rule, for the block.

    Formula: at every ambient site y = f(x) whose forward runs in the block, ∂x = rule(∂y, x, y).

    Ambient sites are those of ``transform(model)`` without rules, those that no entry decides in
    ``transform(model, rules, ambient=True)``, and `Activation` layers. The rule is bound when the forward runs: the
    backward may run after the block, or in another thread. Blocks nest, and the innermost one for a scope wins; rules
    that a table gave to a site go before. The block is for its own thread, and like that of `torch.no_grad` it does
    not follow an asynchronous task or a generator that is suspended inside of it. It can be used as a decorator.

    Args:
        rule: A rule name, a `Rule` or a composition.
        params: Values for the rule's parameters.
        scope: ``"activations"``, ``"params"``, ``"all"``, or a tuple of these.

    Raises:
        RuleError: The rule is unknown, not fully bound, names a forward, or cannot serve a scope; or a scope is
            unknown.

    Source: FreeGrad, ``freegrad.use``.
    """

    def __init__(
        self,
        rule: RuleLike,
        params: Mapping[str, Any] | None = None,
        scope: str | tuple[str, ...] = "activations",
    ) -> None:
        scopes = _scopes(scope)
        parts = compose(_bound(rule, params)).parts
        for part in parts:
            _check(part, parts, scopes)
        # One object for equal rules, so that compiled code which was guarded by it is found again
        rules = _interned.setdefault(parts, parts)
        super().__init__(**dict.fromkeys(scopes, rules))


class native(_Block):
    """Switch every rule off for the block: the gradients are those of the untransformed model, bit for bit.

    Rules given by tables and ambient ones are both off; a `use` inside the block switches ambient sites on again. A
    forward that a rule has replaced stays replaced, with its own derivative. Threads, tasks: as for `use`.
    """

    def __init__(self) -> None:
        super().__init__(explicit=False, activations=(), params=())


def _bound(rule: RuleLike, params: Mapping[str, Any] | None) -> RuleLike:
    if params is None or not params:
        return rule
    return get(rule)(**params) if isinstance(rule, str) else rule(**params)


def _scopes(scope: str | tuple[str, ...]) -> tuple[str, ...]:
    asked = (scope,) if isinstance(scope, str) else tuple(scope)
    valid = (*SCOPES.values(), "all")
    for name in asked:
        if name not in valid:
            raise RuleError(unknown("scope", name, valid))
    return tuple(s for s in SCOPES.values() if s in asked or "all" in asked)


def _check(rule: Rule, parts: tuple[Rule, ...], scopes: tuple[str, ...]) -> None:
    """Raise `RuleError` if a rule cannot serve every site in some scopes."""
    rule.require_bound()
    if rule.forward is not None:
        raise RuleError(
            f"an ambient rule leaves the forward as it is, and {rule!r} replaces it. Give it to transform() instead."
        )
    if not rule.keeps_shape:
        raise RuleError(
            f"rule {rule.name!r} does not keep the shape of a gradient, and is for single sites alone"
        )
    for kind, scope in SCOPES.items():
        if scope not in scopes:
            continue
        if kind not in rule.sites:
            raise RuleError(
                f"rule {rule.name!r} is for {' and '.join(rule.sites)} sites alone, not for {scope!r}"
            )
        if "y" in rule.inputs and (kind == "parameter" or rule is not parts[0]):
            reason = (
                "a parameter has none"
                if kind == "parameter"
                else "it must come first in a composition"
            )
            raise RuleError(f"rule {rule.name!r} needs the output y of an operation: {reason}")
