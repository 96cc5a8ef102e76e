"""Arithmetic of rules in at least single precision. Does not know any rule."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bump", "per_row", "times", "wide"]


def wide(tensor: Tensor) -> Tensor:
    """A tensor in at least float32: squares and sums of large entries overflow in float16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def times(grad: Tensor, factor: Tensor, x: Tensor | None = None) -> Tensor:
    """grad·factor, in the dtype of the gradient, or of `x` if that is wider."""
    dtype = grad.dtype if x is None else torch.promote_types(grad.dtype, x.dtype)
    return (grad * factor).to(dtype)


def bump(z: Tensor) -> Tensor:
    """σ(z)·(1 − σ(z)), which is 0 for large |z|, where 1 − σ(z) would lose its digits and eᶻ would overflow."""
    return torch.sigmoid(z) * torch.sigmoid(-z)


def per_row(tensor: Tensor) -> tuple[int, ...]:
    """The dims over which an output channel of a weight extends: 1…, or all if there are fewer than two."""
    return tuple(range(tensor.dim() > 1, tensor.dim()))
