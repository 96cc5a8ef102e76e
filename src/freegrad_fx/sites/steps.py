"""Finds steps that a model computes as comparisons, which have no gradient, for the notes of the report."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, fx, nn

from .._torch.graphs import grad_mode_setter
from ..graph.nodes import attribute, called_module
from ..graph.provenance import origin
from ..vocabulary.comparisons import COMPARISONS, Step, function_name, step_at
from .remarks import Remark

__all__ = ["find_steps"]

_REMEDIES = {
    "a > b": "heaviside(a - b)",
    "a >= b": "heaviside(a - b, 1.0)",
    "a < b": "heaviside(b - a)",
    "a <= b": "heaviside(b - a, 1.0)",
}
# Their results have no gradient
_CONSTANT = frozenset(
    {*COMPARISONS, "eq", "ne", "detach", "size", "dim", "numel", "argmax", "argmin", "argsort"}
    | {"long", "int", "bool", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
    | {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "empty_like", "item"}
)
_METADATA = ("shape", "dtype", "device", "ndim", "requires_grad")


def find_steps(graph: fx.Graph, root: nn.Module, but: Collection[fx.Node] = ()) -> list[Remark]:
    """List the comparisons whose result is converted to floating point numbers, and goes on with a gradient expected.

    Comparisons of what no parameter acts on, such as the lengths in a mask, are left out; and so are those of detached
    tensors, a `straight-through` sum with a detached term, and the product of a tensor with its own mask.

    Args:
        graph: A captured graph, before it is rewritten.
        root: The module whose submodules and parameters the graph uses.
        but: The conversions that an entry decides.
    """
    if not any(function_name(node) in COMPARISONS for node in graph.nodes):
        return []
    found: dict[Remark, None] = {}
    learnt = _learnt(graph, root)
    for node in graph.nodes:
        step = step_at(node) if node in learnt and node not in but else None
        if step is not None and _goes_on(node, step.compared):
            found[_remark(step)] = None
    return list(found)


def _remark(step: Step) -> Remark:
    written = COMPARISONS[function_name(step.compared)]
    where = origin(step.node)
    reason = (
        f"the result has no gradient. If the step is to be trained through, give the op 'heaviside' a rule, which acts "
        f"here too, or write it as freegrad_fx.vocabulary.{_REMEDIES[written]}"
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
        if function_name(node) in COMPARISONS and not learnt.isdisjoint(node.all_input_nodes):
            compared.add(node)
        elif _is_learnt(node, learnt, root) or (
            (step := step_at(node)) is not None and step.compared in compared
        ):
            learnt.add(node)
    return learnt


def _is_learnt(node: fx.Node, learnt: set[fx.Node], root: nn.Module) -> bool:
    if node.op == "get_attr":
        return isinstance(attribute(node, root), nn.Parameter)
    module = called_module(node, root)
    if module is not None and next(module.parameters(), None) is not None:
        return True
    constant = function_name(node) in _CONSTANT or (
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
            name = function_name(user)
            if name == "detach" or (
                name in ("mul", "mul_") and not set(others).isdisjoint(comparison.all_input_nodes)
            ):
                continue
            if name not in ("add", "sub"):
                return True
            if not any(function_name(other) == "detach" for other in others) and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False


def _may_be_float(node: fx.Node) -> bool:
    example = node.meta.get("val", node.meta.get("example_value"))
    return not isinstance(example, Tensor) or example.is_floating_point()
