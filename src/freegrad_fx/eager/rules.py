"""Runs an operation with rules around it, as a rewritten graph does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._torch.dispatch import function_transforms_active
from .._torch.tensors import version
from ..backward.hazards import warn_if_recorded
from ..context import left_alone
from ..core.rule import Forward, Rule
from ..ops.checks import require_unwritten, warn_if_native, write_count
from ..ops.functions import apply_forward, function_key
from ..ops.gradients import copied, decoupled_by
from ..plan import Decision
from ..vocabulary.activations import OPS

__all__ = [
    "gradient_by",
    "is_differentiable",
    "parameter_by",
    "replaced_forward",
    "require_tensor",
    "rules_act",
    "run",
    "with_argument",
]


def rules_act() -> bool:
    """Whether gradients are recorded, so that a rule can act."""
    return torch.is_grad_enabled() and not warn_if_recorded()


def is_differentiable(value: Any) -> bool:
    """Whether a value is a tensor that can have a gradient."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def run(
    operation: Callable[[Tensor], Any],
    x: Tensor,
    decision: Decision,
    *,
    inplace: bool,
    on_copy: bool = False,
) -> Any:
    """Run the operation of a site with the rules and the forward of a decision.

    An operation that works in place runs on a copy, and ``x.copy_`` writes the result back, so that autograd tracks
    all views of `x`.

    Args:
        operation: Calls the operation of the model with a tensor in the place of `x`.
        x: The input of the operation.
        decision: The decision; without rules if they are switched off, and only its forward acts.
        inplace: Whether the operation writes its result into `x`.
        on_copy: Whether the operation may return its input, so that it has to run on a copy.
    """
    forward = decision.forward
    if forward is not None:
        operation = functools.partial(replaced_forward, forward)
    if forward is not None and not decision.rules:
        warn_if_native(x, decision.site.name)
    if decision.rules and rules_act() and is_differentiable(x):
        stop = copied(x.detach()) if inplace or on_copy else x.detach()
        start = x.clone() if inplace and decision.reads("x") else x
        watched = on_copy and not inplace and forward is None
        writes = write_count(stop) if watched else -1
        y = require_tensor(operation(stop), decision.site.name)
        require_unwritten(stop, writes, decision.site.name)
        y = y.clone() if y is stop and not (inplace or on_copy) else y
        out = decoupled_by(decision.rules, y, start, decision.site.name)
    else:
        out = operation(x)
        if forward is None:
            return out
    return x.copy_(out) if inplace else out


def with_argument(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], key: int | str
) -> Callable[[Tensor], Any]:
    """A call of a function as a function of one of its arguments."""

    def call(given: Tensor) -> Any:
        if isinstance(key, int):
            return function(*args[:key], given, *args[key + 1 :], **kwargs)
        return function(*args, **{**kwargs, key: given})

    return call


def require_tensor(y: Any, site: str) -> Tensor:
    """The result of the operation of a site. Raise `TypeError` if it is not a tensor."""
    if not isinstance(y, Tensor):
        raise TypeError(
            f"the operation at site {site!r} returned {type(y).__name__}; a rule requires that it returns a tensor"
        )
    return y


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
