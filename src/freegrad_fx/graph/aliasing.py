"""Alias analysis: which nodes of a graph may share memory, and which of them write into it.

In doubt the answer is "may share": a wrong "no" would cause a wrong gradient, a wrong "yes" costs one copy.
Independent of rules.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .._torch.modules import FRESH_BASES, has_forward_hooks
from .._torch.operators import Overload, is_composite, schema
from .._torch.parametrized import plain_class
from ..ops.functions import apply_function
from ..vocabulary.op import Spelling
from .nodes import argument, attribute, called_module, first_argument, hooked_module, spelled

__all__ = [
    "LIBRARIES",
    "Aliasing",
    "may_write",
    "named_in_place",
    "of_library",
    "written_argument",
]

# Modules, functions and methods that always return newly allocated memory.
_FRESH_MODULES: tuple[type[nn.Module], ...] = (
    *FRESH_BASES,
    nn.Linear,
    nn.Bilinear,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
_FRESH_FUNCTIONS = frozenset(
    {
        operator.sub,
        operator.truediv,
        operator.pow,
        operator.neg,
        operator.matmul,
        torch.add,
        torch.sub,
        torch.mul,
        torch.div,
        torch.matmul,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
        torch.cat,
        torch.concat,
        torch.stack,
        torch.clone,
        torch.exp,
        torch.sqrt,
        torch.rsqrt,
        torch.mean,
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        F.batch_norm,
        F.layer_norm,
        F.group_norm,
        F.instance_norm,
        F.max_pool1d,
        F.max_pool2d,
        F.max_pool3d,
        F.avg_pool1d,
        F.avg_pool2d,
        F.avg_pool3d,
        F.embedding,
        F.scaled_dot_product_attention,
    }
)
_FRESH_METHODS = frozenset(
    {"add", "sub", "mul", "div", "matmul", "bmm", "clone", "mean", "exp", "pow", "sqrt"}
)
_INPLACE_OPERATORS = frozenset(
    getattr(operator, f"i{name}")
    for name in [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "concat",
    ]
) | {operator.setitem}


class Aliasing:
    """Groups the nodes of one graph by the memory that they may share.

    The analysis is done once, on construction; it does not see nodes that are inserted later.

    Args:
        graph: The graph, before it is rewritten.
        root: The module whose submodules the graph calls.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self._root = root
        self._parent: dict[fx.Node, fx.Node] = {node: node for node in graph.nodes}
        # Nodes whose value is known to be one tensor, not a tuple or list of tensors
        self._tensors: set[fx.Node] = set()
        written: list[tuple[fx.Node, fx.Node]] = []
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            # Looking them up takes as long as all else that is asked here
            module, spelling = called_module(node, root), spelled(node, root)
            target = _written(node, root, module, spelling)
            if target is not None:
                written.append((target, node))
                self._join(node, target)
            elif _writes_anything(node, root, module):
                written += [(argument, node) for argument in node.all_input_nodes]
            if self._is_fresh(node, module, spelling):
                if not _returns_several(module):
                    self._tensors.add(node)
            elif target is None or not self._is_tensor(target):
                for argument in node.all_input_nodes:
                    self._join(node, argument)
        self._members: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            self._members[self._find(node)].append(node)
        self._writes: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for target, writer in written:
            self._writes[self._find(target)].append(writer)

    def _is_tensor(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and (
            value in self._tensors or isinstance(attribute(value, self._root), torch.Tensor)
        )

    def _is_fresh(self, node: fx.Node, module: nn.Module | None, spelling: Spelling | None) -> bool:
        if node.target in (operator.add, operator.mul):
            # on tuples and lists, `+` and `*` return a sequence of the same tensors
            numbers = node.target is operator.add and any(
                isinstance(a, int | float) for a in node.args
            )
            return numbers or any(map(self._is_tensor, node.args))
        return _is_fresh(node, module, spelling)

    def read_elsewhere_after(self, x: fx.Node, node: fx.Node) -> bool:
        """Whether memory that `x` may share is read after `node` through another node than `x` and `node`.

        Inputs and attributes count as read later: the caller or the model holds them.
        """
        return any(
            user > node
            for other in self._members[self._find(x)]
            if other is not x and other < node
            for user in other.users
            if user is not node
        ) or any(other.op in ("placeholder", "get_attr") for other in self._members[self._find(x)])

    def read_after(self, x: fx.Node, node: fx.Node) -> bool:
        """Whether memory that `x` may share is read after `node`, through `x` or another node than `node`."""
        return any(user > node for user in x.users) or self.read_elsewhere_after(x, node)

    def written_after(self, x: fx.Node, node: fx.Node, certainly: bool = False) -> bool:
        """Whether a node after `node` writes into memory that `x` may share.

        Args:
            x: The node whose memory is meant.
            node: Only later nodes count.
            certainly: Count only calls that are known to write, not opaque calls, which can write into any argument.
        """
        return any(
            writer > node and not (certainly and _may_write_anything(writer, self._root))
            for writer in self._writes[self._find(x)]
        )

    def written_between(self, x: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Whether a node between two others may write into memory that `x` may share."""
        return any(first < writer < last for writer in self._writes[self._find(x)])

    def written(self, x: fx.Node) -> bool:
        """Whether a call that is known to write writes into memory that `x` may share; opaque calls do not count."""
        return any(
            not _may_write_anything(writer, self._root) for writer in self._writes[self._find(x)]
        )

    def _find(self, node: fx.Node) -> fx.Node:
        while (parent := self._parent[node]) is not node:
            self._parent[node] = node = self._parent[parent]
        return node

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        self._parent[self._find(a)] = self._find(b)


def _returns_several(module: nn.Module | None) -> bool:
    several = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    return isinstance(module, several) or bool(getattr(module, "return_indices", False))


def _of_torch(module: nn.Module) -> bool:
    """Whether a module is one of torch.nn without forward hooks, so that it behaves as documented."""
    kind = plain_class(module)
    return kind.__module__.startswith("torch.nn.modules.") and not has_forward_hooks(module)


def _may_write_anything(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is an opaque call: it runs user code that was not traced."""
    return _writes_anything(node, root, called_module(node, root))


def _writes_anything(node: fx.Node, root: nn.Module, module: nn.Module | None) -> bool:
    if module is not None:
        return not _of_torch(module)
    if hooked_module(node, root) is not None:
        return True
    if node.op == "call_function":
        return node.target is apply_function or not of_library(node.target)
    return False


# Functions of these top-level modules have known semantics; all others are user code.
LIBRARIES = ("torch", "_operator", "operator", "builtins", "math", "freegrad_fx")


def of_library(function: Any) -> bool:
    """Whether a function is defined in one of `LIBRARIES`. A builtin without a module counts as PyTorch's."""
    return (getattr(function, "__module__", None) or "torch").partition(".")[0] in LIBRARIES


def named_in_place(name: str) -> bool:
    """Whether a name ends in a single underscore, PyTorch's convention for in-place functions and methods."""
    return name.endswith("_") and not name.endswith("__")


def may_write(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node may write into one of its arguments."""
    return written_argument(node, root) is not None or _may_write_anything(node, root)


def written_argument(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The argument that a node writes into, or None.

    A write is recognised by an in-place name or operator, by `inplace` as an argument or attribute, by ``out=``, by the
    schema of an operator, or by `max_norm` of an embedding lookup.
    """
    return _written(node, root, called_module(node, root), spelled(node, root))


def _written(
    node: fx.Node, root: nn.Module, module: nn.Module | None, spelling: Spelling | None
) -> fx.Node | None:
    if hooked_module(node, root) is not None:  # the keywords are those of the module
        return None
    if spelling is not None:
        return argument(node, spelling.key) if spelling.inplace else None
    if isinstance(node.target, Overload):
        written = [
            a.name for a in schema(node.target).arguments if a.alias_info and a.alias_info.is_write
        ]
        names = [a.name for a in schema(node.target).arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        found = [value for n in written if isinstance(value := given.get(n), fx.Node)]
        return found[0] if found else None
    if node.target in (F.embedding, F.embedding_bag):
        return _renormalised(node)
    if node.op == "call_method":
        name = str(node.target)
        writes = named_in_place(name)
    elif node.op == "call_function" and module is None:
        name = getattr(node.target, "__name__", "")
        writes = node.target in _INPLACE_OPERATORS or named_in_place(name)
    else:
        writes = bool(getattr(module, "inplace", False))
    writes = writes or bool(node.kwargs.get("inplace", False)) or _positional_inplace(node)
    if isinstance(out := node.kwargs.get("out"), fx.Node):
        return out
    inputs = [*node.args[first_argument(node) :], *node.kwargs.values()]
    return next((a for a in inputs if isinstance(a, fx.Node)), None) if writes else None


def _renormalised(node: fx.Node) -> fx.Node | None:
    """The weight of an embedding lookup with `max_norm`, which renormalises the rows that it reads in place."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    limit = node.args[3] if len(node.args) > 3 else node.kwargs.get("max_norm")
    return weight if isinstance(weight, fx.Node) and limit is not None else None


def _positional_inplace(node: fx.Node) -> bool:
    """Whether a call such as `F.dropout(x, 0.5, True, True)` sets `inplace`, the fourth argument of dropouts."""
    name = getattr(node.target, "__name__", "")
    return "dropout" in name and len(node.args) > 3 and bool(node.args[3])


# Composite ATen operators that return new memory. For operators that are not composite, the schema is reliable.
_FRESH_COMPOSITES = frozenset(
    {
        "aten::linear",
        "aten::matmul",
        "aten::conv1d",
        "aten::conv2d",
        "aten::conv3d",
        "aten::conv_transpose1d",
        "aten::conv_transpose2d",
        "aten::conv_transpose3d",
        "aten::batch_norm",
        "aten::instance_norm",
        "aten::layer_norm",
        "aten::group_norm",
        "aten::max_pool1d",
        "aten::max_pool2d",
        "aten::max_pool3d",
        "aten::avg_pool1d",
        "aten::adaptive_avg_pool1d",
        "aten::adaptive_avg_pool2d",
        "aten::adaptive_avg_pool3d",
        "aten::scaled_dot_product_attention",
    }
)


def _is_fresh_aten(target: Overload[..., Any]) -> bool:
    found = schema(target)
    if found.name in _FRESH_COMPOSITES:
        return True
    return not is_composite(target) and all(r.alias_info is None for r in found.returns)


def _is_fresh(node: fx.Node, module: nn.Module | None, spelling: Spelling | None) -> bool:
    if isinstance(node.target, Overload):
        return _is_fresh_aten(node.target)
    names = {"call_method": _FRESH_METHODS, "call_function": _FRESH_FUNCTIONS}
    if node.target in names.get(node.op, frozenset()):
        return True
    if module is not None and not _of_torch(module):
        return False
    if isinstance(module, _FRESH_MODULES):
        return True
    # Out of place, every elementwise activation except the identity returns a new tensor.
    return spelling is not None and spelling.op.elementwise and spelling.op.name != "identity"
