"""The backward that a rule has, in each of the ways in which code runs.

`decouple` is what `ops.decoupled` comes to where a rule acts. In eager mode that is a plain Function; under the
transforms of torch.func one that they can take apart; and under the compiler an operator, which Dynamo leaves whole
and AOTAutograd opens, so that caches of compiled code know by its arguments which backward it has. (A formula that
reads variables is left for Dynamo to look into, which guards their values.) This file knows no rule by name and nothing
of graphs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._torch.dispatch import function_transforms_active, without_dead_transform
from .._torch.dynamo import is_compiling
from ..core.rule import Rule
from ..errors import RuleError
from .functions import OVERWRITTEN, Call, Composable, apply
from .hazards import refuse_compiled_transform
from .operator import operands

__all__ = ["decouple"]


def decouple(
    y: Tensor,
    x: Tensor,
    rule: Rule,
    site: str,
    parameters: dict[str, Any],
    save: str,
    compile: bool,
) -> Tensor:
    """Return the values of `y`; in the backward, `x` receives what the rule makes of the gradient.

    Args:
        y: The output of the operation.
        x: Its input.
        rule: The rule.
        site: The name of the place in the model, for error messages.
        parameters: The rule's parameters, all of them.
        save: What is saved where the rule reads ``x``: ``"x"``; ``"mask"``, its mask alone; ``"y"``, the output, which
            is positive where ``x`` is; ``"overwritten"``, ``x``, which has become the output.
        compile: Whether the backward is to run as one kernel in eager mode.

    Raises:
        RuleError: The rule asks of ``x`` more than what is saved tells.
    """
    if save in ("y", OVERWRITTEN) and not rule.declaration.reads_sign:
        raise RuleError(
            f"rule {rule.name!r} at site {site!r} asks now for more of x than where it is positive, which is all that "
            f"the graph has kept: it was registered anew since. Transform the original model again."
        )
    if is_compiling():
        refuse_compiled_transform()
        tensors, numbers, call = operands(rule, site, parameters, save)
        if call and all(isinstance(value, Tensor) for value in tensors):
            return torch.ops.freegrad_fx.decoupled(y, x, tensors, numbers, call)  # type: ignore[no-any-return]
    elif not function_transforms_active():
        # a tensor may have escaped from a transform that is over
        y, x = without_dead_transform(y), without_dead_transform(x)
        return apply(y, x, Call(rule, site, parameters, save, compile))  # type: ignore[no-any-return]
    values = tuple(_distinct(x, parameters.values()))
    return Composable.apply(y, x, rule, site, save, tuple(parameters), values)  # type: ignore[no-any-return, no-untyped-call]


def _distinct(x: Tensor, values: Iterable[Any]) -> Iterable[Any]:
    """The values, none of them a tensor that was there before: torch.compile takes none twice for one Function."""
    if not is_compiling():
        return values
    found: list[Any] = [x]
    for value in values:
        twice = isinstance(value, Tensor) and any(value is other for other in found)
        found.append(value.detach() if twice else value)
    return found[1:]
