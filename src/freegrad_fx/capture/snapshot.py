"""What a trace has recorded so far, to which it can be restored: a part that cannot be traced is removed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.fx.proxy import Attribute

from .._torch.graphs import is_erased
from .outside import is_proxy

__all__ = ["Snapshot"]


class Snapshot:
    """A snapshot of what a trace has recorded, to which the trace can be restored.

    Args:
        tracer: The `Tracer`, in the middle of a trace.
    """

    def __init__(self, tracer: Any) -> None:
        self.tracer = tracer
        self.last = next(iter(reversed(tracer.graph.nodes)), None)
        self.module_stack = copy.copy(tracer.module_stack)
        self.flags = dict(tracer.flags)
        self.assigned = dict(tracer.assigned)
        self.notes = (list(tracer.opaque), list(tracer.lost))
        self.refusals = tracer.refusals
        self.reads = len(tracer.read_first)
        self.moved = len(tracer.moved)

    def new_nodes(self) -> Iterator[fx.Node]:
        """The nodes that were recorded after the snapshot, the last first."""
        for node in reversed(self.tracer.graph.nodes):
            if node is self.last:
                return
            yield node

    def restore(self) -> None:
        """Remove what was recorded after the snapshot."""
        for node in list(self.new_nodes()):
            self.tracer.graph.erase_node(node)
        while len(self.tracer.moved) > self.moved:
            proxy, node = self.tracer.moved.pop()
            proxy.node = node
        self.tracer.module_stack = copy.copy(self.module_stack)
        self.tracer.flags = dict(self.flags)
        self.tracer.assigned = dict(self.assigned)
        opaque, lost = self.notes
        self.tracer.opaque, self.tracer.lost = list(opaque), list(lost)
        self.tracer.refusals = self.refusals
        for read in list(self.tracer.read_first)[self.reads :]:
            del self.tracer.read_first[read]
        if self.tracer.outside is not None:
            self.tracer.outside.restore(_is_erased_proxy)
        self.tracer.restore_tables(_is_erased_proxy)


def _is_erased_proxy(value: Any) -> bool:
    if issubclass(type(value), Attribute):
        value = value.root
    return is_proxy(value) and is_erased(value.node)
