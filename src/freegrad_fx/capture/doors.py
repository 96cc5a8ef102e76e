"""The ways to capture a model, for errors: an error names only a way that takes the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._torch import tree
from ..errors import CaptureError
from .copying import structural_copy
from .outside import Outside
from .patches.random import RandomState
from .refusal import NotExportedError
from .symbolic import capture_symbolically, open_arguments

__all__ = ["COMPILE", "with_remedy"]

COMPILE = "Compile the model with freegrad_fx.compile(model, rules), which accepts any program"
"""The way that takes every program."""


def with_remedy(
    error: NotExportedError, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> CaptureError:
    """The error with the way that takes the model.

    Args:
        error: The reason.
        model: The model.
        args: The positional example inputs.
        kwargs: The example inputs by name.
    """
    if error.__cause__ is not None and (text := _raised_natively(model, args, kwargs)):
        return CaptureError(
            f"{type(model).__name__} does not take the example inputs: called with them, it raises {text}. Give "
            f"example inputs that the model takes in train mode and in eval mode."
        )
    remedy = COMPILE
    if error.symbolic:
        opened = open_arguments(model, args, kwargs)
        if _is_traced(model, opened):
            given = ", ".join(f"{name!r}: torch.fx.PH" for name in opened)
            options = f", with concrete_args={{{given}}}" if opened else ""
            remedy = (
                f"Transform the model without example_inputs{options}, because symbolic tracing keeps it; or compile "
                f"it with freegrad_fx.compile(model, rules)"
            )
    instead = f"; or {error.instead}" if error.instead else ""
    return CaptureError(f"{error} {remedy}{instead}.")


def _raised_natively(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What a model itself raises when it is called with the example inputs, in either mode; ``""`` for nothing."""
    random, outside = RandomState(), Outside(model, model)
    try:
        for training in (True, False):
            try:
                called = copy.deepcopy(model)  # the forward can write into parameters
            except Exception:  # as attributes can be of any class
                return ""
            for module in called.modules():
                module.training = training  # not called.train(), which a model can override
            given, named = tree.map_leaves(_own, (args, dict(kwargs)))
            try:
                with random.watching(), torch.no_grad():
                    called(*given, **named)
            except Exception as error:
                mode = "train" if training else "eval"
                text = str(error).strip().partition("\n")[0][:300].rstrip(".")
                return f"{type(error).__name__} in {mode} mode: {text}"
    finally:
        random.restore()
        outside.put_back()
    return ""


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _is_traced(model: nn.Module, opened: tuple[str, ...]) -> bool:
    """Whether symbolic tracing takes a model."""
    PH: Any = fx.PH  # type: ignore[attr-defined]
    try:
        capture_symbolically(model, structural_copy(model), (), dict.fromkeys(opened, PH))
    except Exception:  # as the trace runs the model's code
        return False
    return True
