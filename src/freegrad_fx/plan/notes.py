"""Remarks on what rules and forwards do at a site, from what the rules and the vocabulary declare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..capture import Capture
from ..core.rule import Forward, Rule
from ..sites.remarks import Remark
from ..sites.site import REPLACE, Located, LocatedOperation, LocatedParameter
from ..sites.steps import find_steps
from ..vocabulary.activations import OPS
from .decision import Decided

__all__ = ["remark_on", "steps_left"]


def remark_on(place: Located, rules: Sequence[Rule], forward: Forward | None) -> str:
    """What the rules and the forward of a site do there that may not be meant, as a clause; ``""`` if there is nothing.

    Args:
        place: The site.
        rules: The rules that it gets.
        forward: The forward that it gets, or None.
    """
    replaces = place.op is not None and forward is None and place.site.at == REPLACE
    found = _elsewhere(place.op.name, rules) if replaces and place.op is not None else []
    if isinstance(place, LocatedParameter) and isinstance(forward, str):
        found += _zero(place.tensor, forward)
    return "; ".join(found)


def _elsewhere(op: str, rules: Sequence[Rule]) -> list[str]:
    return [
        f"rule {rule.name!r} is meant for {' and '.join(rule.declaration.meant_for)}; its formula, {rule.formula}, "
        f"replaces the derivative of {op}"
        for rule in rules
        if rule.declaration.meant_for and op not in rule.declaration.meant_for
    ]


def _zero(tensor: Tensor, forward: str) -> list[str]:
    bound = OPS[forward].zero_below
    known = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel()
    if not bound or not known or not tensor.is_floating_point():
        return []
    with torch.no_grad():
        zero = bool((tensor.abs() < bound).all())
    reason = f"all entries have a magnitude below {bound}, so that forward={forward!r} makes each of them 0"
    return [f"{reason}; scale them first, with a function as the forward"] if zero else []


def steps_left(capture: Capture, decided: Sequence[Decided]) -> tuple[Remark, ...]:
    """The steps that a model computes as comparisons, and that no entry decides.

    Args:
        capture: The captured model.
        decided: For each of its graphs, the sites with their decisions.
    """
    found: dict[Remark, None] = {}
    for variant, pairs in zip(capture.variants, decided, strict=True):
        others = {
            place.node
            for place, decision in pairs
            if isinstance(place, LocatedOperation) and place.step and decision.entry is not None
        }
        found.update(dict.fromkeys(find_steps(variant.graph, capture.root, others)))
    return tuple(found)
