"""The products of bilinear operations: the gradient of one operand, without computing the operation again.

Each function takes the gradient of the output, the operands by name and the further arguments of the operation. It
returns None for calls that it does not know; the gradient is then that of the function of the operation. The results
are those of autograd to the bit, before they are summed over the dimensions in which an operand was broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["OF_CONV", "OF_LINEAR", "OF_MATMUL", "OF_MUL", "Products"]

Product: TypeAlias = Callable[[Tensor, Mapping[str, Any], Mapping[str, Any]], Tensor | None]
Products: TypeAlias = Mapping[str, Product]
"""For each operand, the function that computes its gradient."""


def _linear_x(grad: Tensor, given: Mapping[str, Any], constants: Mapping[str, Any]) -> Tensor:
    return torch.matmul(grad, given["weight"].conj())


def _linear_weight(
    grad: Tensor, given: Mapping[str, Any], constants: Mapping[str, Any]
) -> Tensor | None:
    if grad.dim() < 2:
        return None
    x: Tensor = given["x"]
    # autograd computes the gradient of the transposed weight
    return (_rows(x).conj().t() @ _rows(grad)).t()


def _rows(tensor: Tensor) -> Tensor:
    """A tensor as a matrix; `flatten` cannot be batched by ``is_grads_batched=True``."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


OF_LINEAR: Products = {"x": _linear_x, "weight": _linear_weight}


def _matmul_a(
    grad: Tensor, given: Mapping[str, Any], constants: Mapping[str, Any]
) -> Tensor | None:
    if not _is_plain(given, constants):
        return None
    return torch.matmul(grad, given["b"].mT.conj())


def _matmul_b(
    grad: Tensor, given: Mapping[str, Any], constants: Mapping[str, Any]
) -> Tensor | None:
    a: Tensor = given["a"]
    b: Tensor = given["b"]
    if not _is_plain(given, constants):
        return None
    if b.dim() == 2 < a.dim():  # a product of two matrices, whose rows are those of the batch
        return _rows(a).t().conj() @ _rows(grad)
    return torch.matmul(a.mT.conj(), grad)


def _is_plain(given: Mapping[str, Any], constants: Mapping[str, Any]) -> bool:
    """Whether a product is one of matrices, or of batches of them."""
    known = constants.get("alpha", 1) == 1 and not constants.get("equation")
    return bool(known and 2 <= given["b"].dim() <= given["a"].dim())


OF_MATMUL: Products = {"a": _matmul_a, "b": _matmul_b}


def _mul_a(grad: Tensor, given: Mapping[str, Any], constants: Mapping[str, Any]) -> Tensor | None:
    return None if given["b"] is None else grad * given["b"].conj()


def _mul_b(grad: Tensor, given: Mapping[str, Any], constants: Mapping[str, Any]) -> Tensor | None:
    return None if given["a"] is None else grad * given["a"].conj()


OF_MUL: Products = {"a": _mul_a, "b": _mul_b}


def _conv(
    grad: Tensor, given: Mapping[str, Any], constants: Mapping[str, Any], index: int
) -> Tensor | None:
    x, weight, kind = given["x"], given["weight"], constants.get("kind", "")
    how = [constants.get(name) for name in ("stride", "padding", "dilation", "output_padding")]
    plain = constants.get("padding_mode", "zeros") == "zeros" and not isinstance(how[1], str)
    if x.is_complex():
        return None  # PyTorch computes a complex convolution from real ones
    if not plain or x.dim() != weight.dim() or not kind.startswith("conv") or kind == "convolution":
        return None
    if len({grad.dtype, x.dtype, weight.dtype}) > 1:  # under autocast
        return None
    sizes = weight.dim() - 2
    defaults = (1, 0, 1, 0)
    stride, padding, dilation, more = (
        _expanded(default if value is None else value, sizes)
        for value, default in zip(how, defaults, strict=True)
    )
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, "transpose" in kind, more,
        constants.get("groups", 1), [index == 0, index == 1, False],
    )  # fmt: skip
    return found[index]  # type: ignore[no-any-return]


def _expanded(value: Any, sizes: int) -> list[int]:
    return [value] * sizes if isinstance(value, int) else [*value]


def _conv_x(grad: Tensor, given: Mapping[str, Any], constants: Mapping[str, Any]) -> Tensor | None:
    return _conv(grad, given, constants, 0)


def _conv_weight(
    grad: Tensor, given: Mapping[str, Any], constants: Mapping[str, Any]
) -> Tensor | None:
    return _conv(grad, given, constants, 1)


OF_CONV: Products = {"x": _conv_x, "weight": _conv_weight}
