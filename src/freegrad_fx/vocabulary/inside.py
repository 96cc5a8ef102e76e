"""Tells from the source of PyTorch's own module classes whether they compute activations."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

from torch import nn

from .._torch.parametrized import plain_class
from .activations import OPS, TABLE

__all__ = ["computes_activations"]

_MODULES = {kind for op in TABLE if op.groups for kind in op.modules}
_NAMES = {name for op in OPS.values() if op.groups for name in (op.name, f"{op.name}_")}


def computes_activations(module: nn.Module) -> bool:
    """Whether the forward of a module of PyTorch, or of one of its submodules, computes an activation.

    Args:
        module: A module whose class PyTorch defines.
    """
    kinds = {plain_class(part) for part in module.modules()}
    return any(kind in _MODULES or _calls_activations(kind) for kind in kinds)  # type: ignore[arg-type]


@functools.cache
def _calls_activations(kind: type[nn.Module]) -> bool:
    """Whether the class is derived from an activation, or its source, or that of a base, calls one by its name."""
    bases = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    return any(base in _MODULES or _names(base) & _NAMES for base in bases)  # type: ignore[arg-type]


@functools.cache
def _names(kind: type[nn.Module]) -> frozenset[str]:
    """The names of the functions that the methods of a class call, without those of its bases."""
    if not kind.__module__.startswith("torch."):
        return frozenset()
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return frozenset()
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    attributes = {call.attr for call in calls if isinstance(call, ast.Attribute)}
    return frozenset(attributes | {call.id for call in calls if isinstance(call, ast.Name)})
