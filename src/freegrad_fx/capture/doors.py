"""The ways to capture a model, for errors: an error names only a way that takes the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ..errors import CaptureError
from .copying import structural_copy
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


def _is_traced(model: nn.Module, opened: tuple[str, ...]) -> bool:
    """Whether symbolic tracing takes a model."""
    PH: Any = fx.PH  # type: ignore[attr-defined]
    try:
        capture_symbolically(model, structural_copy(model), (), dict.fromkeys(opened, PH))
    except Exception:  # as the trace runs the model's code
        return False
    return True
