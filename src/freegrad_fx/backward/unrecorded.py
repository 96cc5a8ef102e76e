"""The gradient of a rule in a backward that nothing records: without a node of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._torch.dispatch import function_transforms_active, runs_alone
from ..core.contract import OF_MASK
from ..core.rule import Rule
from .functions import Call, gradient
from .observing import observers_of_now
from .several import answers_for_several

__all__ = ["gradient_of"]


class _Context(NamedTuple):
    """What `gradient` reads of the context of a Function."""

    call: Call
    like: tuple[torch.Size, torch.dtype]
    saved_tensors: tuple[Tensor, ...]


def gradient_of(rule: Rule, site: str, grad: Tensor, y: Tensor, x: Tensor) -> Tensor | None:
    """The gradient that a rule gives `x`; None if that takes a node.

    Args:
        rule: The rule.
        site: The name of the site, for errors.
        grad: The gradient of `y`.
        y: The output of the operation.
        x: Its input.
    """
    inputs, values = rule.declaration.inputs, dict(rule.values)
    if (
        not runs_alone(grad)
        or type(x) not in (Tensor, nn.Parameter)
        or any(name not in ("x", "y") for name in inputs)
        or rule.save in OF_MASK
        or answers_for_several(rule.declaration, values)
        or observers_of_now()
        or function_transforms_active()
    ):
        return None
    saved = tuple((x if name == "x" else y).detach() for name in inputs)
    call = Call(rule, site, values, rule.save, rule.compile)
    return gradient(_Context(call, (x.shape, x.dtype), saved), grad)
