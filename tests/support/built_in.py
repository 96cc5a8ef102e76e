"""The built-in rules as their modules declare them: their names, and the parameter values that they are tested with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import freegrad_fx as fg

__all__ = ["BUILT_IN", "EXAMPLES", "MASKED", "OF_OPERANDS", "examples_of", "saved_by"]

_RULES = [rule for rule in vars(fg.rules).values() if isinstance(rule, fg.Rule)]

BUILT_IN = [rule.name for rule in _RULES if not rule.declaration.needs_operation]
"""The rules of one input."""

OF_OPERANDS = [rule.name for rule in _RULES if rule.declaration.needs_operation]
"""The rules that use the operands of an operation."""

MASKED = [
    name
    for name in BUILT_IN
    if fg.get(name).declaration.mask is not None and fg.get(name).declaration.mask_bits == 1
]
"""The rules that read x only through a mask of booleans."""


def examples_of(name: str) -> list[dict[str, Any]]:
    """The values that `register(examples=...)` declares for the parameters of a rule; the first are the defaults."""
    return [{}, *map(dict, fg.get(name).declaration.examples)]


EXAMPLES = [(name, values) for name in BUILT_IN for values in examples_of(name)]
"""Every built-in rule with its defaults, and with the values that it declares."""


def saved_by(rule: fg.Rule) -> tuple[list[str], Tensor]:
    """Which of x and y the decoupled operation keeps for its backward, and the gradient that it then gives."""
    leaf = torch.randn(4, requires_grad=True)
    x, y = leaf * 1, torch.randn(4)
    names = {x.data_ptr(): "x", y.data_ptr(): "y"}
    kept: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(names.get(tensor.data_ptr(), "something else"))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = fg.ops.decoupled(y, x, rule=rule)
    out.sum().backward()
    return kept, leaf.grad
