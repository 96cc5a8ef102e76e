"""The nodes that are inserted at one site of a graph."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._torch import tree
from ..capture.rule_parameters import HELD, hold
from ..core.rule import Rule, learnt_by
from ..core.scopes import SCOPES
from ..graph.aliasing import of_library
from ..graph.nodes import new_node
from ..graph.provenance import META
from ..graph.serialise import can_be_written
from ..ops.functions import apply_forward, function_key
from ..ops.gradients import decoupled, kept, stop_gradient
from ..plan import Decision
from ..sites.site import LocatedParameter, Site
from ..vocabulary.activations import OPS

__all__ = ["Surgery"]


class Surgery:
    """The changes at one site. New nodes are created at the insertion point of the graph, with the site's origin."""

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        site: Site,
        meta: Mapping[str, Any],
        ambient: bool = False,
    ) -> None:
        self.graph = graph
        self.root = root
        self.site = site
        self.ambient = {"ambient": SCOPES[site.kind], "site": site.name} if ambient else {}
        self.meta = {key: meta[key] for key in ("nn_module_stack", META) if key in meta}

    def edge(self, value: fx.Node, start: fx.Node, rules: Sequence[Rule]) -> fx.Node:
        """Insert an identity with rules.

        Args:
            value: The tensor whose values the result has.
            start: A tensor with the same values, which gets the gradient, and which the rules read.
            rules: The rules.
        """
        first, *others = rules
        return self.decoupled(self.stop(value), self.chain(start, others), start, first)

    def read(self, place: LocatedParameter) -> fx.Node:
        """A node that reads the parameter: its graph input, or a new get_attr node."""
        for node in place.reads:
            if node.op == "placeholder":
                return node
        return self.node("get_attr", place.site.name)

    def chain(self, start: fx.Node, rules: Sequence[Rule | None]) -> fx.Node:
        """Apply all rules except the first, each around an identity; the last rule is nearest to the start."""
        source = start
        for rule in reversed(rules):
            source = self.decoupled(self.stop(source), source, start, rule)
        return source

    def stop(self, x: fx.Node, native: Any = False) -> fx.Node:
        """Insert ``stop_gradient(x)``, which returns x where `native` is true; it can be a node."""
        how = {**self.ambient, **({"native": native} if native else {})}
        return self.node("call_function", stop_gradient, (x,), how)

    def keep(self, x: fx.Node) -> fx.Node:
        """Insert a copy of x, which is made only while a rule acts."""
        return self.node("call_function", kept, (x,), self.ambient)

    def forward(self, x: fx.Node, decision: Decision) -> fx.Node:
        """Insert the call of the replacement forward of a decision on x.

        A tensor to which a rule gives a gradient gets none from the forward.
        """
        forward = decision.forward
        assert forward is not None
        learnt = {id(tensor) for tensor in learnt_by(decision.rules)}
        function: Any = OPS[forward].function if isinstance(forward, str) else forward
        before: tuple[Any, ...] = ()
        keywords: dict[str, Any] = {}
        while isinstance(function, functools.partial):
            before = (*function.args, *before)
            keywords = {**function.keywords, **keywords}
            function = function.func
        if not all(map(can_be_written, tree.leaves((before, keywords)))):
            function, before, keywords = forward, (), {}

        def read(tensor: Tensor) -> fx.Node:
            node = self.tensor(tensor, learnt=True)
            return self.stop(node) if id(tensor) in learnt else node

        before, keywords = tree.map_only(Tensor, read, (before, keywords))
        if isinstance(function, types.MethodDescriptorType):  # Tensor.sign
            return self.node("call_method", function.__name__, (*before, x), keywords)
        if of_library(function) and not isinstance(function, functools.partial):
            return self.node("call_function", function, (*before, x), keywords)
        key = function_key(function)
        return self.node("call_function", apply_forward, (x, key, *before), keywords)

    def decoupled(
        self,
        y: fx.Node,
        x: fx.Node,
        start: fx.Node,
        rule: Rule | None,
        save: str = "",
        call: Mapping[str, Any] = MappingProxyType({}),
    ) -> fx.Node:
        """Insert ``decoupled(y, x)`` with a rule that reads the start of its chain; ``None`` makes it ambient.

        Args:
            y: The output of the operation.
            x: What the gradient goes to.
            start: What the rule reads.
            rule: The rule.
            save: As for `decoupled`.
            call: The arguments of `decoupled` that describe the operation.
        """
        if rule is None:
            return self.node("call_function", decoupled, (y, x), self.ambient)
        read = (start,) if x is not start and "x" in rule.inputs else ()
        values = {
            name: self.tensor(value, learnt=name in rule.learnt)
            if isinstance(value, HELD)
            else value
            for name, value in rule.bound.items()
        }
        options = {n: v for n, v in rule.options.items() if n != "over"}
        options |= {"save": save} if save else {}
        kwargs: dict[str, Any] = {
            "rule": rule.name,
            "site": self.site.name,
            **options,
            **call,
            **values,
        }
        return self.node("call_function", decoupled, (y, x, *read), kwargs)

    def tensor(self, value: Tensor | torch.Generator, learnt: bool) -> fx.Node:
        """Insert a read of a tensor or a generator that is a parameter of a rule; see `hold`."""
        return self.node("get_attr", hold(self.root, value, learnt=learnt))

    def node(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> fx.Node:
        """Insert a node with the origin of the site."""
        node = new_node(self.graph, op, target, args, kwargs)
        node.meta.update(self.meta)
        return node
