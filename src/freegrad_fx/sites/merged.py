"""Finds linear layers and convolutions whose result goes into a batch norm alone: in eval mode, both are one layer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx, nn

from .._torch.modules import has_hooks_between
from ..graph.nodes import called_module, called_path, first_argument, operand_node, spelled
from ..graph.provenance import origin
from ..vocabulary.activations import OPS
from ..vocabulary.calls import constants_of
from .compound import Compound, Merged, uses_of

__all__ = ["MERGED", "boundaries", "merged_at"]

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
    left, entered = (
        [root.get_submodule(path) for path in paths] for paths in boundaries(layer, node, root)
    )
    obstacle = ""
    if given is None:
        obstacle = "this call cannot be computed again at other operands"
    elif uses_of(layer) != [node]:
        obstacle = (
            "the result of the layer does not go into the batch norm alone, so that they are no single layer; give "
            f"{spelling.op.name!r} a rule"
        )
    elif has_hooks_between(left, entered):
        obstacle = "a hook can change what goes from the layer into the batch norm; remove it"
    return Compound(
        OPS[MERGED[spelling.op.name]],
        (layer, node),
        {"x": (layer, operands["x"].key)},
        given or {},
        f"{_written(layer, module)}, {_written(node, called_module(node, root))}",
        obstacle,
        merged=Merged(operands["weight"], operands.get("bias")),
    )


def boundaries(layer: fx.Node, norm: fx.Node, root: nn.Module) -> tuple[list[str], list[str]]:
    """The paths of the modules whose calls end between two nodes, and of those whose calls begin there.

    Args:
        layer: The first node.
        norm: The second.
        root: The module with the submodules.
    """
    around = [_modules_around(node, root) for node in (layer, norm)]
    return [p for p in around[0] if p not in around[1]], [
        p for p in around[1] if p not in around[0]
    ]


def _modules_around(node: fx.Node, root: nn.Module) -> list[str]:
    """The paths of the submodules in whose calls a node is."""
    path = origin(node).owner if called_module(node, root) is None else called_path(node)
    steps = path.split(".") if path else []
    found, module = [], root
    for count, step in enumerate(steps, 1):
        inner = getattr(module, step, None)
        if not isinstance(inner, nn.Module):
            break  # Dynamo's graphs have no submodules, and contain what hooks do
        module = inner
        found.append(".".join(steps[:count]))
    return found


def _written(node: fx.Node, module: nn.Module | None) -> str:
    return type(module).__name__ if module is not None else str(_named(node.target))


def _named(target: Any) -> Any:
    return getattr(target, "__name__", target)
