"""Operations by the names of their operands, so that rules of several operands can compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import OPS
from .functions import (
    batch_normalised,
    convolution,
    divided,
    layer_normalised,
    multiplied,
    pool,
    power,
    product,
    rms_normalised,
    total,
)
from .products import OF_CONV, OF_LINEAR, OF_MATMUL, OF_MUL, Products

__all__ = ["NOT_COMPUTED", "Operation", "constants_read", "operation_of"]


@dataclass(frozen=True)
class Operation:
    """An operation as a function of its operands, which are tensors.

    Attributes:
        name: The canonical name.
        function: The function of PyTorch.
        arguments: For each operand, by name, the argument of the function.
        additive: The operands that are only added, so that they do not change the gradients of the others.
        accepts: The further arguments of the function.
        apart: Arguments of calls that add something to the result of the function.
        products: For operands of bilinear operations, functions that compute their gradients faster.
    """

    name: str
    function: Callable[..., Tensor]
    arguments: Mapping[str, str]
    additive: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    products: Products | None = None

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the operands, in order."""
        return tuple(self.arguments)

    def __call__(self, operands: Mapping[str, Any], constants: Mapping[str, Any]) -> Tensor:
        """Compute the operation. `constants` are the further arguments of the function, by PyTorch's names."""
        given = {self.arguments[name]: value for name, value in operands.items()}
        return self.function(**{**given, **constants})  # a number is among the constants


_AFFINE = {"x": "input", "weight": "weight", "bias": "bias"}
_TWO = {"a": "input", "b": "other"}

_ONE = {"x": "input"}


def _operation(
    name: str,
    function: Callable[..., Tensor],
    arguments: Mapping[str, str] = _ONE,
    accepts: str = "",
    additive: str = "",
    apart: str = "",
    products: Products | None = None,
) -> tuple[str, Operation]:
    added, accepted, aside = (tuple(names.split()) for names in (additive, accepts, apart))
    return name, Operation(name, function, arguments, added, accepted, aside, products)


_CONVOLUTION = "kind stride padding dilation groups padding_mode output_padding transposed"
_POOL = "kind kernel_size stride padding dilation ceil_mode count_include_pad divisor_override"

_OPERATIONS = dict(
    (
        _operation("linear", F.linear, _AFFINE, additive="bias", products=OF_LINEAR),
        _operation("conv", convolution, _AFFINE, _CONVOLUTION, additive="bias", products=OF_CONV),
        _operation("linear_bn", F.linear, _AFFINE, additive="bias", products=OF_LINEAR),
        _operation(
            "conv_bn", convolution, _AFFINE, _CONVOLUTION, additive="bias", products=OF_CONV
        ),
        _operation(
            "matmul", product, _TWO, "alpha equation", apart="input self beta", products=OF_MATMUL
        ),
        _operation("mul", multiplied, _TWO, products=OF_MUL),
        _operation("add", total, _TWO, "kind alpha"),
        _operation("sub", total, _TWO, "kind alpha"),
        _operation("div", divided, _TWO),
        _operation(
            "scaled_dot_product_attention",
            F.scaled_dot_product_attention,
            {"query": "query", "key": "key", "value": "value"},
            "attn_mask dropout_p is_causal scale enable_gqa",
        ),
        _operation("pow", power, accepts="exponent"),
        _operation("exp", torch.exp),
        _operation("sqrt", torch.sqrt),
        _operation("rsqrt", torch.rsqrt),
        _operation("mean", torch.mean, accepts="dim keepdim dtype"),
        _operation("softmax", torch.softmax, accepts="dim dtype"),
        _operation("log_softmax", torch.log_softmax, accepts="dim dtype"),
        _operation(
            "layer_norm", layer_normalised, _AFFINE, "normalized_shape eps dims", additive="bias"
        ),
        _operation(
            "rms_norm",
            rms_normalised,
            {"x": "input", "weight": "weight"},
            "normalized_shape eps dims",
        ),
        _operation("group_norm", F.group_norm, _AFFINE, "num_groups eps", additive="bias"),
        _operation(
            "batch_norm",
            batch_normalised,
            _AFFINE,
            "running_mean running_var training momentum eps",
            additive="bias",
        ),
        _operation("max_pool", pool, accepts=_POOL),
        _operation("avg_pool", pool, accepts=f"{_POOL} output_size"),
    )
)


NOT_COMPUTED = {
    "dropout": "it would draw other random numbers",
    "embedding": "it depends on indices, which are no operand",
}
"""The operations that are not known as functions of their operands, and why."""


def operation_of(name: str) -> Operation | None:
    """Return the operation of a canonical name; None if it is not known as a function of its operands."""
    found = _OPERATIONS.get(name)
    if found is None and name in OPS and (function := OPS[name].function) is not None:
        return Operation(name, function, {"x": "input"})
    return found


def constants_read(name: str, constants: Mapping[str, Any]) -> Mapping[str, Any]:
    """The further arguments of an operation without those that it does not read: the statistics of other batches."""
    if name != "batch_norm" or not constants.get("training"):
        return constants
    return {n: value for n, value in constants.items() if not n.startswith("running_")}
