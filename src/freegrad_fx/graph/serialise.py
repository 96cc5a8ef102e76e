"""Copying graphs, converting them to and from plain data, and generating their code.

`torch.fx` pickles a graph by retracing its generated code, and the linked list of nodes exceeds the recursion limit of
pickle. Graphs are therefore stored as a flat list of tuples.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import keyword
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen

from .._torch import graphs, tree
from .._torch.operators import Overload
from ..core.rule import with_names_of_now
from ..ops import decoupled
from .provenance import META

# Only one thread at a time may patch PyTorch.
LOCK = threading.RLock()

__all__ = [
    "LOCK",
    "GraphDump",
    "can_be_written",
    "copy_graph",
    "dump_graph",
    "dump_value",
    "keywords_as_names",
    "load_graph",
    "load_value",
]


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copy a graph together with the `meta` of its nodes."""
    # The generator holds the structure of inputs and outputs. It is immutable, so the copy can share it.
    codegen = graphs.code_generator(graph)
    graph.set_codegen(CodeGen())
    try:
        new = copy.deepcopy(graph)
    finally:
        graph.set_codegen(codegen)
    new.set_codegen(codegen)
    for old_node, new_node in zip(graph.nodes, new.nodes, strict=True):
        new_node.meta = dict(old_node.meta)
    return new


@dataclass(frozen=True)
class _Ref:
    name: str


def dump_value(value: Any) -> Any:
    """What stands for a value among the arguments of a node in plain data."""
    if isinstance(value, fx.Node):
        return _Ref(value.name)
    if isinstance(value, torch.memory_format):  # the old protocols cannot pickle it
        return _Named(str(value))
    return _name(value) if isinstance(value, _FUNCTIONS) else value


def load_value(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The value for the result of `dump_value`, with the nodes of these names."""
    if isinstance(value, _Ref):
        return nodes[value.name]
    return _resolve(value.name) if isinstance(value, _Named) else value


_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, Overload)


@dataclass(frozen=True)
class _Named:
    """A function or a memory format, represented by its importable name."""

    name: str


@dataclass(frozen=True)
class GraphDump:
    """A graph as plain data, made by `dump_graph`."""

    nodes: list[tuple[Any, ...]]
    codegen: Any


def dump_graph(graph: fx.Graph) -> GraphDump:
    """Convert a graph to plain data that can be pickled. Of the `meta` of nodes only the `Origin` is kept."""
    nodes = []
    for node in graph.nodes:
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), dump_value)
        target = _name(node.target) if node.op == "call_function" else node.target
        nodes.append((node.op, target, args, kwargs, node.name, node.type, node.meta.get(META)))
    return GraphDump(nodes, _dump_codegen(graph))


def load_graph(dump: GraphDump) -> fx.Graph:
    """Rebuild a graph from the result of `dump_graph`."""
    graph = fx.Graph()
    graph.set_codegen(_load_codegen(dump.codegen))
    nodes: dict[str, fx.Node] = {}

    for op, target, args, kwargs, name, type_expr, meta in dump.nodes:
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda v: load_value(v, nodes))
        target = _resolve(target.name) if isinstance(target, _Named) else target
        if target is decoupled:
            kwargs = with_names_of_now(kwargs.get("rule", ""), kwargs)
        node = graph.create_node(op, target, args, kwargs, name, type_expr)
        if meta is not None:
            node.meta[META] = meta
        nodes[name] = node
    return graph


def _dump_codegen(graph: fx.Graph) -> Any:
    """The structure of inputs and outputs as plain data; PyTorch warns when its own object is pickled."""
    structures = graphs.structures_of(graph)
    if structures is None:
        return graphs.code_generator(graph)
    args, *specs = structures
    return (args, *(None if s is None else tree.dump_spec(s) for s in specs))


def _load_codegen(dump: Any) -> CodeGen:
    if isinstance(dump, CodeGen):
        return dump
    args, *specs = dump
    loaded = (None if s is None else tree.load_spec(s) for s in specs)
    codegen: CodeGen = graphs.with_structures(args, *loaded)
    return codegen


def _name(target: Any) -> Any:
    """The name of a function if it resolves to that function, else the function itself.

    Some functions cannot be pickled directly, for example `F.max_pool2d` and ATen overloads.
    """
    try:
        name = graphs.qualified_name(target)
        return _Named(name) if _resolve(name) is target else target
    except (RuntimeError, AttributeError, ImportError):
        return target


def _resolve(name: str) -> Any:
    parts = name.split(".")
    reason: Exception | None = None
    for cut in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:cut]))
            return reduce(getattr, parts[cut:], module)
        except (ImportError, AttributeError) as error:
            reason = error
    raise AttributeError(
        f"the graph calls {name!r}, which cannot be imported ({reason}). Install or import the package that defines "
        f"it before loading the graph."
    ) from reason


@contextlib.contextmanager
def keywords_as_names() -> Iterator[None]:
    """Generate ``getattr(self, "in")`` for a submodule named ``in``; FX generates ``self.in``, a syntax error."""

    def write(usual: Callable[[str, str], str]) -> Callable[[str, str], str]:
        def written(base: str, target: str) -> str:
            if not any(keyword.iskeyword(name) for name in target.split(".")):
                return usual(base, target)
            for name in target.split("."):
                base = f'getattr({base}, "{name}")'
            return base

        return written

    with LOCK, graphs.attributes_written_by(write):
        yield


def can_be_written(value: Any) -> bool:
    """Whether the generated code of a graph can contain a value."""
    plain = (int, float, complex, bool, str, type(None), torch.dtype, torch.device)
    return isinstance(value, Tensor) or type(value) in plain
