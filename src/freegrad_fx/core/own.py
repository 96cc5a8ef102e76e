"""A tensor that each parameter of a model has for itself, in the place of a value in a rule and in its forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Own"]

_lock = threading.Lock()


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
                    self._made[parameter] = nn.Parameter(self.make(parameter.detach()).clone())
            found: nn.Parameter = self._made[parameter]
        return found

    def __repr__(self) -> str:
        return "<one for each parameter>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        return self  # the copy of a model has copies of the tensors

    def __reduce__(self) -> tuple[Any, ...]:
        return Own, (self.make, self.quantizer, self.values)
