"""The registry of rules. A rule is a callable ``fn(ctx, grad_out, tin, **params)``; ``ctx`` is None, as in FreeGrad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from freegrad_fx.errors import unknown

__all__ = ["RuleError", "compose", "get", "register"]

Rule: TypeAlias = Callable[..., Tensor]
Registered = TypeVar("Registered", bound=Rule)

_RULES: dict[str, Rule] = {}


class RuleError(KeyError):
    """A name is registered already, or is not registered."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would show the repr of the message


def register(name: str) -> Callable[[Registered], Registered]:
    """Register a rule ``fn(ctx, grad_out, tin, **params) -> grad_in``. The decorator returns the function unchanged.

    Raises:
        RuleError: The name is already registered.
    """

    def declare(function: Registered) -> Registered:
        if name in _RULES:
            raise RuleError(f"a rule {name!r} is already registered. Choose another name.")
        _RULES[name] = function
        return function

    return declare


def get(rule: str | Rule) -> Rule:
    """Return the rule of a name. A callable is returned unchanged.

    Raises:
        RuleError: No rule of that name is registered.
    """
    if callable(rule):
        return rule
    if rule not in _RULES:
        raise RuleError(unknown("rule", rule, _RULES))
    return _RULES[rule]


def compose(*rules: str | Rule) -> Rule:
    """Compose rules. The first rule receives the incoming gradient. All rules receive the same parameters.

    Raises:
        RuleError: A name is not registered.
    """
    functions = [get(rule) for rule in rules]

    def composed(ctx: Any, grad_out: Tensor, tin: Tensor | None, **params: Any) -> Tensor:
        for function in functions:
            grad_out = function(ctx, grad_out, tin, **params)
        return grad_out

    return composed
