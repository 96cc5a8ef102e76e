"""Checks the forwards that entries put in the place of those of operations and parameters."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..core.rule import Forward
from ..core.text import shown
from ..errors import PlanError
from ..graph.aliasing import named_in_place, of_library
from ..sites.site import Located, LocatedOperation
from ..table import Entry

__all__ = ["check_learnt", "check_replaceable"]


def check_learnt(place: Located, entry: Entry) -> None:
    """Raise `PlanError` if a forward uses a tensor that a rule learns, in a way that cannot be separated from the rule.

    The tensor would get the gradient of the forward in addition to that of the rule. Arguments that are bound with
    `functools.partial` are detached.
    """
    function: Any = entry.forward
    while isinstance(function, functools.partial):
        function = function.func
    code, held = getattr(function, "__code__", None), getattr(function, "__self__", None)
    values = [
        *(getattr(function, "__defaults__", None) or ()),
        *(getattr(function, "__kwdefaults__", None) or {}).values(),
        *(cell.cell_contents for cell in getattr(function, "__closure__", None) or ()),
        *(function.__globals__.get(name) for name in (code.co_names if code else ())),
        *vars(held if hasattr(held, "__dict__") else types.SimpleNamespace()).values(),
    ]
    for rule in entry.rules or ():
        for name, tensor in rule.learnt.items():
            if any(value is tensor for value in values):
                raise PlanError(
                    f"rule {rule.name!r} gives a gradient to its parameter {name!r}, and the forward "
                    f"{shown(function)} uses the same tensor as a variable, which would give it a second one, at site "
                    f"{place.site.name}. Let the forward take the tensor as an argument: "
                    f"forward=functools.partial(function, {name}=tensor)."
                )


def _works_in_place(forward: Callable[..., Tensor]) -> bool:
    """Whether a function of torch works in place, by its name or by a bound `inplace=True`."""
    function: Any = forward
    while isinstance(function, functools.partial):
        if function.keywords.get("inplace", False):
            return True
        function = function.func
    return of_library(function) and named_in_place(getattr(function, "__name__", ""))


def check_replaceable(place: Located, forward: Forward) -> None:
    """Raise `PlanError` if `forward` cannot replace the forward of a site."""
    where = f"site {place.site.name} ({place.site.spelling})"
    if isinstance(forward, nn.Module | type):
        kind = "class" if isinstance(forward, type) else "module"
        raise PlanError(
            f"a forward must be a function of a tensor, got the {kind} {forward!r}, at {where}. Its parameters and "
            f"mode would not belong to the model. Give a function, such as torch.tanh."
        )
    if not isinstance(forward, str) and _works_in_place(forward):
        raise PlanError(
            f"the forward {shown(forward)} works in place, so it would overwrite a tensor of the model, at {where}. "
            f"Give the out-of-place function: torch.relu instead of torch.relu_."
        )
    several = place.op is not None and len(place.op.operands) > 1
    if several and isinstance(place, LocatedOperation) and place.compound is not None:
        raise PlanError(
            f"forward={forward!r} replaces one call, but the model computes {place.site.op} in several calls, at "
            f"{where}. Leave out forward=, or write one call in the model."
        )
    if place.op is not None and not place.op.keeps_shape:
        raise PlanError(
            f"forward={forward!r} keeps the shape, but {place.op.name} changes it, at {where}. Keep the forward of "
            f"{place.op.name}."
        )
