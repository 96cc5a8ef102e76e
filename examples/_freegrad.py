"""The same model under the same rule through the package freegrad, whose wrappers it needs.

freegrad (PyPI) changes the backward of its own layer ``Activation`` alone, by a rule that is in force
while the forward runs. So the activations of a model are exchanged first.
"""

import copy

import freegrad
from torch import Tensor, nn

import freegrad_fx as fg

__all__ = ["UnderRule", "wrapped"]

# What freegrad calls the forward of an activation.
FORWARDS = {"ReLU": "ReLU", "Sigmoid": "Logistic", "heaviside": "Heaviside"}


class UnderRule(nn.Module):
    """A model whose forward runs under one of freegrad's rules."""

    def __init__(self, model: nn.Module, rule: fg.Rule) -> None:
        super().__init__()
        self.model = model
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        with freegrad.use(self.rule.name, params=self.rule.bound, scope="activations"):
            return self.model(x)


def wrapped(model: nn.Module, rule: fg.Rule | None) -> nn.Module:
    """Copy a model with freegrad's activations in place of its own, and put it under a rule."""
    model = copy.deepcopy(model)
    for owner in list(model.modules()):
        for name, child in owner.named_children():
            forward = (rule and rule.forward) or type(child).__name__
            if type(child).__name__ in FORWARDS:
                setattr(owner, name, freegrad.Activation(FORWARDS[forward]))
    return UnderRule(model, rule) if rule else model
