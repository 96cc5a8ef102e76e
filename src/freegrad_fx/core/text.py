"""Parameter values and functions as text on one line."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["shown"]


def shown(value: Any) -> str:
    """Format a parameter value or a forward on one line."""
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, torch.nn.Parameter) and not value.is_meta
        return f"tensor({value.item()})" if plain and not value.dim() else f"tensor{[*value.shape]}"
    if isinstance(value, torch.Generator):
        return f"generator on {value.device}"
    if type(value) is functools.partial:
        given = [*map(shown, value.args), *(f"{k}={shown(v)}" for k, v in value.keywords.items())]
        return f"partial({', '.join([shown(value.func), *given])})"
    name = getattr(value, "__name__", "")
    if name and getattr(torch, name, None) is value:
        return f"torch.{name}"  # their qualified names begin with a private class
    return getattr(value, "__qualname__", None) or repr(value)
