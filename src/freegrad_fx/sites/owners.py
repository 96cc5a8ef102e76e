"""Names and classes of the modules that own sites, and traces of an earlier transform."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from .._torch.parametrized import plain_class
from ..backward.operator import described
from ..graph.nodes import submodule
from ..ops.gradients import decoupled
from ..ops.joint import scattered

__all__ = ["already", "class_at", "decoupling", "qualified", "short_name"]


def class_at(root: nn.Module, path: str) -> type[nn.Module]:
    """The original class of the module at a dotted path."""
    module = submodule(root, path)
    model_class = getattr(module, "_model_class", None)
    return model_class or plain_class(module)


def qualified(kind: type[Any]) -> str:
    """The qualified name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def short_name(kind: type[Any]) -> str:
    """The name of a class, with the prefix ``nn.`` for classes of torch.nn."""
    return f"{'nn.' if kind.__module__.startswith('torch.nn.') else ''}{kind.__name__}"


def decoupling(node: fx.Node) -> tuple[str, str] | None:
    """The rule and the site of a node that decouples, for reports; None for any other node."""
    if node.target is scattered:
        return decoupling(node.args[0])  # type: ignore[arg-type]
    if node.target is decoupled:
        return str(node.kwargs.get("rule", "an ambient one")), str(node.kwargs.get("site"))
    if node.target is torch.ops.freegrad_fx.decoupled:  # what Dynamo makes of it
        return described(str(node.args[4]))
    return None


def already(*rules: str) -> str:
    """The obstacle at a site that already has rules."""
    named = repr(", ".join(rules))
    return f"already decoupled, with the rule {named}; transform the original model, or compose the rules"
