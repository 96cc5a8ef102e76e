"""Random numbers for rules. Knows no rule."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from .._torch.dynamo import is_compiling, takes_for_constant, tracing_context

__all__ = ["normal_like", "uniform_like"]


def uniform_like(tensor: Tensor) -> Tensor:
    """Numbers from U(0, 1), in the shape and dtype of a tensor."""
    if not _is_slow(tensor):
        return torch.rand_like(tensor)
    return torch.ops.freegrad_fx.uniform_like(tensor, _number())  # type: ignore[no-any-return]


def normal_like(tensor: Tensor) -> Tensor:
    """Numbers from N(0, 1), in the shape and dtype of a tensor."""
    if not _is_slow(tensor):
        return torch.randn_like(tensor)
    return torch.ops.freegrad_fx.normal_like(tensor, _number())  # type: ignore[no-any-return]


def _is_slow(tensor: Tensor) -> bool:
    """Whether Inductor's own generator would be used, which on a CPU takes several times as long as PyTorch's."""
    return is_compiling() and tensor.device.type == "cpu"


_draws: weakref.WeakKeyDictionary[Any, itertools.count[int]] = weakref.WeakKeyDictionary()
_other_draws = itertools.count()


@takes_for_constant
def _number() -> int:
    """A number for every draw of a program: AOTAutograd would make one draw of two that look the same."""
    context = tracing_context()
    return next(_other_draws if context is None else _draws.setdefault(context, itertools.count()))


# Operators that no compiler looks into
_library: Any = torch.library.Library("freegrad_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _draw in {"uniform_like": torch.rand_like, "normal_like": torch.randn_like}.items():
    _schema = f"{_name}(Tensor self, int draw) -> Tensor"
    _library.define(_schema, tags=torch.Tag.nondeterministic_seeded)
    _library.impl(_name, lambda x, _, draw=_draw: draw(x), "CompositeExplicitAutograd")
    fake = f"freegrad_fx::{_name}"
    torch.library.register_fake(fake, lambda x, _: torch.empty_like(x), lib=_library)
