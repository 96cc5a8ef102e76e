"""Classes by name, for example ``"torch.nn.ReLU"`` for `nn.ReLU`. No module is imported and no code is run."""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

from torch import nn

__all__ = ["Class", "class_name", "imported", "matching_classes", "qualified"]

Class: TypeAlias = type[Any]


def matching_classes(wanted: str | Class, kind: Class) -> list[Class]:
    """The classes among `kind` and its bases that `wanted` denotes."""
    if not isinstance(wanted, str):
        return [wanted] if wanted in kind.__mro__ else []
    public = imported(wanted)
    return [base for base in kind.__mro__ if base is public or qualified(base) == wanted]


def imported(name: str) -> Any:
    """The object that a dotted name denotes in the modules imported so far, or None. Runs no code."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:cut]))
        if found is not None:
            for part in parts[cut:]:
                found = getattr(found, "__dict__", {}).get(part)
            return found
    return None


def class_name(kind: str | Class) -> str | Class:
    """The name by which a class can be found, ``torch.nn.ReLU``; the class itself if no name leads to it."""
    if isinstance(kind, str):
        return kind
    if vars(nn).get(kind.__name__) is kind:
        return f"torch.nn.{kind.__name__}"
    name = qualified(kind)
    return name if imported(name) is kind else kind


def qualified(kind: Class) -> str:
    """The qualified name of a class, including its module."""
    return f"{kind.__module__}.{kind.__qualname__}"
