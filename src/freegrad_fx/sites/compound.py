"""Compound operations: those that a model computes by several calls, such as an RMSNorm in separate operations.

They are found by their dataflow, not by names. All their calls stay in the graph; a rule acts on what goes in and out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import fx

from .._torch.graphs import grad_mode_setter
from ..graph.provenance import origin
from ..vocabulary.comparisons import function_name
from ..vocabulary.op import Op, Operand
from .alone import Alone

__all__ = [
    "Compound",
    "changes_grad_mode",
    "given",
    "is_cast",
    "is_number",
    "name_of",
    "nodes_between",
    "obstacle_inside",
    "uses_of",
    "without_casts",
]


@dataclass(frozen=True)
class Merged:
    """Where a layer, into which the batch norm behind it is merged, has its own parameters.

    Attributes:
        weight: The weight.
        bias: The bias, if the layer has one.
    """

    weight: Operand
    bias: Operand | None


@dataclass(frozen=True)
class Compound:
    """An operation that a graph computes by several calls.

    Attributes:
        op: Its line in the vocabulary.
        parts: The nodes of the calls, in their order. The last one computes the result.
        reads: For each operand by name, a part that reads it, and the place of the argument.
        constants: The further arguments of the operation.
        spelling: The calls, as text.
        obstacle: The reason why no rule can act on it; ``""`` if one can.
        alone: The operation as a function of its only operand; None if it has several.
        merged: For a layer and a batch norm: where the first part has its parameters.
        computed: Nodes of operands that no part reads, because they are computed for the rules alone.
    """

    op: Op
    parts: tuple[fx.Node, ...]
    reads: Mapping[str, tuple[fx.Node, int | str]]
    constants: Mapping[str, Any] = field(default_factory=dict)
    spelling: str = ""
    obstacle: str = ""
    alone: Alone | None = field(default=None, compare=False)
    merged: Merged | None = None
    computed: Mapping[str, fx.Node] = field(default_factory=dict)

    @property
    def node(self) -> fx.Node:
        """The node that computes the result."""
        return self.parts[-1]

    def operand(self, name: str) -> fx.Node:
        """The node of an operand, which an earlier rewrite can have replaced."""
        part, key = self.reads[name]
        found = part.args[key] if isinstance(key, int) else part.kwargs[key]
        assert isinstance(found, fx.Node)
        return found

    def moved(self, nodes: Mapping[fx.Node, fx.Node]) -> Self:
        """The operation in a copy of the graph.

        Args:
            nodes: The nodes of the copy, by those of the graph.
        """
        parts = tuple(nodes[part] for part in self.parts)
        reads = {name: (nodes[part], key) for name, (part, key) in self.reads.items()}
        return replace(self, parts=parts, reads=reads)

    def readers(self, name: str) -> list[fx.Node]:
        """The parts that read an operand, in their order."""
        value = self.operand(name)
        return [part for part in self.parts if value in part.all_input_nodes]


# --- questions about nodes, for those who look for compound operations ---

_SYNONYMS = {
    "truediv": "div",
    "divide": "div",
    "true_divide": "div",
    "multiply": "mul",
    "subtract": "sub",
}
_CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as", "_to_copy"})
_DESCRIBE = frozenset(
    {"size", "dim", "ndimension", "numel", "is_floating_point"}
    | {"_assert_tensor_metadata", "require_metadata"}
)
_DESCRIBED = frozenset({"dtype", "shape", "device", "ndim", "is_cuda", "requires_grad"})


def name_of(node: Any) -> str:
    """One name for each function of PyTorch that a node calls, whatever its spelling; ``""`` for what is no call."""
    name = function_name(node) if isinstance(node, fx.Node) else ""
    return _SYNONYMS.get(name, name)


def given(node: fx.Node, index: int, *names: str) -> Any:
    """An argument of a call, by its index or one of its names; None if it is left out."""
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def is_number(value: Any) -> bool:
    """Whether an argument is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_cast(node: Any) -> bool:
    """Whether a node converts its first argument to another dtype of floats or device, and does nothing else."""
    if name_of(node) not in _CASTS or not isinstance(node.args[0] if node.args else None, fx.Node):
        return False
    dtypes = (a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype))
    return all(dtype.is_floating_point for dtype in dtypes)


def without_casts(node: fx.Node) -> list[fx.Node]:
    """A node and what it converts: the node, its source if it is a cast, and so on."""
    found = [node]
    while is_cast(found[-1]):
        source = found[-1].args[0]
        assert isinstance(source, fx.Node)
        found.append(source)
    return found


def uses_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that use the values of a node, not only its shape or dtype."""
    return [user for user in node.users if not _describes(user, node)]


def _describes(user: fx.Node, node: fx.Node) -> bool:
    if user.target is getattr:
        return user.args[1] in _DESCRIBED
    if name_of(user) == "type_as":
        return user.args[0] is not node
    return name_of(user).removeprefix("sym_") in _DESCRIBE


def obstacle_inside(parts: Collection[fx.Node], result: fx.Node) -> str:
    """The reason why parts are no operation of their own, as other code uses what they compute; ``""`` if they are."""
    inside = {*parts}
    for part in parts:
        if part is result:
            continue
        for user in uses_of(part):
            if user not in inside:
                where = origin(user).source
                return (
                    f"a value inside of it, that of {name_of(part) or part.name}, is used elsewhere too"
                    f"{f' ({where})' if where else ''}, so that its gradient is not that of the operation alone. "
                    f"Compute the value there again, or give the rule to the operations that it consists of"
                )
    return ""


def changes_grad_mode(first: fx.Node, last: fx.Node) -> bool:
    """Whether gradients are switched on or off between two nodes."""
    return any(node.target is grad_mode_setter() for node in nodes_between(first, last))


def nodes_between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes from one on, up to another one, which does not count."""
    node = first
    while node is not last:
        yield node
        node = node.next
