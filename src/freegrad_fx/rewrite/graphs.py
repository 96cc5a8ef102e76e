"""Applies a plan to a graph. This is the only stage that changes graphs.

Requires: a captured graph and its sites. Ensures: `stop_gradient` and `decoupled` surround every site that the plan
rewrites, every other node is unchanged, and the graph computes the same values unless the plan replaces a forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import fx, nn

from .._torch.graphs import grad_mode_getter, grad_mode_setter, is_erased
from .._torch.parametrized import plain_class
from ..capture.captured import sets_grad_mode
from ..core.scopes import SCOPES
from ..graph.aliasing import Aliasing
from ..graph.marks import (
    Marks,
    insert_marks,
    mark_call,
    take_marks,
)
from ..graph.nodes import called_module, called_path, takes_parameters
from ..ops.calls import call_with
from ..ops.checks import require_frozen, warn_if_native
from ..ops.gradients import decoupled, kept, stop_gradient, written_back
from ..ops.hooked import call_without_hooks
from ..plan import Decided
from ..sites.site import Located, LocatedOperation, LocatedParameter
from .calls import calls_to_give, calls_to_open, with_given_parameters, with_open_calls
from .compounds import copies_at, operate_compound
from .memory import memory_at
from .merged import has_merged, with_merged_parameters
from .operations import at_operations, operate
from .parameters import decouple
from .steps import steps_to_open, with_open_steps
from .surgery import Surgery

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
    if calls_to_open(root, decided) or calls_to_give(decided):
        insert_marks(graph, marks or Marks())
        decided = with_given_parameters(with_open_calls(root, decided))
        marks = None if marks is None else take_marks(graph)
    if steps_to_open(decided):
        insert_marks(graph, marks or Marks())
        decided = with_open_steps(decided)
        marks = None if marks is None else take_marks(graph)
    if has_merged(decided):
        insert_marks(graph, marks or Marks())
        decided = with_merged_parameters(root, decided)
        marks = None if marks is None else take_marks(graph)
    wanted = [pair for pair in decided if pair[1].acts]
    aliasing = Aliasing(graph, root)
    # The aliasing describes the graph before any insertion, so all sites are analysed first
    operations = at_operations(decided)
    compounds = [
        (place, decisions, copies_at(place, decisions, aliasing))
        for place, decisions in operations
        if place.compound is not None
    ]
    judged = [
        (place, decisions, memory_at(place, decisions, aliasing))
        for place, decisions in operations
        if place.compound is None
    ]
    parameters = [
        (place, decision, place.renormalised or any(map(aliasing.written, place.reads)))
        for place, decision in wanted
        if isinstance(place, LocatedParameter)
    ]
    frozen = [p for p, d in decided if isinstance(p, LocatedParameter) and d.frozen]
    if marks is not None:
        insert_marks(graph, marks)
        calls = [place.node for place, _, _ in judged]
        calls += [part for place, _, _ in compounds for part in _parts(place)]
        for node in dict.fromkeys(calls):
            if node.target is not call_without_hooks and called_module(node, root) is not None:
                mark_call(node)
    replaced = [place for place, decision in wanted if decision.forward is not None]
    if replaced:
        _warn_at(replaced[0], len(replaced), graph, root)
    # Rules at the parts of an operation are inside of those at the operation
    for place, decisions, copies in compounds:
        operate_compound(graph, root, place, decisions, copies)
    for place, decisions, memory in judged:
        operate(graph, root, place, decisions, memory)
    with _at_the_beginning(
        graph, any(_enables_gradients(place, root) for place, _, _ in parameters)
    ):
        results = decouple(graph, root, parameters)
        for unlearned in frozen:
            surgery = Surgery(graph, root, unlearned.site, {})
            name = unlearned.site.name
            surgery.node("call_function", require_frozen, (surgery.read(unlearned), name))
    _use(graph, [(p, result) for (p, _, _), result in zip(parameters, results, strict=True)])
    return Marks() if marks is None else take_marks(graph, unmarked)


def _parts(place: LocatedOperation) -> tuple[fx.Node, ...]:
    return () if place.compound is None else place.compound.parts


def _warn_at(first: Located, count: int, graph: fx.Graph, root: nn.Module) -> None:
    """Insert the warning of `native` blocks at the first of the sites whose forward is replaced."""
    name, surgery = first.site.name, Surgery(graph, root, first.site, {})
    text = name if count == 1 else f"{count} sites, of which {name} is the first"
    if isinstance(first, LocatedOperation):
        with graph.inserting_before(first.node):
            surgery.node("call_function", warn_if_native, (first.input, text))
    elif isinstance(first, LocatedParameter):
        with _at_the_beginning(graph, False):
            surgery.node("call_function", warn_if_native, (surgery.read(first), text))


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
        not plain_class(part).__module__.startswith("torch.")
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
