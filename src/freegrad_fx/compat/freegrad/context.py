"""`use`: a context manager that sets the rule of FreeGrad's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Self, TypeAlias

from torch import Tensor

from freegrad_fx.context import Block
from freegrad_fx.core.declaration import Declaration
from freegrad_fx.core.rule import Rule

from . import registry

__all__ = ["use"]

ScopeLike: TypeAlias = str | Iterable[str]


class use(Block):
    """Apply a rule to layers whose forward runs in the block, and to parameters whose backward runs in the block.

    Blocks can be nested. The innermost replaces the others: rule, parameters and scope.

    Args:
        rule: The name of a registered rule, or a callable ``fn(ctx, grad_out, tin, **params)``.
        params: Keyword arguments for the rule.
        scope: ``"activations"``, ``"params"`` or ``"all"``, or several of them. Other words have no effect.

    Raises:
        RuleError: No rule of that name is registered; raised on entry.
    """

    def __init__(
        self,
        rule: str | registry.Rule,
        params: dict[str, Any] | None = None,
        scope: ScopeLike = "all",
    ) -> None:
        super().__init__()
        self.rule = rule
        self.params = params or {}
        self.scope = (scope,) if isinstance(scope, str) else tuple(scope)

    def __enter__(self) -> Self:
        function = registry.get(self.rule)

        def on_activation(grad: Tensor, x: Tensor, **params: Any) -> Tensor:
            return function(None, grad, x, **params)

        def on_parameter(grad: Tensor, **params: Any) -> Tensor:
            return function(None, grad, None, **params)

        self.changes = {
            "activations": self._if_in_scope("activations", on_activation, ("x",)),
            "params": self._if_in_scope("params", on_parameter, ()),
        }
        return super().__enter__()

    def _if_in_scope(
        self, scope: str, function: Callable[..., Tensor], inputs: tuple[str, ...]
    ) -> tuple[Rule, ...]:
        if scope not in self.scope and "all" not in self.scope:
            return ()
        params: Mapping[str, Any] = MappingProxyType(dict(self.params))
        name = self.rule if isinstance(self.rule, str) else getattr(self.rule, "__name__", "rule")
        return (Rule(Declaration(name, function, inputs, {}), params),)
