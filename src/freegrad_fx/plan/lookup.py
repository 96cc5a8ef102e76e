"""`report`: finds the plan of a transformed or compiled model, also inside wrappers."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._torch.modules import children_of, compiled_model
from .plan import Plan

__all__ = ["PLAN", "report"]

PLAN = "_freegrad_fx_plan"
"""The attribute that holds the plan, or a function that returns it."""


def report(model: Any) -> Plan:
    """Return the plan of a model: for every site, what was decided and why.

    Args:
        model: The result of `transform` or `compile`, also wrapped by `torch.compile` or `DataParallel`, or a
            `backend`.

    Returns:
        The plan. ``print`` it, show it in a notebook, or call ``to_dict()``. The plan of compiled code grows as graphs
        are captured.

    Raises:
        TypeError: `model` is none of these.
        PlanError: `model` is compiled, and has not been called yet.
    """
    found, wrapped = None, model
    while found is None and wrapped is not None:
        found = getattr(wrapped, "__dict__", {}).get(PLAN)
        wrapped = _wrapped_by(wrapped)
    plan = found() if callable(found) else found
    if not isinstance(plan, Plan):
        raise TypeError(
            f"report() takes the result of transform() or compile(), or a backend, got {type(model).__name__}. A "
            f"second trace of a transformed model keeps its rules, but not its report."
        )
    return plan


def _wrapped_by(model: Any) -> nn.Module | None:
    """The model inside a wrapper such as those of torch.compile and DataParallel; None for other modules."""
    if not isinstance(model, nn.Module) or len(children_of(model)) != 1:
        return None
    return compiled_model(model) or children_of(model).get("module")
