"""Finds steps that a model computes as comparisons: they have no gradient, and no rule can be given to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from .._torch.graphs import grad_mode_setter
from ..graph.nodes import attribute, called_module
from ..graph.provenance import origin
from .remarks import Remark

__all__ = ["find_steps"]

_STEPS = {
    "a > b": ("heaviside(a - b)", ("gt", "greater")),
    "a >= b": ("heaviside(a - b, 1.0)", ("ge", "greater_equal")),
    "a < b": ("heaviside(b - a)", ("lt", "less")),
    "a <= b": ("heaviside(b - a, 1.0)", ("le", "less_equal")),
}
_COMPARISONS = {name: written for written, (_, names) in _STEPS.items() for name in names}
_TO_FLOAT = ("float", "double", "half", "bfloat16", "type_as")
# Their results have no gradient
_CONSTANT = frozenset(
    {*_COMPARISONS, "eq", "ne", "detach", "size", "dim", "numel", "argmax", "argmin", "argsort"}
    | {"long", "int", "bool", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
    | {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "empty_like", "item"}
)
_METADATA = ("shape", "dtype", "device", "ndim", "requires_grad")


def find_steps(graph: fx.Graph, root: nn.Module) -> list[Remark]:
    """List the comparisons whose result is converted to floating point numbers, and goes on with a gradient expected.

    Comparisons of what no parameter acts on, such as the lengths in a mask, are left out; and so are those of detached
    tensors, a `straight-through` sum with a detached term, and the product of a tensor with its own mask.

    Args:
        graph: A captured graph, before it is rewritten.
        root: The module whose submodules and parameters the graph uses.
    """
    if not any(_name(node) in _COMPARISONS for node in graph.nodes):
        return []
    found: dict[Remark, None] = {}
    learnt = _learnt(graph, root)
    for node in graph.nodes:
        compared = node.args[0] if node.args else None
        if (
            node in learnt
            and _is_cast(node)
            and isinstance(compared, fx.Node)
            and _name(compared) in _COMPARISONS
            and _goes_on(node, compared)
        ):
            found[_remark(node, compared)] = None
    return list(found)


def _remark(cast: fx.Node, comparison: fx.Node) -> Remark:
    written = _COMPARISONS[_name(comparison)]
    where = origin(cast)
    reason = (
        f"the result has no gradient, and no rule can act there. If the step is to be trained through, write it as "
        f"freegrad_fx.vocabulary.{_STEPS[written][0]}, and give the op 'heaviside' a rule"
    )
    return Remark(where.owner, f"{written}, converted to numbers", reason, where.source)


def _learnt(graph: fx.Graph, root: nn.Module) -> set[fx.Node]:
    """The nodes that depend on parameters, and the conversions of comparisons between such nodes.

    If the graph has no parameters, its inputs take their place.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    learnt = {node for node in inputs if origin(node).parameter}
    if not learnt and next(root.parameters(), None) is None:
        learnt = {node for node in inputs if _may_be_float(node)}
    compared = set()
    enabled = True
    for node in graph.nodes:
        if node.target is grad_mode_setter():
            enabled = node.args[0] is not False
        if not enabled:
            continue
        if _name(node) in _COMPARISONS and not learnt.isdisjoint(node.all_input_nodes):
            compared.add(node)
        elif _is_learnt(node, learnt, root) or (_is_cast(node) and node.args[0] in compared):
            learnt.add(node)
    return learnt


def _is_learnt(node: fx.Node, learnt: set[fx.Node], root: nn.Module) -> bool:
    if node.op == "get_attr":
        return isinstance(attribute(node, root), nn.Parameter)
    module = called_module(node, root)
    if module is not None and next(module.parameters(), None) is not None:
        return True
    constant = _name(node) in _CONSTANT or (
        node.target is getattr and len(node.args) > 1 and node.args[1] in _METADATA
    )
    return not constant and not learnt.isdisjoint(node.all_input_nodes)


def _goes_on(cast: fx.Node, comparison: fx.Node) -> bool:
    """Whether the result of a conversion is used where a gradient is expected."""
    seen, waiting = {cast}, [cast]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            others = [other for other in user.all_input_nodes if other is not node]
            name = _name(user)
            if name == "detach" or (
                name in ("mul", "mul_") and not set(others).isdisjoint(comparison.all_input_nodes)
            ):
                continue
            if name not in ("add", "sub"):
                return True
            if not any(_name(other) == "detach" for other in others) and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False


def _is_cast(node: fx.Node) -> bool:
    """Whether a node converts to floating point numbers."""
    name = _name(node)
    if name in _TO_FLOAT:
        return True
    if name not in ("to", "type", "_to_copy"):
        return False
    return any(map(_is_float, (*node.args[1:], *node.kwargs.values())))


def _is_float(argument: Any) -> bool:
    """Whether an argument of a conversion may be a floating point dtype, or a tensor of one."""
    if isinstance(argument, fx.Node):
        # `.to(x.dtype)`, `.to(x)`; not `.to(x.device)`
        return argument.target is not getattr or argument.args[1] == "dtype"
    return isinstance(argument, torch.dtype) and argument.is_floating_point


def _may_be_float(node: fx.Node) -> bool:
    example = node.meta.get("val", node.meta.get("example_value"))
    return not isinstance(example, Tensor) or example.is_floating_point()


def _name(node: fx.Node) -> str:
    """The name of the function or method that a node calls, without an overload; ``""`` for other nodes."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", "")).partition(".")[0]
    return ""
