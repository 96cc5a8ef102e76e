"""Attributes of tensors and of the nodes of autograd graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from .releases import uses_private_names

__all__ = [
    "empty_like_gradient",
    "gradient_is_read",
    "mark_as_parameter",
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
