"""The methods of a captured model other than `forward`: they run as in the model, without the rules of its graphs.

A method that calls a part of the model with a rule warns of this at its first call. Methods that cannot do so, and the
forward, are left as they are.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from .._torch.dynamo import takes_for_constant
from ..context import explicit_rules_act, intercepting_blocks
from ..errors import FreegradWarning
from ..graph.nodes import submodule
from ..graph.provenance import origin
from ..ops.gradients import decoupled

__all__ = ["warn_in_methods"]


def warn_in_methods(module: Any, model_class: type[nn.Module] | None) -> None:
    """Let the methods of a captured model warn if they call a part that has a rule in the graphs.

    Args:
        module: The captured model; its class belongs to it alone.
        model_class: The class of the model, whose methods it has; None if it has none.
    """
    paths = set(_paths_with_rules(module)) if model_class is not None else set()
    heads = {path.partition(".")[0] for path in paths}
    if not heads:
        return
    for name, method in inspect.getmembers_static(model_class, inspect.isfunction):
        if (
            name != "forward"
            and not name.startswith("__")
            and not hasattr(nn.Module, name)
            and not heads.isdisjoint(_names(method.__code__))
        ):
            setattr(type(module), name, _warning(module, method, paths))


def _paths_with_rules(module: Any) -> Iterator[str]:
    """The paths of the submodules that own a site with a rule."""
    for variant in module.variants:
        for node in variant.graph.nodes:
            if node.target is not decoupled or node.kwargs.get("ambient"):
                continue
            name = str(node.kwargs.get("site", ""))
            # the name of a parameter has no colon; a rewrite gives its node no origin
            path = origin(node).owner if ":" in name else name.rpartition(".")[0]
            if path:
                yield path


def _names(code: CodeType) -> set[str]:
    """The names of attributes and globals in code and in the functions that it contains."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)


def _warning(module: nn.Module, method: FunctionType, paths: set[str]) -> Callable[..., Any]:
    """A method that warns once if it calls a part that has a rule."""
    reference = weakref.ref(module)
    told: list[bool] = []

    @takes_for_constant
    def tell() -> None:
        if told or not torch.is_grad_enabled() or not explicit_rules_act() or intercepting_blocks():
            return
        told.append(True)
        model = reference()
        part = None if model is None else _called_with_rule(method, model, paths)
        if part is not None:
            name = method.__qualname__
            warnings.warn(
                f"{name} calls {part} of the transformed model, where no rule acts: a transform gives rules to the "
                f"forward, and the other methods run as in the original model. Call the method in a block with the "
                f"rules, `with freegrad_fx.use(rules, model=gm):`; or use what the forward returns.",
                FreegradWarning,
                stacklevel=3,
            )

    @functools.wraps(method)
    def told_of(self: Any, *args: Any, **kwargs: Any) -> Any:
        tell()
        return method(self, *args, **kwargs)

    return told_of


def _called_with_rule(method: FunctionType, model: nn.Module, paths: set[str]) -> str | None:
    """The path of the first submodule with a rule that a method calls, or over which it loops; None if there is none.

    It is read from the source, so that the call itself is not observed.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):  # code without a source
        return None
    own = next(iter(inspect.signature(method).parameters), "")
    for node in ast.walk(tree):
        used: list[ast.expr] = []
        if isinstance(node, ast.Call):
            used = [node.func]
        elif isinstance(node, ast.For | ast.comprehension):
            used = [part for part in ast.walk(node.iter) if isinstance(part, ast.Attribute)]
        for part in used:
            path = _path(part, own, model)
            if path is not None and _has_rule(path, paths):
                return path
    return None


def _has_rule(path: str, paths: set[str]) -> bool:
    return any(f"{owner}.".startswith(f"{path}.") for owner in paths)


def _path(expression: ast.expr, own: str, model: nn.Module) -> str | None:
    """The path of the submodule that an expression such as ``self.layers[0]`` denotes; None for other expressions."""
    if isinstance(expression, ast.Subscript):  # the container, as the index may not be known
        return _path(expression.value, own, model)
    names: list[str] = []
    while isinstance(expression, ast.Attribute):
        names.insert(0, expression.attr)
        expression = expression.value
        if isinstance(expression, ast.Subscript):
            return None
    if not names or not (isinstance(expression, ast.Name) and expression.id == own):
        return None
    try:
        found = submodule(model, ".".join(names))
    except AttributeError:
        return None
    return ".".join(names) if isinstance(found, nn.Module) else None
