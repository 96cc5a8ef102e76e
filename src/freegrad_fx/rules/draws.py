"""Random numbers for rules. Knows no rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["normal_like", "uniform_like"]


def uniform_like(tensor: Tensor) -> Tensor:
    """Numbers from U(0, 1), in the shape and dtype of a tensor."""
    return (
        torch.ops.freegrad_fx.uniform_like(tensor) if _is_slow(tensor) else torch.rand_like(tensor)
    )


def normal_like(tensor: Tensor) -> Tensor:
    """Numbers from N(0, 1), in the shape and dtype of a tensor."""
    return (
        torch.ops.freegrad_fx.normal_like(tensor) if _is_slow(tensor) else torch.randn_like(tensor)
    )


def _is_slow(tensor: Tensor) -> bool:
    """Whether Inductor's own generator would be used, which on a CPU takes several times as long as PyTorch's."""
    return torch.compiler.is_compiling() and tensor.device.type == "cpu"


# Operators that no compiler looks into; with them compiled code draws the numbers that uncompiled code would
_library: Any = torch.library.Library("freegrad_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _draw in {"uniform_like": torch.rand_like, "normal_like": torch.randn_like}.items():
    _library.define(f"{_name}(Tensor self) -> Tensor", tags=torch.Tag.nondeterministic_seeded)
    _library.impl(_name, lambda x, draw=_draw: draw(x), "CompositeExplicitAutograd")
    torch.library.register_fake(f"freegrad_fx::{_name}", torch.empty_like, lib=_library)
