"""The four ways in: the transform of a symbolic trace and of an export, `fg.compile`, and a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import freegrad_fx as fg

Inputs = tuple[Tensor, ...] | dict[str, Any]
Door = Callable[[nn.Module, Any, Inputs], Callable[..., Any]]


def symbolic(model: nn.Module, rules: Any, inputs: Inputs) -> Callable[..., Any]:
    return fg.transform(model, rules).train(model.training)


def exported(model: nn.Module, rules: Any, inputs: Inputs) -> Callable[..., Any]:
    return fg.transform(model, rules, example_inputs=inputs).train(model.training)


def compiled(model: nn.Module, rules: Any, inputs: Inputs) -> Callable[..., Any]:
    torch._dynamo.reset()
    return fg.compile(model, rules, backend="eager")


def model_compiled(model: nn.Module, rules: Any, inputs: Inputs) -> Callable[..., Any]:
    """The model itself, compiled with the rules: no door of `DOORS`, as it changes the model."""
    torch._dynamo.reset()
    model.compile(backend=fg.backend(rules, "eager"))
    return model


def in_a_block(model: nn.Module, rules: Any, inputs: Inputs) -> Callable[..., Any]:
    def call(*args: Tensor, **named: Any) -> Any:
        with fg.use(rules, model=model):
            return model(*args, **named)

    return call


DOORS: dict[str, Door] = {
    "symbolic": symbolic, "exported": exported, "compiled": compiled, "in a block": in_a_block,
}  # fmt: skip
