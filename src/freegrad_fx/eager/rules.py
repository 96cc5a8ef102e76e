"""Runs an operation with rules around it, as a rewritten graph does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._torch.dispatch import function_transforms_active
from .._torch.tensors import version
from ..backward.decouple import decouple
from ..backward.hazards import warn_if_recorded
from ..context import left_alone
from ..core.rule import Forward, Rule
from ..ops.functions import apply_forward, function_key
from ..ops.gradients import copied
from ..plan import Decision
from ..vocabulary.activations import OPS
from ..vocabulary.op import Spelling

__all__ = ["decoupled_by", "gradient_by", "parameter_by", "replaced_forward", "rules_act", "run"]


def rules_act() -> bool:
    """Whether gradients are recorded, so that a rule can act."""
    return torch.is_grad_enabled() and not warn_if_recorded()


def run(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    spelling: Spelling,
    decision: Decision,
) -> Any:
    """Run the operation of a site with the rules and the forward of a decision.

    An operation that works in place runs on a copy, and ``x.copy_`` writes the result back, so that autograd tracks
    all views of `x`.
    """
    key, forward, acts = spelling.key, decision.forward, rules_act()
    x: Tensor = args[key] if isinstance(key, int) else kwargs[key]
    differentiable = x.is_floating_point() or x.is_complex()
    if forward is None and not (acts and differentiable):
        return func(*args, **kwargs)

    def operation(given: Tensor) -> Any:
        if forward is not None:
            return replaced_forward(forward, given)
        if isinstance(key, int):
            return func(*args[:key], given, *args[key + 1 :], **kwargs)
        return func(*args, **{**kwargs, key: given})

    if acts and differentiable:
        stop = copied(x.detach()) if spelling.inplace else x.detach()
        start = x.clone() if spelling.inplace and decision.reads("x") else x
        y = operation(stop)
        y = y.clone() if y is stop and not spelling.inplace else y
        out = decoupled_by(decision.rules, y, start, decision.site.name)
    else:
        out = operation(x)
    return x.copy_(out) if spelling.inplace else out


def decoupled_by(rules: tuple[Rule, ...], y: Tensor, x: Tensor, site: str) -> Tensor:
    """Return the values of `y`; in the backward, the rules compute the gradient of `x`.

    Raises:
        TypeError: The operation did not return a tensor.
    """
    if not isinstance(y, Tensor):
        raise TypeError(
            f"the operation at site {site!r} returned {type(y).__name__}; a rule requires that it returns a tensor"
        )
    first, *others = rules
    source = x
    # All rules except the first act around identities; the last rule is nearest to x
    for other in reversed(others):
        source = _by(other, source.detach(), source, x, site)
    return _by(first, y, source, x, site)


def _by(rule: Rule, y: Tensor, source: Tensor, x: Tensor, site: str) -> Tensor:
    read = None if source is x else x
    return decouple(y, source, rule, site, dict(rule.values), rule.save, rule.compile, read)


def gradient_by(rules: tuple[Rule, ...], y: Tensor, x: Tensor, grad: Tensor, site: str) -> Tensor:
    """The gradient that the rules give `x`, in a backward. It can be differentiated if the backward is recorded."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad(), left_alone():
        x = x if recorded and x.requires_grad else x.detach().requires_grad_()
        out = decoupled_by(rules, y, x, site)
        (result,) = torch.autograd.grad(out, x, grad, create_graph=recorded)
    return result


class _OfParameter(torch.autograd.Function):
    """Returns a value; in the backward, the rules compute the gradient of the parameter.

    It saves nothing, so that several backwards can go through one node, and a checkpoint counts nothing.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, parameter: Tensor, decision: Decision) -> Tensor:
        ctx.value, ctx.parameter, ctx.decision = value.detach(), parameter, decision
        ctx.version = version(parameter)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        decision: Decision = ctx.decision
        if decision.reads("x") and version(ctx.parameter) != ctx.version:
            raise RuntimeError(
                f"the parameter {decision.site.name!r} was changed after the forward, and its rule reads it. Call the "
                f"backward before the optimizer's step."
            )
        name = decision.site.name
        return None, gradient_by(decision.rules, ctx.value, ctx.parameter, grads[0], name), None


def parameter_by(decision: Decision, value: Tensor, parameter: Tensor) -> Tensor:
    """Return the values of `value`; in the backward, the rules of a decision compute the gradient of the parameter."""
    if function_transforms_active():
        return decoupled_by(decision.rules, value, parameter, decision.site.name)
    return _OfParameter.apply(value, parameter, decision)  # type: ignore[no-any-return, no-untyped-call]


def replaced_forward(forward: Forward, x: Tensor) -> Tensor:
    """The value of a replacement forward.

    Raises:
        TypeError: It did not return a tensor of the shape of `x`.
        RuleError: It changed `x` in place.
    """
    function: Any = OPS[forward].function if isinstance(forward, str) else forward
    return apply_forward(x, _key(function))


@functools.cache
def _key(function: Callable[..., Any]) -> str:
    return function_key(function)
