"""Activations in modules that a graph calls as a whole: found by the submodules and by the source code.

The source is read, not run, so this is an estimate. It serves a warning only.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn

from .._torch.parametrized import plain_class
from ..graph.provenance import is_users
from ..vocabulary.activations import OPS
from .owners import qualified
from .site import Located, Site

__all__ = ["hidden_sites"]

_MODULES = {kind: op.name for op in OPS.values() for kind in op.modules}
_FUNCTIONS = {
    function: op.name for op in OPS.values() for function in (*op.functions, *op.inplace_functions)
}
_METHODS = {
    f"{name}{end}": op.name for op in OPS.values() for name in op.methods for end in ("", "_")
}


def hidden_sites(module: nn.Module, path: str, wanted: Collection[str] = ()) -> Iterator[Located]:
    """The operations that would be sites if a module were traced, as far as its modules and its source show them.

    Args:
        module: The module.
        path: Its dotted path in the model.
        wanted: The ops that are sites only for tables that name them, and that the table names.
    """
    for place in _all_sites(module, path):
        if place.op is not None and (not place.op.on_demand or place.op.name in wanted):
            yield place


def _all_sites(module: nn.Module, path: str) -> Iterator[Located]:
    seen: dict[Any, tuple[str, ...]] = {}
    for name, part in module.named_modules():
        where = f"{path}.{name}" if name else path
        kind: Any = plain_class(part)
        if isinstance(part, torch.jit.ScriptModule) or (kind in _MODULES and not name):
            continue  # a module that is an activation itself is a site, also if its parametrization is opaque
        if kind in _MODULES:
            yield _site(_MODULES[kind], where, part, kind)
            continue
        forward = inspect.unwrap(kind.forward)
        if not inspect.isfunction(forward) or not is_users(forward.__code__):
            continue
        if forward not in seen:
            seen[forward] = tuple(dict.fromkeys(_called(forward, kind, set())))
        held = [_op_of(value) for value in vars(part).values() if callable(value)]
        for op in dict.fromkeys([*seen[forward], *filter(None, held)]):
            yield _site(op, where, part, None)


def _site(op: str, path: str, owner: nn.Module, called: type[Any] | None) -> Located:
    kind = plain_class(owner)
    site = Site("operation", op, path, 0, type=qualified(kind))
    return Located(site, (kind,), op=OPS[op], called=called)


def _op_of(value: Any) -> str | None:
    try:
        return _FUNCTIONS.get(value)
    except TypeError:  # it has no hash
        return None


def _called(function: Callable[..., Any], kind: type[Any] | None, seen: set[Any]) -> Iterator[str]:
    """The ops that a function calls, and the functions of the same file that it calls."""
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType) or function in seen:
        return
    seen.add(function)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):  # there is no source
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        known, value = _resolved(node.func, function, kind)
        if known:
            if (op := _op_of(value)) is not None:
                yield op
            elif getattr(value, "__module__", None) == function.__module__:
                yield from _called(value, kind if _is_of_self(node.func) else None, seen)
        elif not _is_of_self(node.func) and (method := getattr(node.func, "attr", "")) in _METHODS:
            yield _METHODS[method]


def _is_of_self(called: ast.expr) -> bool:
    return (
        isinstance(called, ast.Attribute)
        and isinstance(called.value, ast.Name)
        and called.value.id == "self"
    )


def _resolved(called: ast.expr, function: FunctionType, kind: type[Any] | None) -> tuple[bool, Any]:
    """Whether an expression names an object that is known without running the code, and the object."""
    if isinstance(called, ast.Name):
        local = called.id in function.__code__.co_varnames
        return not local and called.id in function.__globals__, function.__globals__.get(called.id)
    if _is_of_self(called):
        method = getattr(kind, called.attr, None)  # type: ignore[attr-defined]
        return isinstance(method, FunctionType), method
    if isinstance(called, ast.Attribute):
        known, owner = _resolved(called.value, function, kind)
        return known and hasattr(owner, called.attr), getattr(owner, called.attr, None)
    return False, None
