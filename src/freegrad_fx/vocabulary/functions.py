"""Functions of operands, for the operations that PyTorch computes by several functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "batch_normalised",
    "convolution",
    "divided",
    "layer_normalised",
    "multiplied",
    "pool",
    "power",
    "product",
    "rms_normalised",
    "total",
]


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str,
    padding_mode: str = "zeros",
    **constants: Any,
) -> Tensor:
    """A convolution.

    Args:
        input: The input.
        weight: The weight.
        bias: The bias.
        kind: The name of the function in `torch`.
        padding_mode: How the input is padded; see `nn.Conv2d`.
        **constants: The further arguments of the function.
    """
    if padding_mode != "zeros":
        padding = _padded(constants.pop("padding"), weight.shape[2:], constants["dilation"])
        input = F.pad(input, padding, mode=padding_mode)
    return getattr(torch, kind)(input, weight, bias, **constants)  # type: ignore[no-any-return]


def _padded(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """The argument of `F.pad` for the padding of a convolution, which begins with the last dimension."""
    found: list[int] = []
    for axis in reversed(range(len(kernel))):
        if isinstance(padding, str):  # "same" or "valid"
            both = dilation[axis] * (kernel[axis] - 1) if padding == "same" else 0
            found += [both // 2, both - both // 2]
        else:
            found += [padding[axis]] * 2
    return found


def product(input: Tensor, other: Tensor, *, alpha: float = 1, equation: str = "") -> Tensor:
    """A product of matrices, times a number; `torch.addmm` adds it to a matrix. Or that of an equation of `einsum`."""
    if equation:
        return torch.einsum(equation, input, other)
    result = torch.matmul(input, other)
    return result if alpha == 1 else result * alpha


def multiplied(input: Any, other: Any) -> Tensor:
    """A product. One side can be a number."""
    return input * other  # type: ignore[no-any-return]


def divided(input: Any, other: Any) -> Tensor:
    """A quotient. One side can be a number."""
    return input / other  # type: ignore[no-any-return]


def total(input: Any, other: Any, *, kind: str, alpha: float = 1) -> Tensor:
    """A sum or a difference; `kind` is ``"add"`` or ``"sub"``. One side can be a number."""
    other = other if alpha == 1 else other * alpha
    return input + other if kind == "add" else input - other  # type: ignore[no-any-return]


def power(input: Tensor, *, exponent: Any = 2) -> Tensor:
    """A power; the square, if no exponent is given."""
    return torch.pow(input, exponent)


def pool(input: Tensor, *, kind: str, **constants: Any) -> Tensor:
    """A pool; `kind` is the name of the function in `torch.nn.functional`."""
    return getattr(F, kind)(input, **constants)  # type: ignore[no-any-return]


def batch_normalised(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """A batch norm, which leaves the running statistics as they are; `momentum` does not change its result."""
    mean, var = (None, None) if training else (running_mean, running_var)
    return F.batch_norm(input, mean, var, weight, bias, training, 0.0, eps)


def rms_normalised(
    input: Tensor,
    weight: Tensor | None = None,
    *,
    normalized_shape: Any = None,
    eps: float | None = None,
    dims: int = 0,
) -> Tensor:
    """An RMSNorm. `dims` is the number of the last dimensions, for one in separate operations."""
    if not dims:
        return F.rms_norm(input, normalized_shape, weight, eps)
    shape = input.shape[input.dim() - dims :]
    return F.rms_norm(input, shape, None if weight is None else weight.to(input.dtype), eps)


def layer_normalised(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    normalized_shape: Any = None,
    eps: float = 1e-5,
    dims: int = 0,
) -> Tensor:
    """A LayerNorm; for `dims` see `rms_normalised`."""
    if not dims:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    shape = input.shape[input.dim() - dims :]
    weight = None if weight is None else weight.to(input.dtype)
    bias = None if bias is None else bias.to(input.dtype)
    return F.layer_norm(input, shape, weight, bias, eps)
