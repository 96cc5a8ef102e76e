"""What tensors and the nodes of their autograd graphs know of themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .releases import uses_private_names

__all__ = ["empty_like_gradient", "mark_as_parameter", "version"]


def version(tensor: Tensor) -> int:
    """How often a tensor was written into; not to be asked of a tensor of inference mode."""
    return tensor._version


def mark_as_parameter(tensor: Tensor) -> None:
    """Let a tensor be an `nn.Parameter` for code that asks for one."""
    tensor._is_param = True


@uses_private_names("jvp")
def empty_like_gradient(node: Any) -> Tensor:
    """A tensor with the shape, dtype and device of the gradient that a node of an autograd graph is given."""
    like = node._input_metadata[0]
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
