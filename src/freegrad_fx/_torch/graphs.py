"""Internals of torch.fx: nodes, code generation, and functions in graphs that have no public name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx

from .releases import lookup, private, uses_private_names
from .replacing import replaced

__all__ = [
    "INPUT_STRUCTURE",
    "OUTPUT_STRUCTURE",
    "Tracer",
    "assertion",
    "attributes_written_by",
    "code_generator",
    "forward_from_source",
    "generated_code",
    "grad_mode_getter",
    "grad_mode_setter",
    "is_erased",
    "is_fx_tracing",
    "make_fx",
    "qualified_name",
    "set_generated_graph",
    "structures_of",
    "with_structures",
]


grad_mode_getter: Callable[[], bool] = torch.is_grad_enabled
"""The function that a graph calls to read the grad mode. A capture replaces `torch.is_grad_enabled` for its time."""


def grad_mode_setter() -> Any:
    """The function that a graph calls to set the grad mode."""
    return lookup("torch._C._set_grad_enabled", "recording the grad mode")


def assertion() -> Any:
    """The function that a graph calls to check a condition."""
    return lookup("torch._assert", "recording an assertion")


INPUT_STRUCTURE, OUTPUT_STRUCTURE = "_in_spec", "_out_spec"
"""The attributes of a GraphModule for the nesting of its inputs and outputs, which its code reads."""

_CODE = "generating the code of a graph"

forward_from_source: Callable[..., Any] = private("torch.fx.graph_module._forward_from_src", _CODE)
"""Make a `forward` from source code and the names that it refers to."""

qualified_name: Callable[[Any], str] = private(
    "torch.fx.node._get_qualified_name", "saving a graph"
)
"""The dotted name of a function that a graph calls."""

_PytreeCodeGen = private("torch.fx.graph._PyTreeCodeGen", "saving a graph")
_PytreeInfo = private("torch.fx.graph._PyTreeInfo", "saving a graph")


@uses_private_names(_CODE)
def generated_code(module: fx.GraphModule) -> str:
    """The code that a GraphModule generated last."""
    code: str = module._code
    return code


def set_generated_graph(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Set the graph from which a GraphModule generates its code, without generating it."""
    module._graph = graph


@uses_private_names(_CODE)
def code_generator(graph: fx.Graph) -> Any:
    """The code generator of a graph, which `Graph.set_codegen` sets."""
    return graph._codegen


def structures_of(graph: fx.Graph) -> tuple[Any, Any, Any] | None:
    """The names of the arguments of a graph and the nesting of its inputs and outputs; None for a flat graph."""
    info = getattr(code_generator(graph), "pytree_info", None)
    return None if info is None else (info.orig_args, info.in_spec, info.out_spec)


def with_structures(arguments: Any, inputs: Any, outputs: Any) -> Any:
    """A code generator for a graph with nested inputs and outputs: see `structures_of`."""
    return _PytreeCodeGen(_PytreeInfo(arguments, inputs, outputs))


@uses_private_names("rewriting a graph")
def is_erased(node: fx.Node) -> bool:
    """Whether a node has been erased from its graph."""
    return node._erased


is_fx_tracing: Callable[[], bool] = private(
    "torch.fx._symbolic_trace.is_fx_symbolic_tracing", "telling whether a call is traced"
)
"""Whether `torch.fx` traces the calling code, also for `make_fx`."""


def attributes_written_by(
    write: Callable[[Callable[[str, str], str]], Callable[[str, str], str]],
) -> AbstractContextManager[None]:
    """Replace the function with which graphs write attributes in their code.

    Args:
        write: Returns the replacement, given the function. Both map the text of an object and a dotted name to text.
    """
    return replaced(fx.graph, "_format_target", write)


class Tracer(fx.Tracer):
    """A tracer that can choose the proxy for each argument of the forward."""

    def argument_proxy(self, name: str, default: Callable[[], Any]) -> Any:
        """Make the proxy for an argument.

        Args:
            name: The name of the argument, with the stars of ``*args`` and ``**kwargs``.
            default: Makes the default placeholder.
        """
        return default()

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn: Any) -> Any:
        usual = super()._proxy_placeholder
        return self.argument_proxy(name, lambda: usual(name, None, sig, fn))


def make_fx(function: Callable[..., Any]) -> Callable[..., fx.GraphModule]:
    """`make_fx` of torch, which is imported when it is needed, because it imports sympy."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function)
