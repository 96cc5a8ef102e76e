"""Intercepts the calls of `torch.autograd.Function` classes that a table selects, also through a stored ``apply``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._torch.functions import Function, with_backward, with_results
from .._torch.tensors import version
from ..context import intercepting_blocks, left_alone
from ..plan import Decision
from .rules import decoupled_by, replaced_forward
from .running import in_one_site

__all__ = ["calls_of_functions"]


class Decides(Protocol):
    """What is needed of a block."""

    def function_call(self, function: Function) -> Decision | None:
        """The decision for the `apply` that runs now."""


def calls_of_functions(
    functions: Iterable[Function], decides: Decides
) -> AbstractContextManager[None]:
    """A context in which every `apply` of some Functions, and of those derived from them, is a site of a block."""

    def applied(function: Function, ctx: Any, inputs: Sequence[Any], result: Any) -> Any:
        if in_one_site() or not any(block is decides for block in intercepting_blocks()):
            return result
        decision = decides.function_call(function)
        if decision is None or decision.action != "rewrite":
            return result
        position = next((i for i, value in enumerate(inputs) if isinstance(value, Tensor)), None)
        if position is None:
            return result
        x = inputs[position]
        if decision.forward is not None:
            result = replaced_forward(decision.forward, x)
        if not isinstance(result, Tensor):
            raise TypeError(
                f"the operation at site {decision.site.name!r} returned {type(result).__name__}; a rule requires that "
                f"it returns a tensor"
            )
        y = result.detach() if decision.reads("y") or result is x else torch.empty_like(result)
        with_backward(ctx, _Backward(function, decision, position, x, version(x), y))
        return result

    return with_results(functions, applied, left_alone)


@dataclass
class _Backward:
    """The backward of one `apply`: the rules for one input, the Function's own for the others."""

    function: Function
    decision: Decision
    position: int
    x: Tensor
    version: int
    y: Tensor

    def __call__(self, ctx: Any, *grads: Any) -> Any:
        if version(self.x) != self.version:
            raise RuntimeError(
                f"the input of {self.function.__name__}.apply was changed in place after the forward, and the rule at "
                f"site {self.decision.site.name!r} reads it. Change a copy of it instead."
            )
        needed = list(ctx.needs_input_grad)
        given: list[Any] = [None] * len(needed)
        if self.decision.forward is None and any(
            need for i, need in enumerate(needed) if i != self.position
        ):
            own = self.function.backward(ctx, *grads)
            given = list(own) if isinstance(own, tuple) else [own]
        if needed[self.position]:
            given[self.position] = self._by_the_rules(grads[0])
        return tuple(given)

    def _by_the_rules(self, grad: Tensor) -> Tensor:
        recorded = torch.is_grad_enabled()
        with torch.enable_grad(), left_alone():
            x = self.x if recorded and self.x.requires_grad else self.x.detach().requires_grad_()
            out = decoupled_by(self.decision.rules, self.y, x, self.decision.site.name)
            (result,) = torch.autograd.grad(out, x, grad, create_graph=recorded)
        return result
