"""Traces of a captured model by other libraries that name operations by the modules that they are in.

`create_feature_extractor` of torchvision traces a model with a tracer of its own, and selects outputs by the paths of
modules. The graph of a captured model has opened its modules, but its nodes know their owners.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..graph.provenance import origin
from ..ops.gradients import decoupled

__all__ = ["names_by_scope", "run_in_scopes"]

_SCOPE, _NAMES = "current_module_qualname", "node_to_qualname"


def names_by_scope(tracer: Any) -> bool:
    """Whether a tracer is one of torchvision, which names the nodes by the module that it is in."""
    return hasattr(tracer, _SCOPE) and hasattr(tracer, _NAMES)


def run_in_scopes(module: Any, tracer: Any, args: tuple[Any, ...]) -> Any:
    """Run the graph of a captured model, each node in the scope of its owner."""
    before = getattr(tracer, _SCOPE)
    try:
        return _InScopes(module, tracer).run(*args)
    finally:
        setattr(tracer, _SCOPE, before)


class _InScopes(fx.Interpreter):
    def __init__(self, module: Any, tracer: Any) -> None:
        super().__init__(module, graph=module.graph)
        self.tracer = tracer

    def run_node(self, n: fx.Node) -> Any:
        """Run a node. What decouples an operation gets the name of the operation."""
        setattr(self.tracer, _SCOPE, origin(n).owner)
        result = super().run_node(n)
        if n.target is decoupled and isinstance(n.args[0], fx.Node):
            operation, names = self.env.get(n.args[0]), getattr(self.tracer, _NAMES)
            if isinstance(operation, fx.Proxy) and isinstance(result, fx.Proxy):
                one, other = operation.node, result.node
                if one in names and other in names:
                    names[one], names[other] = names[other], names[one]
        return result
