"""Names and classes of the modules that own sites, and traces of an earlier transform."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..graph.nodes import submodule

__all__ = ["ALREADY", "class_at", "qualified", "rule_of", "short_name"]


def class_at(root: nn.Module, path: str) -> type[nn.Module]:
    """The original class of the module at a dotted path."""
    module = submodule(root, path)
    model_class = getattr(module, "_model_class", None)
    return model_class or type_before_parametrizations(module)


def qualified(kind: type[Any]) -> str:
    """The qualified name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def short_name(kind: type[Any]) -> str:
    """The name of a class, with the prefix ``nn.`` for classes of torch.nn."""
    return f"{'nn.' if kind.__module__.startswith('torch.nn.') else ''}{kind.__name__}"


def rule_of(node: fx.Node) -> str:
    """The rule of a `decoupled` node, for reports."""
    return str(node.kwargs.get("rule", "an ambient one"))


ALREADY = (
    "already decoupled, with the rule {!r}; transform the original model, or compose the rules"
)
