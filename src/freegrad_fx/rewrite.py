"""Applies a plan to a graph. This is the only stage that changes graphs.

Requires: a captured graph and its sites. Ensures: `stop_gradient` and `decoupled` surround every site that the plan
rewrites, every other node is unchanged, and the graph computes the same values unless the plan replaces a forward.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ._torch import tree
from ._torch.graphs import grad_mode_getter, grad_mode_setter, is_erased
from ._torch.modules import has_global_hooks, has_hooks
from .capture.captured import sets_grad_mode
from .capture.rule_parameters import HELD, hold
from .core.rule import Forward, Rule
from .core.scopes import SCOPES
from .graph.aliasing import Aliasing, of_library
from .graph.hooked import open_call
from .graph.marks import (
    Marks,
    fix_arguments,
    insert_marks,
    is_mark,
    mark_call,
    same_value,
    take_marks,
)
from .graph.nodes import called_module, called_path, takes_parameters
from .graph.provenance import META
from .graph.serialise import can_be_written
from .memory import Memory, memory_at
from .ops.calls import call_with
from .ops.checks import require_frozen, require_unwritten, warn_if_native, write_count
from .ops.functions import apply_forward, function_key
from .ops.gradients import decoupled, kept, stop_gradient, written_back
from .ops.hooked import call_without_hooks
from .plan import Decided, Decision
from .sites.site import Located, LocatedOperation, LocatedParameter, Site
from .vocabulary.activations import OPS

__all__ = ["rewrite", "without_ambient"]


_INSERTED = (stop_gradient, kept, decoupled, written_back)


def without_ambient(graph: fx.Graph) -> set[fx.Node | str]:
    """Remove the calls that an earlier rewrite inserted around ambient sites, so that a table can decide these sites.

    Args:
        graph: The graph; it is changed in place.

    Returns:
        The nodes of the operations and the names of the parameters that were ambient sites.
    """
    found: set[fx.Node | str] = set()
    for node in graph.nodes:
        if node.target in _INSERTED and node.kwargs.get("ambient"):
            value = node.args[1 if node.target is written_back else 0]
            if node.target is decoupled:
                parameter = node.kwargs["ambient"] == SCOPES["parameter"]
                found.add(str(node.args[1].target) if parameter else value)
            node.replace_all_uses_with(value)
            graph.erase_node(node)
    return found


def rewrite(
    graph: fx.Graph, root: nn.Module, decided: Decided, marks: Marks | None = None
) -> Marks:
    """Insert the rules of a plan around the sites of one graph.

    Args:
        graph: The graph; it is changed in place.
        root: The module whose submodules the graph calls. A tensor that is a parameter of a rule is registered on it as
            a non-persistent buffer, unless it already is a parameter or buffer of `root`.
        decided: The sites of this graph, each with its decision.
        marks: The marks of the graph; None if its modules are not known.

    Returns:
        The marks of the rewritten graph, also for the modules that are called at its sites.
    """
    unmarked = frozenset[str]() if marks is None else marks.unmarked
    if to_open := _calls_to_open(root, decided):
        insert_marks(graph, marks or Marks())
        decided = _with_open_calls(to_open, decided)
        marks = None if marks is None else take_marks(graph)
    wanted = [pair for pair in decided if pair[1].action in ("rewrite", "ambient")]
    aliasing = Aliasing(graph, root)
    # The aliasing describes the graph before any insertion, so all sites are analysed first
    judged = [
        (place, decision, memory_at(place, decision, aliasing))
        for place, decision in wanted
        if isinstance(place, LocatedOperation)
    ]
    parameters = [
        (place, decision, place.renormalised or any(map(aliasing.written, place.reads)))
        for place, decision in wanted
        if isinstance(place, LocatedParameter)
    ]
    frozen = [p for p, d in decided if isinstance(p, LocatedParameter) and d.frozen]
    if marks is not None:
        insert_marks(graph, marks)
        for place, _, _ in judged:
            if (
                place.node.target is not call_without_hooks
                and called_module(place.node, root) is not None
            ):
                mark_call(place.node)
    replaced = [place for place, decision in wanted if decision.forward is not None]
    if replaced:
        _warn_at(replaced[0], len(replaced), graph, root)
    for place, decision, memory in judged:
        ambient = decision.action == "ambient"
        surgery = _Surgery(graph, root, place.site, place.node.meta, ambient)
        surgery.operate(place, decision, memory)
    with _at_the_beginning(
        graph, any(_enables_gradients(place, root) for place, _, _ in parameters)
    ):
        results = [
            _Surgery(graph, root, p.site, {}, d.action == "ambient").decouple(p, d, written)
            for p, d, written in parameters
        ]
        for unlearned in frozen:
            surgery = _Surgery(graph, root, unlearned.site, {})
            name = unlearned.site.name
            surgery.node("call_function", require_frozen, (surgery.read(unlearned), name))
    _use(graph, [(p, result) for (p, _, _), result in zip(parameters, results, strict=True)])
    return Marks() if marks is None else take_marks(graph, unmarked)


def _warn_at(first: Located, count: int, graph: fx.Graph, root: nn.Module) -> None:
    """Insert the warning of `native` blocks at the first of the sites whose forward is replaced."""
    name, surgery = first.site.name, _Surgery(graph, root, first.site, {})
    text = name if count == 1 else f"{count} sites, of which {name} is the first"
    if isinstance(first, LocatedOperation):
        with graph.inserting_before(first.node):
            surgery.node("call_function", warn_if_native, (first.input, text))
    elif isinstance(first, LocatedParameter):
        with _at_the_beginning(graph, False):
            surgery.node("call_function", warn_if_native, (surgery.read(first), text))


def _calls_to_open(root: nn.Module, decided: Decided) -> dict[fx.Node, int | str]:
    """The calls of modules with hooks that get a rule, with the place of the activated tensor in each."""
    of_all = has_global_hooks()
    found: dict[fx.Node, int | str] = {}
    for place, decision in decided:
        if decision.action not in ("rewrite", "ambient") or not isinstance(place, LocatedOperation):
            continue
        module = called_module(place.node, root)
        if (
            module is not None
            and place.node.target is not call_without_hooks
            and (of_all or has_hooks(module))
        ):
            found[place.node] = place.key
    return found


def _with_open_calls(to_open: Mapping[fx.Node, int | str], decided: Decided) -> Decided:
    """Open the calls of modules with hooks: a rule is around the forward alone.

    Returns:
        The sites with the nodes that they have now.
    """
    opened = {node: open_call(node, key) for node, key in to_open.items()}
    return [(_at(place, opened), decision) for place, decision in decided]


def _at(place: Located, opened: Mapping[fx.Node, tuple[fx.Node, ...]]) -> Located:
    """A site after calls were opened."""
    if isinstance(place, LocatedOperation) and place.node in opened:
        return replace(place, node=opened[place.node][1], key=2)
    if isinstance(place, LocatedParameter):
        calls = [(part, n) for node, n in place.calls for part in opened.get(node, (node,))]
        return replace(place, calls=tuple(calls))
    return place


@contextmanager
def _at_the_beginning(graph: fx.Graph, enabled: bool) -> Iterator[None]:
    """Insert nodes after the inputs of a graph. If `enabled`, they run with gradients enabled."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    first = inputs[-1].next if inputs else next(iter(graph.nodes))
    with graph.inserting_before(first):
        if enabled:
            before = graph.call_function(grad_mode_getter)
            graph.call_function(grad_mode_setter(), (True,))
        yield
        if enabled:
            graph.call_function(grad_mode_setter(), (before,))


def _enables_gradients(place: LocatedParameter, root: nn.Module) -> bool:
    """Whether a parameter may be used with gradients enabled even if the caller of the model disabled them.

    This is possible if the graph sets the grad mode, or if an opaque call runs user code.
    """
    if any(sets_grad_mode(node.graph) for node in place.reads):
        return True
    called = [called_module(node, root) for node, _ in place.calls]
    return any(
        not type_before_parametrizations(part).__module__.startswith("torch.")
        for module in called
        if module is not None
        for part in module.modules()
    )


def _use(
    graph: fx.Graph, results: Sequence[tuple[LocatedParameter, tuple[fx.Node, set[fx.Node]]]]
) -> None:
    """Replace every use of a parameter by the decoupled parameter."""
    calls: dict[fx.Node, dict[str, fx.Node]] = {}
    for place, (result, own) in results:
        for node in place.reads:
            others = [user for user in node.users if user not in own]
            node.replace_all_uses_with(result, delete_user_cb=others.__contains__)
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
        for node, names in place.calls:
            if not is_erased(node):  # a replaced forward no longer uses the module
                calls.setdefault(node, {}).update(dict.fromkeys(names, result))
    for node, values in calls.items():
        if takes_parameters(node):
            node.update_arg(1, {**node.args[1], **values})  # type: ignore[dict-item]
            continue
        with graph.inserting_before(node):
            module = graph.create_node("get_attr", called_path(node))
            call = graph.call_function(call_with, (module, values, *node.args), dict(node.kwargs))
        call.meta = dict(node.meta)
        module.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)


class _Surgery:
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

    def operate(self, place: LocatedOperation, decision: Decision, memory: Memory) -> None:
        """Rewrite the site of an operation.

        The operation runs on `stop_gradient(x)`, and `decoupled` replaces every later use of its result, and every
        later use of `x` if the operation works in place. If the memory of `x` is read later through another node, such
        as a view, the operation runs on a copy instead, and the decoupled result is written back into `x`, so that
        autograd tracks the views.
        """
        node, x = place.node, place.input
        first, *others = decision.rules or (None,)
        with self.graph.inserting_before(node):
            if memory.write_back and decision.forward is not None:
                start = self.node("call_method", "clone", (x,))  # the new forward can save it
                source, stop = self.chain(start, others), self.stop(start)
            else:
                start = self.keep(x) if memory.keep_x else x
                source, stop = self.chain(start, others), self.stop(x)
                stop = self.keep(stop) if memory.on_copy or memory.write_back else stop
            if decision.forward is not None:
                operation = self.forward(stop, decision.forward)
            if memory.watched:
                writes = self.node("call_function", write_count, (stop,))
        if decision.forward is None:
            operation = node
            if isinstance(place.key, int):
                node.update_arg(place.key, stop)
            else:
                node.update_kwarg(place.key, stop)
        else:
            node.replace_all_uses_with(operation)
            self.graph.erase_node(node)
        with self.graph.inserting_before(operation.next):
            if memory.watched:
                name = self.site.name
                self.node("call_function", require_unwritten, (stop, writes, name))
            out = self.decoupled(operation, source, start, first, memory.save)
        result = out
        if memory.write_back:
            with self.graph.inserting_after(out):
                if decision.forward is None:
                    # writes only where a rule acts: without one, the operation has changed `x` itself
                    result = self.node("call_function", written_back, (x, out), self.ambient)
                else:
                    result = self.node("call_method", "copy_", (x, out))
        operation.replace_all_uses_with(result, delete_user_cb=lambda user: user is not out)
        if place.inplace and not memory.write_back:
            for same in same_value(x):
                later = {user for user in same.users if user > out}
                if same is not x and not all(map(is_mark, later)):
                    fix_arguments(x)
                same.replace_all_uses_with(result, delete_user_cb=later.__contains__)

    def decouple(
        self, place: LocatedParameter, decision: Decision, written: bool
    ) -> tuple[fx.Node, set[fx.Node]]:
        """Insert the rules for a parameter.

        Returns:
            The node to use instead of the parameter, and the inserted nodes that read the parameter itself.
        """
        first, *others = decision.rules or (None,)
        parameter = self.read(place)
        before = set(parameter.users)
        # A rule reads the value that the parameter has at the beginning of the forward
        copied = written and decision.reads("x")
        start = self.keep(parameter) if copied else parameter
        source = self.chain(start, others)
        value = self.stop(parameter)
        if decision.forward is not None:
            value = self.forward(value, decision.forward)
        result = self.decoupled(value, source, start, first)
        return result, set(parameter.users) - before

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

    def stop(self, x: fx.Node) -> fx.Node:
        """Insert ``stop_gradient(x)``."""
        return self.node("call_function", stop_gradient, (x,), self.ambient)

    def keep(self, x: fx.Node) -> fx.Node:
        """Insert a copy of x, which is made only while a rule acts."""
        return self.node("call_function", kept, (x,), self.ambient)

    def forward(self, x: fx.Node, forward: Forward) -> fx.Node:
        """Insert the call of a replacement forward on x."""
        function: Any = OPS[forward].function if isinstance(forward, str) else forward
        before: tuple[Any, ...] = ()
        keywords: dict[str, Any] = {}
        while isinstance(function, functools.partial):
            before = (*function.args, *before)
            keywords = {**function.keywords, **keywords}
            function = function.func
        if not all(map(can_be_written, tree.leaves((before, keywords)))):
            function, before, keywords = forward, (), {}
        before, keywords = tree.map_only(Tensor, self.tensor, (before, keywords))
        if isinstance(function, types.MethodDescriptorType):  # Tensor.sign
            return self.node("call_method", function.__name__, (*before, x), keywords)
        if of_library(function) and not isinstance(function, functools.partial):
            return self.node("call_function", function, (*before, x), keywords)
        key = function_key(function)
        return self.node("call_function", apply_forward, (x, key, *before), keywords)

    def decoupled(
        self, y: fx.Node, x: fx.Node, start: fx.Node, rule: Rule | None, save: str = ""
    ) -> fx.Node:
        """Insert ``decoupled(y, x)`` with a rule that reads the start of its chain; ``None`` makes it ambient."""
        if rule is None:
            return self.node("call_function", decoupled, (y, x), self.ambient)
        read = (start,) if x is not start and "x" in rule.inputs else ()
        values = {
            name: self.tensor(value) if isinstance(value, HELD) else value
            for name, value in rule.bound.items()
        }
        options = {**rule.options, "save": save} if save else rule.options
        kwargs: dict[str, Any] = {"rule": rule.name, "site": self.site.name, **options, **values}
        return self.node("call_function", decoupled, (y, x, *read), kwargs)

    def tensor(self, value: Tensor | torch.Generator) -> fx.Node:
        """Insert a read of a tensor or a generator that is a parameter of a rule; see `hold`."""
        return self.node("get_attr", hold(self.root, value))

    def node(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> fx.Node:
        """Insert a node with the origin of the site."""
        node = self.graph.create_node(op, target, args, kwargs or {})
        node.meta.update(self.meta)
        return node
