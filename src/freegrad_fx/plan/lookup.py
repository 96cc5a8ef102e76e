"""`report`: finds the plan that was carried out on a model, in whatever wraps it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._torch.modules import children_of, compiled_model
from .plan import Plan

__all__ = ["PLAN", "report"]

PLAN = "_freegrad_fx_plan"
"""The attribute that holds what was done, or a function that tells it."""


def report(model: Any) -> Plan:
    """What was rewritten, what was not, and why.

    Args:
        model: What `transform` or `compile` returned, also wrapped by `torch.compile` or `DataParallel`, or a
            `backend`.

    Returns:
        The plan that was carried out: ``print`` it, show it in a notebook, or take ``to_dict()``. That of compiled code
        grows as graphs are captured.

    Raises:
        TypeError: `model` comes from none of these.
        PlanError: Of compiled code, nothing has run yet.
    """
    found, wrapped = None, model
    while found is None and wrapped is not None:
        found = getattr(wrapped, "__dict__", {}).get(PLAN)
        wrapped = _wrapped_by(wrapped)
    plan = found() if callable(found) else found
    if not isinstance(plan, Plan):
        raise TypeError(
            f"report() takes what transform() or compile() returned, or a backend, got {type(model).__name__}. A "
            f"second trace of a transformed model keeps its rules, but not the report."
        )
    return plan


def _wrapped_by(model: Any) -> nn.Module | None:
    """The model that torch.compile, DataParallel and their kin have wrapped."""
    if not isinstance(model, nn.Module) or len(children_of(model)) != 1:
        return None
    return compiled_model(model) or children_of(model).get("module")
