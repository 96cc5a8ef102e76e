"""Plan → rewritten graph: the only stage that changes one.

Requires: graphs as `capture` makes them, and their sites. Ensures: every site that the plan rewrites has its rules
around it, every other node is as it was, and the values that the graph computes are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from .activations import OPS
from .aliasing import Aliasing
from .ops import decoupled, stop_gradient
from .plan import Decision
from .provenance import META
from .rules.rule import Rule
from .sites import Located

__all__ = ["rewrite"]


def rewrite(graph: fx.Graph, root: nn.Module, decided: Sequence[tuple[Located, Decision]]) -> None:
    """Put the rules of a plan around the sites of one graph.

    Args:
        graph: The graph; it is changed.
        root: The module whose submodules it calls.
        decided: The sites of this graph with the decisions for them.
    """
    wanted = [(place, decision) for place, decision in decided if decision.action == "rewrite"]
    aliasing = Aliasing(graph, root)
    # Judged before anything is inserted; the last site first, so that what is judged "later" has been done.
    judged = [(place, decision, _memory(place, decision, aliasing)) for place, decision in wanted]
    for place, decision, memory in judged:
        _Surgery(graph, place, decision).perform(*memory)


def _memory(place: Located, decision: Decision, aliasing: Aliasing) -> tuple[bool, bool, bool]:
    """What a site needs beyond the usual.

    Returns:
        Whether a rule needs a copy of `x`; whether the result has to be written back into `x`'s memory; whether the
        operation has to run on a copy, because it may return its input and the result is written into.
    """
    x, node = place.input, place.node
    needs_x = any("x" in rule.inputs for rule in decision.rules)
    overwrites = place.inplace and decision.forward is None
    keep_x = needs_x and (overwrites or aliasing.written_after(x, node))
    write_back = place.inplace and aliasing.read_elsewhere_after(x, node)
    may_return_x = place.op is None or place.op.name == "identity"
    return keep_x, write_back, may_return_x and aliasing.written_after(node, node, certainly=True)


class _Surgery:
    """The change at one site."""

    def __init__(self, graph: fx.Graph, place: Located, decision: Decision) -> None:
        self.graph = graph
        self.place = place
        self.decision = decision

    def perform(self, keep_x: bool, write_back: bool, on_copy: bool) -> None:
        """Rewrite the site.

        In the usual case the operation runs on `stop_gradient(x)`, in place or not, and `decoupled` takes over every
        later use of its result, and of `x` if that was overwritten. Where other names of `x`'s memory are read later,
        the operation runs on a copy, and its decoupled result is written into `x` natively: autograd then sees to
        the views.
        """
        node, x = self.place.node, self.place.input
        first, *others = self.decision.rules
        with self.graph.inserting_before(node):
            source = self._clone(x) if keep_x or write_back else x
            start = source
            for rule in reversed(others):
                source = self._decoupled(self._stop(source), source, rule)
            if write_back:
                # `source` itself may be overwritten unless a rule needs it
                stop = self._stop(start)
                stop = self._clone(stop) if keep_x else stop
            else:
                stop = self._clone(self._stop(x)) if on_copy else self._stop(x)
        operation = self._operation(stop)
        with self.graph.inserting_after(operation):
            out = self._decoupled(operation, source, first)
        result = out
        if write_back:
            with self.graph.inserting_after(out):
                result = self._node("call_method", "copy_", (x, out))
        operation.replace_all_uses_with(result, delete_user_cb=lambda user: user is not out)
        if self.place.inplace and not write_back:
            later = [user for user in x.users if user > out]
            x.replace_all_uses_with(result, delete_user_cb=lambda user: user in later)

    def _operation(self, stop: fx.Node) -> fx.Node:
        """The user's own node, reading from `stop`; or, where the forward is replaced, a node of the new one."""
        node, key = self.place.node, self.place.key
        if self.decision.forward is None:
            if isinstance(key, int):
                node.update_arg(key, stop)
            else:
                node.update_kwarg(key, stop)
            return node
        with self.graph.inserting_before(node):
            function = OPS[self.decision.forward].function
            assert function is not None
            new = self._node("call_function", function, (stop,))
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        return new

    def _stop(self, x: fx.Node) -> fx.Node:
        return self._node("call_function", stop_gradient, (x,))

    def _clone(self, x: fx.Node) -> fx.Node:
        return self._node("call_method", "clone", (x,))

    def _decoupled(self, y: fx.Node, x: fx.Node, rule: Rule) -> fx.Node:
        kwargs = {"rule": rule.name, "site": self.place.site.name, **rule.bound}
        return self._node("call_function", decoupled, (y, x), kwargs)

    def _node(
        self, op: str, target: object, args: tuple[fx.Node, ...], kwargs: object = None
    ) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs or {})  # type: ignore[arg-type]
        site = self.place.node
        for key in ("nn_module_stack", META):
            if key in site.meta:
                node.meta[key] = site.meta[key]
        return node
