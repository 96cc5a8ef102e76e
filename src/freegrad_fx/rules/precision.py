"""Arithmetic of rules in at least single precision, and its constants. Does not know any rule."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["bump", "constant", "per_row", "times", "wide"]


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


def constant(value: float, like: Tensor) -> float | Tensor:
    """A number for an operation with a tensor, in a form that small tensors take faster and that gives the same bits.

    PyTorch makes a tensor of each number that it is given, which takes longer than the operation on a small tensor.
    Lower precisions compute with the number itself, not with its value in their precision.
    """
    usual = like.is_cpu and like.dtype in (torch.float32, torch.float64)
    return _constant(value, like.dtype) if usual and 1e-30 < abs(value) < 1e30 else value


@functools.lru_cache(maxsize=1024)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, device="cpu")
