"""Attributes of tensors and of the nodes of autograd graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.amp import GradScaler

from .releases import private, uses_private_names

__all__ = [
    "empty_like_gradient",
    "gradient_is_read",
    "mark_as_parameter",
    "saving",
    "saving_hooks",
    "scale_of",
    "version",
    "viewed",
]


def version(tensor: Tensor) -> int:
    """The number of writes into a tensor. Raises `RuntimeError` for tensors of inference mode."""
    return tensor._version


def viewed(tensor: Tensor) -> Tensor | None:
    """The tensor of which a tensor is a view that autograd tracks; None for other tensors."""
    return tensor._base


def gradient_is_read(tensor: Tensor) -> bool:
    """Whether a tensor that is no leaf has hooks for its gradient, or keeps it."""
    return bool(tensor._backward_hooks) or tensor.retains_grad


def mark_as_parameter(tensor: Tensor) -> None:
    """Make `isinstance(tensor, nn.Parameter)` true for a tensor."""
    tensor._is_param = True


@uses_private_names("jvp")
def empty_like_gradient(node: Any) -> Tensor:
    """A tensor with the shape, dtype and device of the gradient that a node of an autograd graph receives."""
    like = node._input_metadata[0]
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


@uses_private_names("unscaled() with a GradScaler")
def scale_of(scaler: GradScaler) -> Tensor | None:
    """The tensor in which a scaler keeps its scale; None if it is not enabled."""
    if not scaler.is_enabled():
        return None
    scaler.scale(torch.zeros((), device=scaler._device))  # makes the tensor if there is none yet
    return scaler._scale


_SAVED, _RAW = "_saved_", "_raw_saved_"
_saved_by: dict[type, tuple[str, ...]] = {}

_default_hooks = private(
    "torch._C._autograd._top_saved_tensors_default_hooks", "packing what autograd saves"
)

SetHooks: TypeAlias = Callable[[Callable[[Tensor], Any], Callable[[Any], Tensor]], None]
"""Sets the functions that pack and unpack one saved tensor. The first one is called at once."""


def saving_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The hooks that pack and unpack what is saved now, such as those of a checkpoint; None if there are none."""
    hooks: tuple[Callable[..., Any], Callable[..., Any]] | None = _default_hooks(True)
    return hooks


def saving(node: Any) -> Iterator[tuple[Tensor, SetHooks]]:
    """The tensors that a node of an autograd graph has saved, each with what sets hooks for it.

    Args:
        node: A node of an autograd graph. That of a Function in Python gives nothing.
    """
    names = _saved_by.get(type(node))
    if names is None:
        attributes = {*dir(node)}
        found = (n.removeprefix(_SAVED) for n in attributes if n.startswith(_SAVED))
        names = tuple(name for name in found if _RAW + name in attributes)
        _saved_by[type(node)] = names
    for name in names:
        tensor = getattr(node, _SAVED + name)
        if isinstance(tensor, Tensor):
            yield tensor, getattr(node, _RAW + name).register_hooks
