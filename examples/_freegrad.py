"""Applies a rule to a model with the package freegrad, which needs its own layers in the model.

freegrad (PyPI) changes only the backward of its layer ``Activation``, by a rule that is active while
the forward runs. Therefore the activations of the model are replaced first.
"""

import copy

import freegrad
from torch import Tensor, nn

import freegrad_fx as fg

__all__ = ["UnderRule", "wrapped"]

# freegrad's names of the forwards
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
    """Copy a model, replace its activations by freegrad's, and apply a rule."""
    model = copy.deepcopy(model)
    for owner in list(model.modules()):
        for name, child in owner.named_children():
            forward = (rule and rule.forward) or type(child).__name__
            if type(child).__name__ in FORWARDS:
                setattr(owner, name, freegrad.Activation(FORWARDS[forward]))
    return UnderRule(model, rule) if rule else model
