"""What the sites of a plan keep for the backward, counted by running the captured model on its example inputs."""

from __future__ import annotations

import warnings
from dataclasses import replace

from torch import nn

from .capture.examples import map_tensors, twin
from .counted import count
from .plan import Plan
from .verification import Inputs, undisturbed

__all__ = ["with_memory"]


def with_memory(plan: Plan, model: nn.Module, captured: nn.Module, inputs: Inputs) -> Plan:
    """A plan that says what is kept for the backward, in total, by site and by entry.

    Everything that the calls change is put back.

    Args:
        plan: The plan. It is returned unchanged if no site of it has rules.
        model: The model, in the mode in which it is counted.
        captured: The model with the rules of the plan.
        inputs: The example inputs.
    """
    if not plan.with_action("rewrite"):
        return plan
    try:
        with undisturbed(model, captured), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args, keywords = map_tensors((inputs.args, dict(inputs.kwargs)), twin)
            sites, total = count(captured, args, keywords)
    except Exception as error:  # of the model, or too little memory
        return replace(plan, uncounted=f"{type(error).__name__}: {error}".rstrip("."))
    decisions = tuple(replace(d, memory=sites.get(d.site.name)) for d in plan.decisions)
    return replace(plan, decisions=decisions, memory=total)
