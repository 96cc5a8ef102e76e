"""A small rule, and the ReLU that has its gradient by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import freegrad_fx as fg

__all__ = ["HALF", "HalfByHand"]

HALF = {"relu": fg.rules.scale(s=0.5)}


class HalfByHand(nn.ReLU):
    """A ReLU with the gradient of the rule, written with detach."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).detach() + 0.5 * (x - x.detach())
