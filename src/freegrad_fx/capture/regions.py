"""Restores in one graph what torch.export decomposes or moves into nested graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .._torch.graphs import grad_mode_getter, grad_mode_setter
from ..errors import CaptureError
from ..graph.provenance import META
from ..sites.remarks import Opaque
from .merge import Exported

__all__ = ["collapse", "find", "hidden_regions", "inline_grad_modes"]


# Functions that export decomposes and that are one activation for the user
_COMPOSITES = {
    "function.softsign": F.softsign,
    "function.tanhshrink": F.tanhshrink,
    "function.softmin": F.softmin,
}


def find(module: nn.Module, target: str) -> Any:
    """The attribute of a module at a dotted path; None if there is none."""
    found: Any = module
    for name in target.split("."):
        found = getattr(found, name, None)
    return found


def inline_grad_modes(module: nn.Module, graph: fx.Graph) -> None:
    """Inline `no_grad` regions, which export makes nested graphs, between two changes of the grad mode."""
    for node in list(graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_autocast:
            raise CaptureError(
                "torch.autocast inside a forward cannot be captured by torch.export. Enter it around the call of the "
                "model."
            )
        if node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
            continue
        enabled, holder, *operands = node.args
        region = find(module, str(holder.target))
        inline_grad_modes(region, region.graph)
        inside = list(region.graph.nodes)
        values = dict(zip([n for n in inside if n.op == "placeholder"], operands, strict=True))
        results: Any = ()
        with graph.inserting_before(node):
            before = graph.call_function(grad_mode_getter)
            start = graph.call_function(grad_mode_setter(), (enabled,))
            for inner in inside:
                if inner.op == "output":
                    results = fx.map_arg(inner.args[0], values.__getitem__)
                elif inner.op == "get_attr":
                    name = f"{holder.target}_{inner.target}".replace(".", "_")
                    setattr(module, name, find(region, str(inner.target)))
                    values[inner] = graph.create_node("get_attr", name)
                elif inner.op != "placeholder":
                    values[inner] = graph.node_copy(inner, values.__getitem__)
            end = graph.call_function(grad_mode_setter(), (before,))
        for made in (before, start, end):
            made.meta = dict(node.meta)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not holder.users:
            graph.erase_node(holder)


def collapse(graph: fx.Graph) -> None:
    """Replace the nodes of a decomposed activation by one call, so that a rule applies to the activation."""
    groups: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        call, function = node.meta.get("torch_fn", ("", ""))
        if function in _COMPOSITES:
            groups.setdefault(call, []).append(node)
    for nodes in groups.values():
        last, inside = nodes[-1], set(nodes)
        (x,) = {n for node in nodes for n in node.all_input_nodes if n not in inside}
        function = last.meta["torch_fn"][1]
        # aten.softmax.int(x, dim, dtype)
        rest = last.args[1:] if function == "function.softmin" else ()
        more = {"dtype": rest[1]} if len(rest) > 1 else {}
        with graph.inserting_before(last):
            whole = graph.call_function(_COMPOSITES[function], (x, *rest[:1]), more)
        whole.meta = dict(last.meta)
        last.replace_all_uses_with(whole)
        for node in reversed(nodes):
            graph.erase_node(node)


def hidden_regions(exported: Exported) -> Iterator[Opaque]:
    """The regions that remain nested graphs, such as checkpoints and conditionals."""
    for node in exported.graph.nodes:
        if node.op == "get_attr" and isinstance(
            exported.parts.get(str(node.target)), fx.GraphModule
        ):
            user = next(iter(node.users), node)
            owner = node.meta[META]
            name = getattr(user.target, "__name__", user.target)
            what = f"the region of {name}, kept as one opaque call"
            yield Opaque(owner.owner, what, "it is a nested graph", owner.source)
