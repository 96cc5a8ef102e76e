"""The calls of modules that have to be opened before rules are put around them: hooks, and parameters with rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx, nn

from .._torch.modules import has_global_hooks, has_hooks
from ..graph.hooked import open_call
from ..graph.nodes import called_module, called_path, takes_parameters
from ..ops.calls import call_with
from ..ops.hooked import call_without_hooks
from ..plan import Decided
from ..sites.site import REPLACE, Located, LocatedOperation, LocatedParameter
from ..vocabulary.op import Operand
from .operands import uses_at

__all__ = ["calls_to_give", "calls_to_open", "with_given_parameters", "with_open_calls"]


# --- hooks ---


def calls_to_open(root: nn.Module, decided: Decided) -> dict[fx.Node, int | str]:
    """The calls of modules with hooks that get a rule, with the place of the first operand in each."""
    of_all = has_global_hooks()
    found: dict[fx.Node, int | str] = {}
    for place, decision in decided:
        if not decision.acts or not isinstance(place, LocatedOperation) or place.compound:
            continue
        module = called_module(place.node, root)
        if (
            module is not None
            and place.node.target is not call_without_hooks
            and (of_all or has_hooks(module))
        ):
            found[place.node] = place.key
    return found


def with_open_calls(root: nn.Module, decided: Decided) -> Decided:
    """Open the calls of modules with hooks: a rule is around the forward alone.

    Returns:
        The sites with the nodes that they have now.
    """
    to_open = calls_to_open(root, decided)
    opened = {node: open_call(node, key) for node, key in to_open.items()}
    return [(_opened(place, opened), decision) for place, decision in decided]


def _opened(place: Located, opened: Mapping[fx.Node, tuple[fx.Node, ...]]) -> Located:
    """A site after calls were opened."""
    if isinstance(place, LocatedOperation) and place.node in opened:
        first, *others = place.arguments or (Operand("x", place.key),)
        arguments = (replace(first, key=2), *others)
        return replace(place, node=opened[place.node][1], key=2, arguments=arguments)
    if isinstance(place, LocatedParameter):
        calls = [(part, n) for node, n in place.calls for part in opened.get(node, (node,))]
        return replace(place, calls=tuple(calls))
    return place


# --- parameters that are operands with rules ---


def calls_to_give(decided: Decided) -> dict[fx.Node, list[str]]:
    """The calls of modules with rules at operands that the modules hold, with the names of these parameters."""
    found: dict[fx.Node, list[str]] = {}
    for place, decision in decided:
        if isinstance(place, LocatedOperation) and place.compound is None and decision.acts:
            wanted = {place.site.at}
            if place.site.at == REPLACE:
                uses = uses_at(place, decision)
                wanted = {place.first.name, *(uses.takes if uses else ())}
            held = [o.held for o in place.arguments if o.held and o.name in wanted]
            if held:
                found.setdefault(place.node, []).extend(held)
    return found


def with_given_parameters(decided: Decided) -> Decided:
    """Give the calls the parameters that are operands with rules, so that the rules are on these edges only.

    Returns:
        The sites with the nodes that they have now; the parameters are read by further nodes.
    """
    given = {node: _give(node, names) for node, names in calls_to_give(decided).items()}
    return [(_given(place, given), decision) for place, decision in decided] if given else decided


def _give(node: fx.Node, names: list[str]) -> tuple[fx.Node, Mapping[str, fx.Node]]:
    """The call that is given parameters of its module, and the nodes that read them."""
    graph, path = node.graph, called_path(node)
    own: Mapping[str, fx.Node] = node.args[1] if takes_parameters(node) else {}  # type: ignore[assignment]
    reads = {}
    with graph.inserting_before(node):
        for name in names:
            if name not in own:  # an earlier transform gives the call one with rules
                reads[name] = graph.create_node("get_attr", f"{path}.{name}")
                reads[name].meta = dict(node.meta)
        if takes_parameters(node):
            node.update_arg(1, {**own, **reads})
            return node, reads
        module = graph.create_node("get_attr", path)
        call = graph.call_function(call_with, (module, reads, *node.args), dict(node.kwargs))
    module.meta, call.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return call, reads


def _given(
    place: Located, given: Mapping[fx.Node, tuple[fx.Node, Mapping[str, fx.Node]]]
) -> Located:
    """A site after calls were given parameters."""
    if isinstance(place, LocatedOperation) and place.node in given:
        call, _ = given[place.node]
        if call is place.node:
            return place
        arguments = tuple(o if o.held else replace(o, key=_later(o.key)) for o in place.arguments)
        return replace(place, node=call, key=_later(place.key), arguments=arguments)
    if isinstance(place, LocatedParameter):
        calls, reads = [], list(place.reads)
        for node, names in place.calls:
            call, read = given.get(node, (node, {}))
            reads += [read[name] for name in names if name in read]
            others = tuple(name for name in names if name not in read)
            calls += [(call, others)] if others else []
        return replace(place, calls=tuple(calls), reads=tuple(reads))
    return place


def _later(key: int | str) -> int | str:
    """The place of an argument behind the module and the parameters."""
    return key + 2 if isinstance(key, int) else key
