"""Queries about a single node: its module, its arguments, its activation. Independent of rules and sites."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from .._torch.modules import children_of
from ..ops.calls import call_with
from ..ops.hooked import call_without_hooks, forward_of, run_hooks, run_pre_hooks
from ..vocabulary.op import Spelling
from ..vocabulary.recognition import recognise

__all__ = [
    "argument",
    "attribute",
    "called_module",
    "called_path",
    "first_argument",
    "hooked_module",
    "spelled",
    "submodule",
    "takes_parameters",
]


def attribute(node: fx.Node, root: nn.Module) -> Any:
    """The value that a get_attr node reads; None for other nodes, and if the attribute does not exist."""
    found: Any = root if node.op == "get_attr" else None
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path. Equivalent to `root.get_submodule(path)`, but faster.

    Raises:
        AttributeError: There is no module at the path.
    """
    found: nn.Module | None = root
    for name in path.split(".") if path else ():
        # `_modules` of a ScriptModule is not a dict
        if found is None or isinstance(found, torch.jit.ScriptModule):
            return root.get_submodule(path)
        found = children_of(found).get(name)
    return root.get_submodule(path) if found is None else found


# Functions whose first two arguments are a module and tensors in place of its parameters
_CALLS = (call_with, call_without_hooks, forward_of)
_HOOKS = (run_pre_hooks, run_hooks)


def called_module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module that a node calls, directly or through a function of `ops`; None for other nodes."""
    if node.op == "call_module":
        return submodule(root, str(node.target))
    return _given_module(node, root) if node.target in _CALLS else None


def hooked_module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module whose forward hooks or pre-hooks a node runs; None for other nodes."""
    return _given_module(node, root) if node.target in _HOOKS else None


def _given_module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    module = attribute(node.args[0], root)  # type: ignore[arg-type]
    return module if isinstance(module, nn.Module) else None


def takes_parameters(node: fx.Node) -> bool:
    """Whether a node calls a function of `ops` whose second argument takes the place of parameters of a module."""
    return node.target in _CALLS or node.target in _HOOKS


def called_path(node: fx.Node) -> str:
    """The dotted path of the module that a node calls, directly or through a function of `ops`."""
    return str(node.args[0].target) if takes_parameters(node) else str(node.target)  # type: ignore[union-attr]


def first_argument(node: fx.Node) -> int:
    """The index in `node.args` of the first argument of the called module or function."""
    return 2 if node.target in _CALLS else 0


def argument(node: fx.Node, key: int | str) -> Any:
    """The argument of a node at a position or with a keyword."""
    return node.args[key] if isinstance(key, int) else node.kwargs[key]


def spelled(node: fx.Node, root: nn.Module) -> Spelling | None:
    """The activation that a node calls, and how; None if it calls no activation of the vocabulary."""
    return recognise(node, called_module(node, root), first_argument(node))
