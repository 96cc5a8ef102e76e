"""Queries about a single node: its module, its arguments, its activation. Independent of rules and sites."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from .._torch.modules import children_of
from ..ops.calls import call_with
from ..vocabulary.op import Spelling
from ..vocabulary.recognition import recognise

__all__ = [
    "argument",
    "attribute",
    "called_module",
    "called_path",
    "first_argument",
    "spelled",
    "submodule",
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


def called_module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module that a node calls, directly or through `call_with`; None for other nodes."""
    if node.op == "call_module":
        return submodule(root, str(node.target))
    if node.target is call_with:
        module = attribute(node.args[0], root)  # type: ignore[arg-type]
        return module if isinstance(module, nn.Module) else None
    return None


def called_path(node: fx.Node) -> str:
    """The dotted path of the module that a node calls, directly or through `call_with`."""
    return str(node.args[0].target) if node.target is call_with else str(node.target)  # type: ignore[union-attr]


def first_argument(node: fx.Node) -> int:
    """The index in `node.args` of the first argument of the called module or function."""
    return 2 if node.target is call_with else 0


def argument(node: fx.Node, key: int | str) -> Any:
    """The argument of a node at a position or with a keyword."""
    return node.args[key] if isinstance(key, int) else node.kwargs[key]


def spelled(node: fx.Node, root: nn.Module) -> Spelling | None:
    """The activation that a node calls, and how; None if it calls no activation of the vocabulary."""
    return recognise(node, called_module(node, root), first_argument(node))
