"""The inside of torch.fx: nodes, code generation, and functions that graphs call and no public name reaches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

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
    "grad_mode_setter",
    "is_erased",
    "make_fx",
    "qualified_name",
    "set_generated_graph",
    "structures_of",
    "with_structures",
]


def grad_mode_setter() -> Any:
    """What a graph calls to change the grad mode."""
    return lookup("torch._C._set_grad_enabled", "recording the grad mode")


def assertion() -> Any:
    """What a graph calls to check a condition."""
    return lookup("torch._assert", "recording an assertion")


INPUT_STRUCTURE, OUTPUT_STRUCTURE = "_in_spec", "_out_spec"
"""The attributes in which a GraphModule holds how its inputs and outputs are nested; its code reads them."""

_CODE = "generating the code of a graph"

forward_from_source: Callable[..., Any] = private("torch.fx.graph_module._forward_from_src", _CODE)
"""Make a `forward` of source code and the names that it refers to."""

qualified_name: Callable[[Any], str] = private(
    "torch.fx.node._get_qualified_name", "saving a graph"
)
"""The dotted name of a function that a graph calls."""

_PytreeCodeGen = private("torch.fx.graph._PyTreeCodeGen", "saving a graph")
_PytreeInfo = private("torch.fx.graph._PyTreeInfo", "saving a graph")


@uses_private_names(_CODE)
def generated_code(module: fx.GraphModule) -> str:
    """The code that a GraphModule has generated last."""
    code: str = module._code
    return code


def set_generated_graph(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Say from which graph a GraphModule generates its code, and generate none yet."""
    module._graph = graph


@uses_private_names(_CODE)
def code_generator(graph: fx.Graph) -> Any:
    """What generates the code of a graph; `Graph.set_codegen` is the way to set it."""
    return graph._codegen


def structures_of(graph: fx.Graph) -> tuple[Any, Any, Any] | None:
    """The names of the arguments of a graph and how its inputs and outputs are nested; None for a flat graph."""
    info = getattr(code_generator(graph), "pytree_info", None)
    return None if info is None else (info.orig_args, info.in_spec, info.out_spec)


def with_structures(arguments: Any, inputs: Any, outputs: Any) -> Any:
    """A code generator for a graph with nested inputs and outputs: see `structures_of`."""
    return _PytreeCodeGen(_PytreeInfo(arguments, inputs, outputs))


@uses_private_names("rewriting a graph")
def is_erased(node: fx.Node) -> bool:
    """Whether a node is in no graph any more."""
    return node._erased


def attributes_written_by(
    write: Callable[[Callable[[str, str], str]], Callable[[str, str], str]],
) -> AbstractContextManager[None]:
    """Let the code of graphs name attributes as a function says.

    Args:
        write: Given the usual one, returns the function from an object's text and a dotted name to the text.
    """
    return replaced(fx.graph, "_format_target", write)


class Tracer(fx.Tracer):
    """A tracer with a say in what stands for each argument of the forward."""

    def argument_proxy(self, name: str, default: Callable[[], Any]) -> Any:
        """What stands for an argument.

        Args:
            name: Its name, with the stars of ``*args`` and ``**kwargs``.
            default: Makes the placeholder that every argument has by default.
        """
        return default()

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn: Any) -> Any:
        usual = super()._proxy_placeholder
        return self.argument_proxy(name, lambda: usual(name, None, sig, fn))


def make_fx(function: Callable[..., Any]) -> Callable[..., fx.GraphModule]:
    """`make_fx` of torch, imported when it is needed: it brings sympy."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function)
