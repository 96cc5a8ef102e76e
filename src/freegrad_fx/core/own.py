"""A tensor that each parameter of a model has for itself, in the place of a value in a rule and in its forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

__all__ = ["Own", "follow"]

_lock = threading.Lock()
_made_for: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""For each tensor that was made, the device and the dtype that its parameter had when it was last used."""


def follow(parameter: Tensor, tensors: Iterable[Tensor]) -> None:
    """Convert tensors that were made for a parameter as the parameter was converted since.

    As PyTorch does with parameters, the tensors stay the same objects, which an optimizer can have.
    """
    now = parameter.device, parameter.dtype
    for tensor in tensors:
        if tensor not in _made_for or _made_for[tensor] == now:
            continue
        dtype = parameter.dtype if tensor.dtype == _made_for[tensor][1] else tensor.dtype
        tensor.data = tensor.detach().to(parameter.device, dtype)
        if tensor.grad is not None:
            tensor.grad = tensor.grad.to(parameter.device, dtype)
        _made_for[tensor] = now


class Own:
    """Stands for a tensor that is learnt, and made for each parameter of the model from its values.

    The same parameter always gets the same tensor from the same object.

    Args:
        make: A function of the parameter that returns the first value of its tensor. It has to be importable, so that
            a table with it can be pickled.
        quantizer: The name of the quantizer that makes a rule with such a tensor, as a table file names it.
        values: The arguments of this quantizer.
    """

    def __init__(
        self, make: Callable[[Tensor], Tensor], quantizer: str, values: Mapping[str, Any]
    ) -> None:
        self.make = make
        self.quantizer = quantizer
        self.values = dict(values)
        self._made: Any = WeakTensorKeyDictionary()

    def of(self, parameter: Tensor) -> nn.Parameter:
        """Return the tensor of a parameter."""
        with _lock:
            if parameter not in self._made:
                # It is learnt later, also if the model runs in inference mode first
                with torch.inference_mode(False), torch.no_grad():
                    made = nn.Parameter(self.make(parameter.detach()).clone())
                self._made[parameter] = made
                _made_for[made] = parameter.device, parameter.dtype
            found: nn.Parameter = self._made[parameter]
        return found

    def __repr__(self) -> str:
        return "<one for each parameter>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        return self  # the copy of a model has copies of the tensors

    def __reduce__(self) -> tuple[Any, ...]:
        return Own, (self.make, self.quantizer, self.values)
