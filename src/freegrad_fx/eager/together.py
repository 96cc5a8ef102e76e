"""Puts the rules of an entry around several parameters together, in code without a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch.dispatch import function_transforms_active
from ..backward.joint import (
    gather,
    recomputations,
    require_undistributed,
    require_whole,
    scatter,
)
from ..context import left_alone
from ..errors import RuleError
from ..ops.gradients import decoupled_by
from ..plan import Decision
from ..plan.groups import groups
from .rules import replaced_forward

__all__ = ["decoupled_together"]


def decoupled_together(
    parameters: Sequence[Tensor], decisions: Sequence[Decision]
) -> tuple[Tensor, ...]:
    """The tensors that take the places of parameters, with the forwards of the decisions and the rules of their entry.

    Args:
        parameters: The parameters that the entry selects.
        decisions: The decision for each.

    Raises:
        RuleError: A rule reads the parameters or learns, a transform of torch.func is active, or a parameter is
            distributed.
    """
    rules = decisions[0].rules
    reading = next((rule.name for rule in rules if "x" in rule.inputs or rule.learnt), None)
    if reading is not None or function_transforms_active():
        why = f"with {reading!r}, which reads them or learns" if reading else "under torch.func"
        raise RuleError(
            f"{', '.join(map(repr, rules))} acts on several parameters together {why}, which a use() block does not "
            f"support. Transform the model with the table: transform(model, rules)."
        )
    require_undistributed(parameters)
    values = [p.detach() for p in parameters]
    for index, decision in enumerate(decisions):
        if decision.forward is not None:
            values[index] = replaced_forward(decision.forward, values[index], rules)
    return _OfParameters.apply(decisions, *values, *parameters)  # type: ignore[no-any-return, no-untyped-call]


class _OfParameters(torch.autograd.Function):
    """Returns values; in the backward, the rules of an entry compute the gradients of its parameters together.

    It saves nothing, so that several backwards can go through one node, and a checkpoint counts nothing.
    """

    @staticmethod
    def forward(ctx: Any, decisions: Sequence[Decision], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.decisions, ctx.parameters = decisions, tensors[len(decisions) :]
        ctx.recomputed = recomputations()
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in tensors[: len(decisions)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        require_whole(ctx.recomputed)
        count = len(grads)
        wanted = ctx.needs_input_grad[1 + count :]
        used = [i for i in range(count) if wanted[i] and grads[i] is not None]
        results: list[Tensor | None] = [None] * count
        recorded = torch.is_grad_enabled()
        if used:
            with torch.enable_grad(), left_alone():
                # the rules do not read the parameters, only the gradients
                ends = [ctx.parameters[i].detach().requires_grad_() for i in used]
                outs = _around(ends, [ctx.decisions[i] for i in used])
                given = [grads[i] for i in used]
                found = torch.autograd.grad(outs, ends, given, create_graph=recorded)
            for index, result in zip(used, found, strict=True):
                results[index] = result
        return None, *(None,) * count, *results


def _around(parameters: Sequence[Tensor], decisions: Sequence[Decision]) -> list[Tensor]:
    """The values of parameters, with the rules of their entry around them; the last rule is nearest to them."""
    sources = [*parameters]
    paths = [decision.site.path for decision in decisions]
    for rule in reversed(decisions[0].rules):
        for group in groups(paths, rule.over):
            site = decisions[group[0]].site.name
            if len(group) == 1:
                source = sources[group[0]]
                sources[group[0]] = decoupled_by((rule,), source.detach(), source, site)
                continue
            flat = gather([sources[i] for i in group])
            flat = decoupled_by((rule,), flat.detach(), flat, site)
            outs = scatter(flat, [sources[i].detach() for i in group])
            for index, out in zip(group, outs, strict=True):
                sources[index] = out
    return sources
