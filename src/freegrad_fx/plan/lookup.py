"""`report`: finds the plan of a transformed or compiled model, also inside wrappers and behind `torch.compile`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import fx, nn

from .._torch.dynamo import backend_of
from .._torch.modules import children_of, compiled_model
from ..capture.captured import CapturedModule
from ..capture.rule_parameters import PLAN, calls_by_site, in_force
from .noise import with_noise
from .plan import Plan

__all__ = ["PLAN", "layers_of", "report"]


def report(model: Any) -> Plan:
    """Return the plan of a model: for every site, what was decided and why.

    Args:
        model: The result of `transform` or `compile`, also wrapped by `torch.compile` or `DataParallel`; a `backend`;
            or what is compiled with one, by `torch.compile` or by its own method `compile`.

    Returns:
        The plan. ``print`` it, show it in a notebook, or call ``to_dict()``. The plan of compiled code grows as graphs
        are captured.

    Raises:
        TypeError: `model` is none of these.
        PlanError: `model` is compiled, and has not been called yet.
    """
    layers = [*layers_of(model)]
    for layer in layers:
        found = getattr(layer, "__dict__", {}).get(PLAN)
        plan = found() if callable(found) else found
        if isinstance(plan, Plan):
            plan = _in_force(plan, layer) if isinstance(layer, CapturedModule) else plan
            return with_noise(plan, _as_module(layers[-1]))
    for layer in layers:
        found = getattr(backend_of(layer), "__dict__", {}).get(PLAN)
        if callable(found):
            inner = _as_module(layers[-1])
            return with_noise(found(inner), inner)
    raise TypeError(
        f"report() takes the result of transform() or compile(), or a backend, got {_described(model)}"
    )


def _as_module(model: Any) -> nn.Module | None:
    return model if isinstance(model, nn.Module) else None


def layers_of(model: Any) -> Iterator[Any]:
    """A model, and the models inside of its wrappers."""
    layer = model
    while layer is not None:
        yield layer
        layer = _wrapped_by(layer)


def _described(model: Any) -> str:
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    if isinstance(model, type):
        return f"the class {name}. Give the transformed model."
    if isinstance(model, fx.GraphModule):
        return f"{name}. A second trace of a transformed model keeps its rules, but not its report."
    if not isinstance(model, nn.Module):
        return f"{name}."
    if backend_of(model) is not None:
        return (
            f"{name}, which is compiled with another backend. Compile with freegrad_fx.compile(model, rules), or give "
            f"freegrad_fx.backend(rules) to torch.compile."
        )
    return (
        f"{name}, which neither of them returned. They do not change the model that they are given: give report() what "
        f"they return, or preview the rules with freegrad_fx.explain(model, rules)."
    )


def _in_force(plan: Plan, model: CapturedModule) -> Plan:
    """A plan with the values of the parameters of rules that the model has now."""
    values = calls_by_site(model)
    decisions = tuple(
        replace(d, rules=rules)
        if d.action == "rewrite"
        and (rules := in_force(model, values, d.site.name, d.rules)) is not d.rules
        else d
        for d in plan.decisions
    )
    same = all(a is b for a, b in zip(decisions, plan.decisions, strict=True))
    return plan if same else replace(plan, decisions=decisions)


def _wrapped_by(model: Any) -> nn.Module | None:
    """The model inside a wrapper such as those of torch.compile and DataParallel; None for other modules."""
    if not isinstance(model, nn.Module) or len(children_of(model)) != 1:
        return None
    return compiled_model(model) or children_of(model).get("module")
