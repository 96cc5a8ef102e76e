"""Step functions and quantizers, for use as the replacement forward of activations or parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

__all__ = ["binarize", "heaviside", "ternarize"]


def heaviside(x: Tensor, value_at_zero: float = 0.0) -> Tensor:
    """Return 0 where x < 0, `value_at_zero` where x = 0, 1 where x > 0, and NaN where x is NaN.

    Formula: H(x), in the shape and dtype of `x`.

    Like that of `torch.sign`, its own derivative is zero, so that a network can be run with its rules disabled.
    (`torch.heaviside` requires a tensor of values, maps NaN to 0, and its backward raises.)

    Args:
        x: A tensor of floating point numbers.
        value_at_zero: The result where x = 0.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(heaviside, (x,), x, value_at_zero=value_at_zero)
    return torch.ops.freegrad_fx.heaviside(x, value_at_zero)  # type: ignore[no-any-return]


def _heaviside(x: Tensor, value_at_zero: float = 0.0) -> Tensor:
    step = torch.where(x == 0, value_at_zero, (x > 0).to(x.dtype)).to(x.dtype)
    return torch.where(x.isnan(), x, step)


def _heaviside_in_place(x: Tensor, value_at_zero: float = 0.0) -> Tensor:
    """An equivalent implementation for common cases, with fewer passes over memory and without boolean tensors."""
    usual = x.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if value_at_zero != 0 or not usual or x.requires_grad:  # autograd has to record x
        return _heaviside(x, value_at_zero)
    # Multiply twice, because smallest·largest < 1. Adding to 0 maps -0 to 0.
    largest = torch.finfo(x.dtype).max
    return x.new_zeros(()).add(x.detach(), alpha=largest).mul_(largest).clamp_(0, 1)


def binarize(x: Tensor) -> Tensor:
    """Return 1 where x ≥ 0, −1 where x < 0, and NaN where x is NaN.

    Formula: sign(x) with sign(0) = 1, in the shape and dtype of `x`; its own derivative is zero.

    Source: Hubara et al. 2016, arXiv:1602.02830; larq SteSign, Brevitas BinaryQuant. (`torch.sign` maps 0 to 0, so that
    a weight could take three values.)

    Args:
        x: A tensor of floating point numbers.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(binarize, (x,), x)
    return torch.ops.freegrad_fx.binarize(x)  # type: ignore[no-any-return]


def _binarize(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, torch.where(x >= 0, 1, -1).to(x.dtype))


def ternarize(x: Tensor, threshold: float | None = None) -> Tensor:
    """Return 1 where x > threshold, −1 where x < −threshold, 0 between, and NaN where x is NaN.

    Formula: ``sign(x)·1[|x| > Δ]``, in the shape and dtype of `x`; its own derivative is zero.

    Args:
        x: A tensor of floating point numbers.
        threshold: Δ; by default ``0.7·mean|x|`` over the whole tensor.

    Source: Li & Liu 2016, arXiv:1605.04711 (ternary weight networks); larq SteTern, which uses ``|x| ≥ Δ``, with 0.05
    as the default of Δ.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(ternarize, (x,), x, threshold=threshold)
    return torch.ops.freegrad_fx.ternarize(x, threshold)  # type: ignore[no-any-return]


def _ternarize(x: Tensor, threshold: float | None = None) -> Tensor:
    size = x.detach().abs()
    # at least float32, because the sum over a large tensor overflows float16
    wide = torch.promote_types(x.dtype, torch.float32)
    limit = 0.7 * size.mean(dtype=wide) if threshold is None else threshold
    return torch.where(x.isnan(), x, torch.where(size > limit, x.detach().sign(), 0).to(x.dtype))


# They are operators, so that Dynamo and torch.export record each as one recognisable call, and composite, so that
# autograd, vmap and Inductor trace into them.
_library: Any = torch.library.Library("freegrad_fx", "FRAGMENT")  # type: ignore[no-untyped-call]

for _schema, (_usual, _batched) in {
    "heaviside(Tensor self, float value_at_zero=0.0) -> Tensor": (_heaviside_in_place, _heaviside),
    "binarize(Tensor self) -> Tensor": (_binarize, _binarize),
    "ternarize(Tensor self, float? threshold=None) -> Tensor": (_ternarize, _ternarize),
}.items():
    _library.define(_schema)
    _library.impl(_schema.partition("(")[0], _usual, "CompositeImplicitAutograd")
    _library.impl(_schema.partition("(")[0], _batched, "FuncTorchBatchedDecomposition")
