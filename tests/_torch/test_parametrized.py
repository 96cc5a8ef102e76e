"""Modules with parametrizations are told from others as PyTorch tells them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from freegrad_fx._torch.parametrized import is_parametrized, plain_class


class Named(nn.Module):
    """Has a submodule with the name that PyTorch gives the parametrizations."""

    def __init__(self) -> None:
        super().__init__()
        self.parametrizations = nn.Linear(1, 1)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(2, 2),
        parametrizations.weight_norm(nn.Linear(2, 2)),
        Named(),
        torch.jit.script(nn.Linear(2, 2)),
    ],
    ids=["plain", "parametrized", "named alike", "scripted"],
)
def test_a_parametrized_module_and_its_class_are_told_as_pytorch_tells_them(
    module: nn.Module,
) -> None:
    assert is_parametrized(module) == parametrize.is_parametrized(module)
    assert plain_class(module) is parametrize.type_before_parametrizations(module)
