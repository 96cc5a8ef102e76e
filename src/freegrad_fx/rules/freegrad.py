"""FreeGrad's signature of a rule, ``fn(ctx, grad_out, tin, **params)``, made ours. Knows no rule."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["adapted"]


def adapted(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], bool]:
    """Return a function of FreeGrad's signature as one of ours, and any other as it is.

    Formula: rule(grad, x, *, ...) = function(None, grad, x, ...). As in FreeGrad, ``ctx`` is None. What follows
    ``tin`` are parameters.

    Returns:
        The function, and whether it takes parameters that it does not name: by ``**params``, not by ``**_``, as
        FreeGrad's own rules call what they do not read.
    """
    try:
        ctx, grad, x, *others = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return function, False
    leading = all((p.kind, p.default) == (p.POSITIONAL_OR_KEYWORD, p.empty) for p in (ctx, grad, x))
    if ctx.name != "ctx" or not leading or any(p.kind is p.VAR_POSITIONAL for p in others):
        return function, False

    @functools.wraps(function)
    def rule(grad: Tensor, x: Tensor, **parameters: Any) -> Tensor:
        return function(None, grad, x, **parameters)

    more = [p for p in others if p.kind is p.VAR_KEYWORD]
    named = [p.replace(kind=p.KEYWORD_ONLY) for p in others if p not in more]
    inputs = [grad.replace(name="grad"), x.replace(name="x")]
    rule.__signature__ = inspect.Signature([*inputs, *named])  # type: ignore[attr-defined]
    return rule, any(p.name != "_" for p in more)
