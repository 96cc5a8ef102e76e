"""The two functions around an operation: `stop_gradient` in front of it, `decoupled` behind it.

They dispatch through ``__torch_function__``, so that a symbolic tracer keeps each as one node. What `decoupled` comes
to is in `backward`. This file knows no rule by name and nothing of graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from ..backward.decouple import decouple
from ..backward.hazards import records_forward_alone, warn_if_recorded
from ..context import ambient_rules, explicit_rules_act
from ..core.rule import Rule, get

__all__ = ["decoupled", "kept", "stop_gradient"]


def stop_gradient(x: Tensor, *, ambient: str = "") -> Tensor:
    """Return the values of `x`, cut from its autograd graph; the memory is shared.

    Formula: forward x, backward 0.

    Where gradients are disabled it is `x` itself: some kernels ask whether a weight requires a gradient even then. A
    program that is being exported may be run with gradients later, and cuts in any case.

    Args:
        x: Any tensor.
        ambient: As for `decoupled`; where no rule acts, `x` itself is returned.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(stop_gradient, (x,), x, **_if_given(ambient=ambient))
    if not (torch.is_grad_enabled() or records_forward_alone()):
        return x
    acts = bool(ambient_rules(ambient)) if ambient else explicit_rules_act()
    # abs() and its like are written for numbers too, and a trace cannot tell
    return x.detach() if acts and isinstance(x, Tensor) else x


def kept(x: Tensor, *, ambient: str) -> Tensor:
    """Return a copy of `x` if a rule acts at an ambient site, whose operation writes into `x`; else `x` itself.

    Args:
        x: Any tensor.
        ambient: As for `decoupled`.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(kept, (x,), x, ambient=ambient)
    return x.clone() if torch.is_grad_enabled() and ambient_rules(ambient) else x


def _if_given(**keywords: Any) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if value}


def decoupled(
    y: Tensor,
    x: Tensor,
    *,
    rule: str | Rule = "",
    ambient: str = "",
    site: str = "",
    save: str = "",
    compile: bool = False,
    **parameters: Any,
) -> Tensor:
    """Return the values of `y`; in the backward, `x` receives what the rule makes of the gradient.

    Formula: forward y; backward ∂x = rule(∂out, x, y), ∂y = ∂out.

    `y` keeps its own gradient, so that the weight of a PReLU between `stop_gradient(x)` and `y` learns natively.

    Args:
        y: The output of the operation, computed from ``stop_gradient(x)``. Any shape.
        x: The input of the operation, of the shape that the rule's result has.
        rule: The name of a registered rule, or a `Rule`.
        ambient: Instead of a rule: ``"activations"`` or ``"params"``, for the one that a `use` block of this scope
            gives while this runs; outside of such a block `y` itself is returned.
        site: The name of the place in the model, for error messages.
        save: What is saved where the rule reads ``x``: ``"x"``; ``"mask"``, its mask alone; ``"y"``, the output, where
            that has the same mask. By default what the rule says.
        compile: Let the backward run as one compiled kernel in eager mode.
        **parameters: The rule's parameters, all of them; what is missing is taken from the rule.

    Raises:
        RuleError: The rule is unknown, or, in the backward, returned what is no gradient for `x`.
        TypeError: The operation returned something else than a tensor.
        RuntimeError: It is compiled inside a transform of `torch.func`, where the compiler would drop the rule.
    """
    if has_torch_function_variadic(y, x):
        given = _if_given(ambient=ambient) if ambient else {"rule": rule}
        given = {**given, **_if_given(save=save, compile=compile)}
        return handle_torch_function(decoupled, (y, x), y, x, **given, site=site, **parameters)
    if not isinstance(y, Tensor):
        if not isinstance(x, Tensor):
            return y
        raise TypeError(
            f"the operation at site {site!r} returned {type(y).__name__}; a rule needs one that returns a tensor"
        )
    # Only the grad mode may be asked here: `requires_grad` is not to be trusted under functorch and Dynamo.
    acts = bool(ambient_rules(ambient)) if ambient else explicit_rules_act()
    if not acts or warn_if_recorded() or not torch.is_grad_enabled():
        return y
    if not ambient:
        found = get(rule)
        if len(parameters) < len(found.parameters):
            parameters = {**dict(found.values), **parameters}
        return decouple(y, x, found, site, parameters, save or found.save, compile or found.compile)
    first, *others = ambient_rules(ambient)
    # An identity for every rule but the first, the last rule nearest to x
    for other in reversed(others):
        x = _decoupled_by(other, x.detach(), x, site)
    return _decoupled_by(first, y, x, site)


def _decoupled_by(rule: Rule, y: Tensor, x: Tensor, site: str) -> Tensor:
    return decouple(y, x, rule, site, dict(rule.values), rule.save, rule.compile)
