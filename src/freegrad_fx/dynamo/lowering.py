"""Lowers rewritten graphs to operators, because caches of compiled code refuse functions of this package."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..backward.operator import operands
from ..capture.captured import sets_grad_mode
from ..context import explicit_rules_act
from ..core.rule import get
from ..ops.checks import warn_if_native
from ..ops.gradients import decoupled, stop_gradient

__all__ = ["lower"]


_OF_RULES = (
    stop_gradient,
    decoupled,
    torch.ops.aten.detach.default,
    torch.ops.freegrad_fx.decoupled.default,
)


def lower(graph: fx.Graph) -> None:
    """Replace `stop_gradient` and `decoupled` by operators in a graph that Dynamo captured.

    AOTAutograd's cache refuses unknown functions. The functions check at each call whether gradients are enabled and
    whether rules act. The graph is lowered only if both are true for as long as the compiled graph is valid.
    """
    if not torch.is_grad_enabled() or sets_grad_mode(graph) or not explicit_rules_act():
        return
    for node in graph.nodes:
        if node.target is warn_if_native:
            graph.erase_node(node)
        if node.target not in (stop_gradient, decoupled) or node.kwargs.get("ambient"):
            continue
        if node.kwargs.get("native"):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        if node.kwargs.get("operation") and get(node.kwargs["rule"]).declaration.needs_operation:
            continue  # its operands are arguments of the function
        source = node.args[0]
        while source.target in _OF_RULES:
            source = source.args[0]  # nodes that a rewrite inserted have no example value
        if not isinstance(source.meta.get("example_value"), Tensor):
            continue  # such as abs(), which also takes numbers
        if node.target is stop_gradient:
            node.target, node.kwargs = torch.ops.aten.detach.default, {}
        else:
            kwargs = dict(node.kwargs)
            rule, site = get(kwargs.pop("rule")), kwargs.pop("site")
            save, _ = kwargs.pop("save", rule.save), kwargs.pop("compile", None)
            for name in (
                "operation",
                "operands",
            ):  # a compiler chooses itself what it computes again
                kwargs.pop(name, None)
            tensors, numbers, call = operands(rule, site, kwargs, save)
            if call and all(isinstance(value, fx.Node) for value in tensors):
                node.target = torch.ops.freegrad_fx.decoupled.default
                y, x, *read = node.args
                node.args, node.kwargs = (y, x, tensors, numbers, call, *read), {}
