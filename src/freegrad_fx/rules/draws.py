"""Random numbers for rules, in eager mode and under `torch.compile`. Does not know any rule."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from .._torch.dynamo import is_compiling, takes_for_constant, tracing_context
from ..errors import RuleError

__all__ = ["normal_like", "uniform_like"]


def uniform_like(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw from U(0, 1), with the shape and dtype of a tensor.

    Args:
        tensor: The tensor.
        generator: What to draw from; None for the global generator.

    Raises:
        RuleError: The generator is for another device.
    """
    if generator is not None:
        return torch.rand(tensor.shape, generator=generator, **_like(tensor, generator))
    if not _is_slow(tensor):
        return torch.rand_like(tensor)
    return torch.ops.freegrad_fx.uniform_like(tensor, _number())  # type: ignore[no-any-return]


def normal_like(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw from N(0, 1), with the shape and dtype of a tensor; see `uniform_like`."""
    if generator is not None:
        return torch.randn(tensor.shape, generator=generator, **_like(tensor, generator))
    if not _is_slow(tensor):
        return torch.randn_like(tensor)
    return torch.ops.freegrad_fx.normal_like(tensor, _number())  # type: ignore[no-any-return]


def _like(tensor: Tensor, generator: torch.Generator) -> dict[str, Any]:
    if generator.device.type != tensor.device.type:
        raise RuleError(
            f"the generator of a rule is for {generator.device}, and the gradient is on {tensor.device}. Give the rule "
            f"torch.Generator(device={tensor.device.type!r}), or leave out generator= to use the global one."
        )
    return {"dtype": tensor.dtype, "device": tensor.device}


def _is_slow(tensor: Tensor) -> bool:
    """Return whether Inductor would generate the numbers on a CPU, which takes several times as long as PyTorch."""
    return is_compiling() and tensor.device.type == "cpu"


_draws: weakref.WeakKeyDictionary[Any, itertools.count[int]] = weakref.WeakKeyDictionary()
_other_draws = itertools.count()


@takes_for_constant
def _number() -> int:
    """Return another number for each draw of a program: AOTAutograd would merge two draws with equal arguments."""
    context = tracing_context()
    return next(_other_draws if context is None else _draws.setdefault(context, itertools.count()))


# Operators that compilers do not trace into
_library: Any = torch.library.Library("freegrad_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _draw in {"uniform_like": torch.rand_like, "normal_like": torch.randn_like}.items():
    _schema = f"{_name}(Tensor self, int draw) -> Tensor"
    _library.define(_schema, tags=torch.Tag.nondeterministic_seeded)
    _library.impl(_name, lambda x, _, draw=_draw: draw(x), "CompositeExplicitAutograd")
    fake = f"freegrad_fx::{_name}"
    torch.library.register_fake(fake, lambda x, _: torch.empty_like(x), lib=_library)
