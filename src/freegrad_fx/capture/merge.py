"""Merges the exported graphs of train and eval mode into one graph that reads the `training` flags."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._torch.graphs import structures_of
from ..graph.provenance import META, origin
from ..sites.remarks import Lost
from .python_state import Attribute

__all__ = ["Exported", "FlagRead", "merge"]


@dataclass(frozen=True)
class Exported:
    """The graph of one mode.

    Attributes:
        graph: The graph.
        parts: The modules and constants that the export created, by their names in the graph.
        lost: What the forward does and the graph does not.
        assigned: The attributes that the forward assigns and the graph assigns or loses, by module path and name.
    """

    graph: fx.Graph
    parts: dict[str, Any] = field(default_factory=dict)
    lost: tuple[Lost, ...] = ()
    assigned: tuple[Attribute, ...] = ()


@dataclass(frozen=True)
class FlagRead:
    """One read of a `training` flag during an export.

    Attributes:
        reader: The path of the module whose method reads the flag; None if the code is not a method of a module.
        read: The path of the module that has the flag.
        users: Whether the code that reads the flag is user code, not code of PyTorch.
    """

    reader: str | None
    read: str
    users: bool


def merge(train: Exported, evaluation: Exported, reads: Collection[FlagRead]) -> list[str]:
    """Replace constants that came from `training` flags by reads of the flags, in both graphs.

    A constant that is True in train mode and False in eval mode is attributed to the flag of the module that owns its
    node, unless this module reads the flag of another module. The counters of BatchNorm layers, which only the graph of
    train mode has, are added to the graph of eval mode.

    Args:
        train: The graph of train mode; it is changed.
        evaluation: The graph of eval mode; it is changed.
        reads: The flags that were read during the exports.

    Returns:
        The sorted paths of the modules whose code differs in another way, and of those on whose flags they branch. Each
        graph is valid if all these modules are in its mode. If there are none, the graphs are equal, and valid in every
        mode.
    """
    counters = [node for node in train.graph.nodes if _counts_batches(node)]
    mine = [node for node in train.graph.nodes if node not in counters]
    yours = list(evaluation.graph.nodes)
    my_keys = [_key(node, train.parts) for node in mine]
    your_keys = [_key(node, evaluation.parts) for node in yours]
    if my_keys == your_keys:
        pairs = list(zip(mine, yours, strict=True))
    else:
        blocks = SequenceMatcher(None, my_keys, your_keys, autojunk=False).get_matching_blocks()
        pairs = [(mine[b.a + k], yours[b.b + k]) for b in blocks for k in range(b.size)]
    same = {b: a for a, b in pairs}
    foreign = {read.reader for read in reads if read.reader != read.read}
    differing = {_owner(n) for n in (*mine, *yours) if n not in same and n not in same.values()}
    for a, b in pairs:
        positions = _differing_flags(a, b, same)
        if positions is None or (positions and (a.op == "output" or {_owner(a), None} & foreign)):
            differing.add(_owner(a))
            continue
        for node, position in ((n, p) for n in (a, b) for p in positions):
            node.update_arg(position, _flag(node))
    if str(_structure(train.graph)) != str(_structure(evaluation.graph)):
        differing.add("")
    differing |= {read.read for read in reads if read.users and _concerns(read.reader, differing)}
    for counter in counters:
        _count_in_every_mode(counter, evaluation.graph)
    return sorted(differing)


def _concerns(reader: str | None, owners: Collection[str]) -> bool:
    """Whether a branch in a method of `reader` can be the reason for differences in the code of `owners`."""
    return bool(owners) and (
        not reader or any(owner == reader or owner.startswith(f"{reader}.") for owner in owners)
    )


def _owner(node: fx.Node) -> str:
    return origin(node).owner


def _structure(graph: fx.Graph) -> Any:
    return structures_of(graph)


def _key(node: fx.Node, parts: dict[str, Any]) -> tuple[Any, ...]:
    """The key of a node. Two nodes of different graphs can correspond to each other if their keys are equal."""
    part = parts.get(str(node.target)) if node.op in ("get_attr", "call_module") else None
    if node.op in ("placeholder", "output"):
        return (node.op,)
    if part is None:
        return (node.op, str(node.target), _owner(node))
    if isinstance(part, Tensor):
        return (
            node.op,
            tuple(part.shape),
            str(part.dtype),
            part.sum().item() if part.numel() else 0,
        )
    return (node.op, repr(getattr(part, "checks", None) or _outline(part)))


def _outline(part: nn.Module) -> list[str]:
    """The nodes of a graph module as text."""
    graph = getattr(part, "graph", None)
    return [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.nodes] if graph else []


def _counts_batches(node: fx.Node) -> bool:
    """Whether a node increments the batch counter of a BatchNorm layer."""
    counter = node.args[0] if node.args else None
    return (
        node.target is torch.ops.aten.add_.Tensor
        and isinstance(counter, fx.Node)
        and str(counter.target).rpartition(".")[2] == "num_batches_tracked"
        and node.args[1:] == (1,)
        and not node.users
    )


def _count_in_every_mode(counter: fx.Node, evaluation: fx.Graph) -> None:
    """Make both graphs add the flag to the counter: 1 in train mode, 0 in eval mode."""
    buffer = counter.args[0]
    assert isinstance(buffer, fx.Node)
    counter.update_arg(1, _flag(counter))
    for node in evaluation.nodes:
        if node.op == "get_attr" and node.target == buffer.target:
            with evaluation.inserting_after(node):
                added = evaluation.call_function(torch.ops.aten.add_.Tensor, (node, 1))
            added.meta = dict(counter.meta)
            added.update_arg(1, _flag(added))
            return


def _flag(node: fx.Node) -> fx.Node:
    """Insert a node before `node` that reads the flag of its owner."""
    owner = _owner(node)
    with node.graph.inserting_before(node):
        flag = node.graph.create_node("get_attr", f"{owner}.training" if owner else "training")
    flag.meta[META] = node.meta[META]
    return flag


def _differing_flags(a: fx.Node, b: fx.Node, same: dict[fx.Node, fx.Node]) -> list[int] | None:
    """The positions of arguments that are True in `a` and False in `b`; None if the nodes differ in another way."""
    b_args, b_kwargs = fx.map_arg((b.args, b.kwargs), lambda n: same.get(n, n))
    if len(a.args) != len(b_args):
        return None
    found: list[int] = []
    for position, (mine, yours) in enumerate(zip(a.args, b_args, strict=True)):
        if mine is True and yours is False:
            found.append(position)
        elif not _equal(mine, yours):
            return None
    return found if _equal(a.kwargs, b_kwargs) else None


def _equal(mine: Any, yours: Any) -> bool:
    """Whether two arguments are equal. A node of eval mode without a counterpart counts as equal to every node."""
    if isinstance(mine, fx.Node) and isinstance(yours, fx.Node):
        return mine is yours or mine.graph is not yours.graph
    if isinstance(mine, tuple | list) and isinstance(yours, tuple | list):
        return len(mine) == len(yours) and all(map(_equal, mine, yours))
    if isinstance(mine, dict) and isinstance(yours, dict):
        return mine.keys() == yours.keys() and all(_equal(v, yours[k]) for k, v in mine.items())
    return type(mine) is type(yours) and bool(mine == yours)
