"""Operations by the names of their operands, so that rules of several operands can compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import OPS

__all__ = ["Operation", "operation_of"]


@dataclass(frozen=True)
class Operation:
    """An operation as a function of its operands, which are tensors.

    Attributes:
        name: The canonical name.
        function: The function of PyTorch.
        arguments: For each operand, by name, the argument of the function.
        additive: The operands that are only added, so that they do not change the gradients of the others.
    """

    name: str
    function: Callable[..., Tensor]
    arguments: Mapping[str, str]
    additive: tuple[str, ...] = ()

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the operands, in order."""
        return tuple(self.arguments)

    def __call__(self, operands: Mapping[str, Any], constants: Mapping[str, Any]) -> Tensor:
        """Compute the operation. `constants` are the further arguments of the function, by PyTorch's names."""
        given = {self.arguments[name]: value for name, value in operands.items()}
        return self.function(**given, **constants)


_AFFINE = {"x": "input", "weight": "weight", "bias": "bias"}
_TWO = {"a": "input", "b": "other"}

_OPERATIONS = {
    "linear": Operation("linear", F.linear, _AFFINE, ("bias",)),
    "matmul": Operation("matmul", torch.matmul, _TWO),
    "mul": Operation("mul", torch.mul, _TWO),
}


def operation_of(name: str) -> Operation | None:
    """Return the operation of a canonical name; None if it is not known as a function of its operands."""
    found = _OPERATIONS.get(name)
    if found is None and name in OPS and (function := OPS[name].function) is not None:
        return Operation(name, function, {"x": "input"})
    return found
