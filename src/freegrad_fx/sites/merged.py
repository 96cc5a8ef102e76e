"""Finds linear layers and convolutions whose result goes into a batch norm alone: in eval mode, both are one layer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx, nn

from .._torch.modules import has_hooks
from ..graph.nodes import called_module, first_argument, operand_node, spelled
from ..vocabulary.activations import OPS
from ..vocabulary.calls import constants_of
from .compound import Compound, Merged, uses_of

__all__ = ["MERGED", "merged_at"]

MERGED = {"linear": "linear_bn", "conv": "conv_bn"}
"""The operations that a batch norm can follow, and the names of the pairs."""


def merged_at(node: fx.Node, root: nn.Module, wanted: Collection[str]) -> Compound | None:
    """The layer that a batch norm and the operation before it are; None if a node is no such batch norm.

    Args:
        node: A node.
        root: The module whose submodules the graph calls.
        wanted: The pairs that are wanted.
    """
    found = spelled(node, root, ("batch_norm",))
    if found is None or found.op.name != "batch_norm":
        return None
    layer = operand_node(node, found.operands[0])
    spelling = None if layer is None else spelled(layer, root, tuple(MERGED))
    if layer is None or spelling is None or MERGED.get(spelling.op.name) not in wanted:
        return None
    operands = {operand.name: operand for operand in spelling.operands}
    if "x" not in operands or "weight" not in operands:
        return None
    module, first = called_module(layer, root), first_argument(layer)
    given = constants_of(
        spelling.op, spelling.operands, layer.target, layer.args[first:], layer.kwargs, module
    )
    modules = [module, called_module(node, root)]
    obstacle = ""
    if given is None:
        obstacle = "this call cannot be computed again at other operands"
    elif uses_of(layer) != [node]:
        obstacle = (
            "the result of the layer does not go into the batch norm alone, so that they are no single layer; give "
            f"{spelling.op.name!r} a rule"
        )
    elif any(m is not None and has_hooks(m) for m in modules):
        obstacle = "a hook can change what goes from the layer into the batch norm; remove it"
    return Compound(
        OPS[MERGED[spelling.op.name]],
        (layer, node),
        {"x": (layer, operands["x"].key)},
        given or {},
        f"{_written(layer, module)}, {_written(node, modules[1])}",
        obstacle,
        merged=Merged(operands["weight"], operands.get("bias")),
    )


def _written(node: fx.Node, module: nn.Module | None) -> str:
    return type(module).__name__ if module is not None else str(_named(node.target))


def _named(target: Any) -> Any:
    return getattr(target, "__name__", target)
