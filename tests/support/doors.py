"""The four ways in: the transform of a symbolic trace and of an export, `fg.compile`, and a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import freegrad_fx as fg

Door = Callable[[nn.Module, Any, tuple[Tensor, ...]], Callable[..., Any]]


def symbolic(model: nn.Module, rules: Any, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    return fg.transform(model, rules).train(model.training)


def exported(model: nn.Module, rules: Any, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    return fg.transform(model, rules, example_inputs=inputs).train(model.training)


def compiled(model: nn.Module, rules: Any, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return fg.compile(model, rules, backend="eager")


def in_a_block(model: nn.Module, rules: Any, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    def call(*args: Tensor) -> Any:
        with fg.use(rules, model=model):
            return model(*args)

    return call


DOORS: dict[str, Door] = {
    "symbolic": symbolic, "exported": exported, "compiled": compiled, "in a block": in_a_block,
}  # fmt: skip
