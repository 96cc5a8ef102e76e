"""Ambient rules: the context managers `use` and `native` for the sites of graphs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from .context import Block
from .core.rule import RuleLike
from .core.scopes import parts_for, scopes_of, unlearned
from .errors import FreegradWarning

__all__ = ["native", "use"]


class use(Block):
    """Context manager that gives every ambient site in a scope a rule.

    Formula: at every ambient site y = f(x) whose forward runs in the block, ∂x = rule(∂y, x, y).

    The following sites are ambient: all sites of ``transform(model)`` without rules, the sites that no entry decides
    in ``transform(model, rules, ambient=True)``, and `Activation` layers.

    The rule is bound when the forward runs, so the backward can run after the block or in another thread. Blocks can
    be nested: the innermost block for a scope takes precedence, and rules that a table gave to a site take precedence
    over blocks. Recomputation by `torch.utils.checkpoint` runs in the blocks of the original forward. A block applies
    only to the thread that entered it, not to threads started inside of it. It can be entered repeatedly, and used as
    a decorator.

    Args:
        rule: A rule name, a `Rule` or a composition.
        params: Values for the rule's parameters.
        scope: ``"activations"``, ``"params"``, ``"all"``, or a tuple of these.

    Raises:
        RuleError: The rule is unknown, lacks a parameter value, replaces a forward, or cannot be used in a scope; or
            a scope is unknown.

    Source: FreeGrad, ``freegrad.use``.
    """

    def __init__(
        self,
        rule: RuleLike,
        params: Mapping[str, Any] | None = None,
        scope: str | tuple[str, ...] = "activations",
    ) -> None:
        scopes = scopes_of(scope)
        parts = parts_for(scopes, rule, params)
        for text in unlearned(parts):
            warnings.warn(text, FreegradWarning, stacklevel=3)
        super().__init__(table=False, **dict.fromkeys(scopes, parts))


class native(Block):
    """Context manager that disables all rules: gradients equal those of the untransformed model, bit for bit.

    Both rules from tables and ambient rules are disabled; a `use` block inside enables ambient rules again. A
    replaced forward stays replaced, with its own derivative, which a warning says; then call the original model for
    its gradients. Threads and nesting are handled as by `use`.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> gm = fg.transform(torch.nn.Sequential(torch.nn.ReLU()), {"relu": fg.rules.scale(s=3.0)})
        >>> x = torch.ones(1, requires_grad=True)
        >>> with fg.native():
        ...     y = gm(x)
        >>> torch.autograd.grad(y, x)
        (tensor([1.]),)
    """

    ends_interception = True
    keeps_programs = True

    def __init__(self) -> None:
        super().__init__(explicit=False, table=False, activations=(), params=())
