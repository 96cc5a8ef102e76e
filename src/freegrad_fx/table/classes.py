"""Classes by name, for example ``"torch.nn.ReLU"`` for `nn.ReLU`. No module is imported and no code is run."""

from __future__ import annotations

import sys
from types import CellType, CodeType, FunctionType
from typing import Any, TypeAlias

import torch
from torch import nn

__all__ = [
    "Class",
    "class_name",
    "function_applied_by",
    "imported",
    "matching_classes",
    "qualified",
]

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


def function_applied_by(code: Any) -> Class | None:
    """The autograd.Function that a function of Python applies, as far as its code shows; None if it is not known.

    Args:
        code: A function, as the one that ``snntorch.surrogate.atan()`` returns, or the `apply` of a Function.
    """
    owner = getattr(code, "__self__", None)
    found: list[Any] = [owner]
    if isinstance(code, FunctionType):
        found += [code.__globals__.get(name) for name in _names(code.__code__)]
        found += [cell.cell_contents for cell in code.__closure__ or () if _is_filled(cell)]
    kinds = (value for value in found if isinstance(value, type))
    return next((kind for kind in kinds if issubclass(kind, torch.autograd.Function)), None)


def _names(code: CodeType) -> list[str]:
    inner = [_names(const) for const in code.co_consts if isinstance(const, CodeType)]
    return [*code.co_names, *(name for names in inner for name in names)]


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def qualified(kind: Class) -> str:
    """The qualified name of a class, including its module."""
    return f"{kind.__module__}.{kind.__qualname__}"
