"""`Activation`: an activation layer with FreeGrad's interface."""

from __future__ import annotations

import torch
from torch import Tensor

from freegrad_fx import modules
from freegrad_fx.errors import unknown

__all__ = ["Activation"]


class Activation(modules.Activation):
    """An activation whose backward follows `use` blocks.

    Args:
        forward: ``"Linear"``, ``"ReLU"``, ``"ReLU6"``, ``"LeakyReLU"``, ``"ELU"``, ``"Tanh"``, ``"Logistic"``,
            ``"SiLU"``, ``"GELU"``, ``"Softplus"`` or ``"Heaviside"``.

    Raises:
        ValueError: The forward is unknown.
    """

    def __init__(self, forward: str = "ReLU") -> None:
        if forward not in modules.FREEGRAD:
            raise ValueError(unknown("forward", forward, modules.FREEGRAD))
        super().__init__(forward)

    def _function(self, x: Tensor) -> Tensor:
        # the derivative of clamp at 0 and 6 is 1, that of relu6 is 0
        return torch.clamp(x, 0.0, 6.0) if self.name == "ReLU6" else super()._function(x)
