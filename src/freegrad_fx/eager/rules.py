"""Runs an operation with rules around it, as a rewritten graph does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._torch import tree
from .._torch.dispatch import function_transforms_active
from .._torch.tensors import version
from ..backward.hazards import warn_if_recorded
from ..backward.unrecorded import gradient_of
from ..context import left_alone
from ..core.rule import Forward, Rule, learnt_by
from ..ops.checks import require_unwritten, warn_if_native, write_count
from ..ops.functions import apply_forward, function_key
from ..ops.gradients import copied, decoupled_by, overwritten_by
from ..plan import Decision
from ..sites.site import OUTPUT, REPLACE
from ..vocabulary.activations import OPS
from ..vocabulary.op import Operand
from .operands import UsedCall

__all__ = [
    "Decisions",
    "gradients_by",
    "is_differentiable",
    "parameter_by",
    "replaced_forward",
    "require_tensor",
    "rules_act",
    "run",
    "to_rewrite",
    "with_argument",
    "with_edges",
]


Decisions: TypeAlias = Mapping[str, Decision]
"""The decisions for the places at one operation, by placement."""


def to_rewrite(asked: Sequence[Decisions | None]) -> Decisions:
    """The decisions to rewrite. At each place, the first block whose table has an entry for it decides.

    Args:
        asked: The decisions of the blocks in force, the innermost first.
    """
    if len(asked) == 1:
        found = asked[0] or {}
        return {at: d for at, d in found.items() if d.action == "rewrite" and d.entry is not None}
    decided: dict[str, Decision] = {}
    for decisions in asked:
        for at, decision in decisions.items() if decisions else ():
            if decision.entry is not None:
                decided.setdefault(at, decision)
    return {at: decision for at, decision in decided.items() if decision.action == "rewrite"}


def with_edges(
    operands: Sequence[Operand],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    decisions: Decisions,
    *,
    inplace: bool,
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of a call with rules at the operands other than the first, which `run` is given.

    Args:
        operands: The operands that are tensors.
        args: Positional arguments.
        kwargs: Keyword arguments.
        decisions: The decisions to rewrite.
        inplace: Whether the operation writes into the first operand, which can be another one, too.
    """
    edges = [(o, decisions[o.name]) for o in operands[1:] if o.name in decisions]
    if not edges or not rules_act():
        return args, kwargs
    given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
    for operand, decision in edges:
        value = given[operand.key]
        if decision.rules and is_differentiable(value):
            value = value.clone() if inplace and decision.reads("x") else value
            name = decision.site.name
            given[operand.key] = decoupled_by(decision.rules, value.detach(), value, name)
    positional = tuple(given[index] for index in range(len(args)))
    return positional, {name: given[name] for name in kwargs}


def rules_act() -> bool:
    """Whether gradients are recorded, so that a rule can act."""
    return torch.is_grad_enabled() and not warn_if_recorded()


def is_differentiable(value: Any) -> bool:
    """Whether a value is a tensor that can have a gradient."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def run(
    operation: Callable[[Tensor], Any],
    x: Tensor,
    decisions: Decisions,
    *,
    inplace: bool,
    on_copy: bool = False,
    used: UsedCall | None = None,
) -> Any:
    """Run an operation with the rules and the forward of the decisions for the places at it.

    An operation that works in place runs on a copy, and ``x.copy_`` writes the result back, so that autograd tracks
    all views of `x`.

    Args:
        operation: Calls the operation of the model with a tensor in the place of `x`.
        x: The input of the operation.
        decisions: The decisions to rewrite; without rules if they are switched off, and only a forward acts.
        inplace: Whether the operation writes its result into `x`.
        on_copy: Whether the operation may return its input, so that it has to run on a copy.
        used: What the rule that replaces the backward uses of the call besides `x`.
    """
    decision = decisions.get(REPLACE)
    forward = None if decision is None else decision.forward
    if forward is not None and decision is not None:
        rules = decision.rules if is_differentiable(x) and rules_act() else ()
        operation = functools.partial(replaced_forward, forward, rules=rules)
        if not decision.rules:
            warn_if_native(x, decision.site.name)
    differentiable = is_differentiable(x)
    acting = [d for d in decisions.values() if d.rules and (differentiable or d.site.at == OUTPUT)]
    if not acting or not rules_act():
        out = operation(x)
        return x.copy_(out) if inplace and forward is not None else out
    of_input = [d for d in acting if d.site.at != OUTPUT]
    start = x
    if inplace and (used is not None or any(d.reads("x") for d in of_input)):
        start = copied(x)
    for edge in of_input:
        if edge.site.at != REPLACE:
            start = decoupled_by(edge.rules, start.detach(), start, edge.site.name)
    name = acting[0].site.name
    replaces = decision if decision in of_input else None
    stops = replaces is not None and (used is None or used.answers_first)
    given = (
        x.detach() if stops else start
    )  # with the strides of x, as kernels round differently on others
    given = copied(given) if inplace or on_copy else given
    watched = bool(of_input) and on_copy and not inplace and forward is None
    writes = write_count(given) if watched else -1
    y = require_tensor(operation(given), name)
    require_unwritten(given, writes, name)
    y = y.clone() if y is given and not (inplace or on_copy) else y
    if replaces is not None:
        call = () if used is None else (used.operation, used.operands)
        y = decoupled_by(replaces.rules, y, start, replaces.site.name, *call)
    read = replaces is not None and replaces.reads("y")
    output = decisions.get(OUTPUT)
    if output is not None and output.rules and is_differentiable(y):
        y = decoupled_by(output.rules, y.detach(), y, output.site.name)
        read = read or output.reads("x") or output.reads("y")
    if inplace:
        return overwritten_by(x, y)
    # What the rules read must not change if the model writes into the result
    return copied(y) if read else y


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


def gradients_by(
    rules: tuple[Rule, ...], y: Tensor, x: Tensor, grad: Tensor, site: str
) -> tuple[Tensor | None, ...]:
    """The gradients that the rules give `x` and the tensors that they learn, in a backward.

    They can be differentiated if the backward is recorded.
    """
    recorded = torch.is_grad_enabled()
    if not recorded and len(rules) == 1:
        with left_alone():
            found = gradient_of(rules[0], site, grad, y, x)
        if found is not None:
            return (found,)
    with torch.enable_grad(), left_alone():
        x = x if recorded and x.requires_grad else x.detach().requires_grad_()
        out = decoupled_by(rules, y, x, site)
        wanted = (x, *learnt_by(rules))
        return torch.autograd.grad(out, wanted, grad, create_graph=recorded, allow_unused=True)


class _OfParameter(torch.autograd.Function):
    """Returns a value; in the backward, the rules compute the gradients of the parameter and of what they learn.

    It saves nothing, so that several backwards can go through one node, and a checkpoint counts nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, parameter: Tensor, decision: Decision, *learnt: Tensor
    ) -> Tensor:
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
        first, *others = gradients_by(decision.rules, ctx.value, ctx.parameter, grads[0], name)
        return None, first, None, *others


def parameter_by(decision: Decision, value: Tensor, parameter: Tensor) -> Tensor:
    """Return the values of `value`; in the backward, the rules of a decision compute the gradient of the parameter."""
    if function_transforms_active():
        return decoupled_by(decision.rules, value, parameter, decision.site.name)
    learnt = learnt_by(decision.rules)
    return _OfParameter.apply(value, parameter, decision, *learnt)  # type: ignore[no-any-return, no-untyped-call]


def replaced_forward(forward: Forward, x: Tensor, rules: tuple[Rule, ...] = ()) -> Tensor:
    """The value of a replacement forward.

    Args:
        forward: The forward.
        x: The input.
        rules: The rules that act. The tensors to which they give a gradient get none from the forward.

    Raises:
        TypeError: It did not return a tensor of the shape of `x`.
        RuleError: It changed `x` in place.
    """
    function: Any = OPS[forward].function if isinstance(forward, str) else forward
    learnt = {id(tensor) for tensor in learnt_by(rules)}
    before: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    while learnt and isinstance(function, functools.partial):
        before, keywords = (*function.args, *before), {**function.keywords, **keywords}
        function = function.func

    def alone(tensor: Tensor) -> Tensor:
        return tensor.detach() if id(tensor) in learnt else tensor

    before, keywords = tree.map_only(Tensor, alone, (before, keywords))
    return apply_forward(x, _key(function), *before, **keywords)


@functools.cache
def _key(function: Callable[..., Any]) -> str:
    return function_key(function)
