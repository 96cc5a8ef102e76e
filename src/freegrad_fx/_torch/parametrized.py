"""Modules with parametrizations, told from others in a fraction of the time.

PyTorch's own functions ask each module for an attribute that only parametrized ones have. In a module, the search for
an attribute that does not exist takes ten times as long as a look into the dict of its submodules.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from .modules import children_of

__all__ = ["is_parametrized", "plain_class"]


def is_parametrized(module: nn.Module) -> bool:
    """Whether a module has parametrizations."""
    return "parametrizations" in children_of(module) and parametrize.is_parametrized(module)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module; that from before, if parametrizations have changed it."""
    if not is_parametrized(module):
        return type(module)
    before: type[nn.Module] = parametrize.type_before_parametrizations(module)
    return before
