"""How much of the information in a parameter a replacement forward keeps: the ratio of signal to noise."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.rule import Forward
from ..vocabulary.activations import OPS
from .decision import Decision
from .plan import Plan

__all__ = ["with_noise"]


def with_noise(plan: Plan, model: nn.Module | None) -> Plan:
    """A plan whose parameters with a replaced forward have their ratio of signal to noise.

    Args:
        plan: The plan.
        model: The model that holds the parameters; None leaves the plan unchanged.
    """
    if model is None or not any(map(_is_replaced, plan.decisions)):
        return plan
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return replace(plan, decisions=tuple(_measured(d, parameters) for d in plan.decisions))


def _is_replaced(decision: Decision) -> bool:
    return decision.site.kind == "parameter" and decision.forward is not None


def _measured(decision: Decision, parameters: Mapping[str, Tensor]) -> Decision:
    value = parameters.get(decision.site.name) if _is_replaced(decision) else None
    if value is None or decision.forward is None or type(value) not in (Tensor, nn.Parameter):
        return decision
    if value.is_meta or not value.is_floating_point():
        return decision
    return replace(decision, snr=_snr(value.detach(), decision.forward))


def _snr(value: Tensor, forward: Forward) -> float | None:
    """``10·log10(Σw² / Σ(w − f(w))²)``; None if it is not defined."""
    function: Any = OPS[forward].function if isinstance(forward, str) else forward
    devices = [value.device] if value.is_cuda else []
    # A forward that draws numbers must not change those that the model draws
    with torch.no_grad(), torch.random.fork_rng(devices), contextlib.suppress(Exception):
        wide = value.double()
        noise = float((wide - function(value.clone()).double()).square().sum())
        signal = float(wide.square().sum())
        if math.isfinite(signal) and math.isfinite(noise) and signal > 0:
            return 10 * math.log10(signal / noise) if noise > 0 else math.inf
    return None
