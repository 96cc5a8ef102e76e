"""Sites × RuleTable → Plan: what is to happen at every site, and why. Nothing is rewritten here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from torch import Tensor, fx, nn

from .._torch.modules import has_backward_hooks
from ..capture import Capture
from ..core.rule import Forward
from ..core.text import shown
from ..errors import PlanError
from ..graph.aliasing import Aliasing, named_in_place, of_library
from ..graph.nodes import called_module, called_path
from ..sites.opaque import find_opaque
from ..sites.operations import find_sites
from ..sites.parameters import find_parameters, unused_parameters
from ..sites.remarks import Lost
from ..sites.site import Located, LocatedOperation, LocatedParameter, Site
from ..table import Entry, RuleTable
from .decision import Decided, Decision
from .plan import Plan

__all__ = ["make_plan"]


def make_plan(
    capture: Capture,
    table: RuleTable,
    leaf_modules: Sequence[type[nn.Module]] = (),
    parameters: bool = False,
    ambient: bool = False,
    ambient_before: Collection[fx.Node | str] = (),
) -> tuple[Plan, list[Decided]]:
    """Decide every site of a capture.

    Args:
        capture: The capture.
        table: The table.
        leaf_modules: The module classes that the caller wanted kept whole.
        parameters: List the parameters even if no entry of the table can mean one.
        ambient: Let activations and parameters that no entry decides follow `use` blocks.
        ambient_before: Operations, and names of parameters, that do so whatever they are, unless an entry decides them.

    Returns:
        The plan, and for every graph of the capture its sites with the decisions.

    Raises:
        PlanError: An entry gives a rule to a site that the rule cannot serve.
    """
    types = table.types_in(capture.root)
    aliasings = [cache(partial(Aliasing, v.graph, capture.root)) for v in capture.variants]
    decided = [
        _decide_operations(find_sites(variant.graph, capture.root, types), table, aliasing)
        for variant, aliasing in zip(capture.variants, aliasings, strict=True)
    ]
    nowhere: Decided = []
    named = any(isinstance(place, str) for place in ambient_before)
    if parameters or ambient or table.wants_parameters or named:
        found: list[LocatedParameter] = []
        for variant, pairs, aliasing in zip(capture.variants, decided, aliasings, strict=True):
            here = find_parameters(variant.graph, capture.root)
            replaced = {
                place.node
                for place, decision in pairs
                if decision.forward is not None and isinstance(place, LocatedOperation)
            }
            pairs.extend(
                (place, _decide_parameter(place, table, aliasing, replaced)) for place in here
            )
            found += here
        unused = unused_parameters(capture.root, found)
        nowhere.extend((place, _decide(place, table)) for place in unused)
    decided = [
        [(p, _ambient(p, d, ambient, ambient_before)) for p, d in pairs] for pairs in decided
    ]
    modes: dict[Decision, list[str]] = {}
    for variant, pairs in zip(capture.variants, decided, strict=True):
        for _, decision in pairs:
            modes.setdefault(decision, []).append(variant.label)
    everywhere = len(capture.variants)
    in_order = sorted(modes, key=lambda decision: decision.site.kind == "parameter")
    opaque = [*capture.opaque]
    whole = {note.path for note in opaque}
    lost = [*capture.lost]
    for variant, pairs in zip(capture.variants, decided, strict=True):
        calls = find_opaque(variant.graph, capture.root, types, leaf_modules)
        opaque += [c for c in calls if c not in opaque and c.path not in whole]
        lost += [n for n in _silent_hooks(pairs, capture.root) if n not in lost]
    plan = Plan(
        model=capture.class_name,
        decisions=(
            *(
                replace(d, modes="" if len(modes[d]) == everywhere else "; ".join(modes[d]))
                for d in in_order
            ),
            *(decision for _, decision in nowhere),
        ),
        table=table,
        opaque=tuple(opaque),
        lost=tuple(lost),
        meant=_meant([pair for pairs in (*decided, nowhere) for pair in pairs], table),
    )
    return plan, decided


def _meant(decided: Decided, table: RuleTable) -> tuple[int, ...]:
    """For every entry the number of sites it matches: those that it decides, and others that an earlier one does."""
    sites: list[set[Site]] = [set() for _ in table.entries]
    for place, decision in decided:
        if decision.entry is not None:
            sites[decision.entry].add(place.site)
            for index in range(decision.entry + 1, len(table.entries)):
                if table.entries[index].matches(place):
                    sites[index].add(place.site)
    return tuple(map(len, sites))


def _ambient(
    place: Located, decision: Decision, everywhere: bool, before: Collection[fx.Node | str]
) -> Decision:
    """What becomes of a decision where sites that no entry decides follow `use` blocks, or those that did before."""
    meant, own = True, set[fx.Node | str](place.site.names)
    if isinstance(place, LocatedOperation):
        meant, own = place.op is not None and "activations" in place.op.groups, {place.node}
    if decision.action != "native" or decision.entry is not None or place.obstacle:
        return decision
    if not (everywhere and meant) and own.isdisjoint(before):
        return decision
    return replace(decision, action="ambient", reason="native outside of use() blocks")


def _decide_operations(
    places: Sequence[LocatedOperation], table: RuleTable, aliasing: Callable[[], Aliasing]
) -> Decided:
    """The decisions for one graph. A place is not the same one in another graph for having the same name there."""
    decided: Decided = []
    for place in places:
        decision = _decide(place, table)
        if decision.action == "rewrite" and (place.op is None or place.op.name == "identity"):
            # It may return its input itself. A write into the result would then reach the input, behind autograd's back
            memory = aliasing()
            if memory.written_after(place.node, place.node, certainly=True) and memory.read_after(
                place.input, place.node
            ):
                reason = "it may return its input, which is read after the result is written into"
                decision = Decision(place.site, "skip", entry=decision.entry, reason=reason)
        decided.append((place, decision))
    return decided


def _decide_parameter(
    place: LocatedParameter,
    table: RuleTable,
    aliasing: Callable[[], Aliasing],
    replaced: Collection[fx.Node],
) -> Decision:
    users = {*(u for node in place.reads for u in node.users), *(node for node, _ in place.calls)}
    if users and users.issubset(replaced):
        unused = replace(place, obstacle="the forward of what uses it is replaced")
        return _decide(unused, table)
    decision = _decide(place, table)
    if decision.forward is not None and (
        place.renormalised or any(map(aliasing().written, place.reads))
    ):
        # the write would reach what the new forward computed, and not the parameter
        reason = (
            "the forward of the model writes into it, so that it cannot be read through another one"
        )
        return Decision(place.site, "skip", entry=decision.entry, reason=reason)
    return decision


def _silent_hooks(decided: Decided, root: nn.Module) -> Iterator[Lost]:
    """Backward hooks of modules whose backward is replaced: no gradient passes through the module any more."""
    for place, decision in decided:
        if decision.action in ("rewrite", "ambient") and isinstance(place, LocatedOperation):
            module = called_module(place.node, root)
            if module is not None and has_backward_hooks(module):
                what = f"the backward hooks of {type(module).__name__}"
                reason = "they do not fire: the rule takes the place of the module's backward"
                yield Lost(called_path(place.node), what, reason, place.site.source)


def _decide(place: Located, table: RuleTable) -> Decision:
    site = place.site
    index = table.decide(place)
    if index is None:
        return Decision(site, "native", reason=place.obstacle or "no entry matches")
    entry = table.entries[index]
    if entry.rules is None:
        reason = place.obstacle or f"{entry.selector} = None"
        return Decision(site, "native", entry=index, reason=reason)
    if place.obstacle:
        return Decision(site, "skip", entry=index, reason=place.obstacle)
    _check_rules(place, entry)
    if entry.forward is not None:
        _check_replaceable(place, entry.forward)
    elif isinstance(place, LocatedParameter) and not place.tensor.requires_grad:
        return Decision(site, "native", entry=index, reason=_FROZEN, frozen=True)
    return Decision(site, "rewrite", entry.rules, entry.forward, index, f"matches {entry.selector}")


_FROZEN = (
    "it is frozen (requires_grad=False), so it gets no gradient; transform again once it learns"
)


def _check_rules(place: Located, entry: Entry) -> None:
    """Raise `PlanError` if the rules of an entry cannot serve a site."""
    assert entry.rules is not None
    where = f"site {place.site.name} ({place.site.spelling})"
    for rule in entry.rules:
        if place.site.kind not in rule.kinds:
            raise PlanError(
                f"rule {rule.name!r} is for {' and '.join(rule.kinds)} sites alone, and entry {entry.selector!r} gives "
                f"it to the {place.site.kind} {place.site.name}. Narrow the entry, or put one before it that gives "
                f"this site another rule or None."
            )
        if place.op is not None and not place.op.keeps_shape and rule.keeps_shape:
            raise PlanError(
                f"rule {rule.name!r} returns a gradient of the shape of the output, but {place.op.name} changes "
                f"the shape, at {where}. Leave it native ({{{place.op.name!r}: None}}), or give it a rule "
                f"registered with keeps_shape=False."
            )
        if isinstance(place, LocatedParameter) and place.sparse and not rule.sparse:
            raise PlanError(
                f"rule {rule.name!r} cannot take the sparse gradient of {where}. Build the embedding with "
                f"sparse=False, or give it a rule that can: one that is registered with sparse=True."
            )
    no_output = isinstance(place, LocatedParameter) and entry.forward is None
    for rule in entry.rules if no_output else entry.rules[1:]:
        if "y" in rule.inputs:
            remedy = "a parameter has none" if no_output else "it must come first in a composition"
            raise PlanError(
                f"rule {rule.name!r} needs the output y of an operation: {remedy}; at {where}."
            )


def _works_in_place(forward: Callable[..., Tensor]) -> bool:
    """Whether a function of torch writes into its argument by its name or its `inplace`."""
    function: Any = forward
    while isinstance(function, functools.partial):
        if function.keywords.get("inplace", False):
            return True
        function = function.func
    return of_library(function) and named_in_place(getattr(function, "__name__", ""))


def _check_replaceable(place: Located, forward: Forward) -> None:
    """Raise `PlanError` if the forward of a site cannot be replaced by another."""
    where = f"site {place.site.name} ({place.site.spelling})"
    if isinstance(forward, nn.Module | type):
        kind = "class" if isinstance(forward, type) else "module"
        raise PlanError(
            f"a forward is a function of a tensor, got the {kind} {forward!r}, at {where}. Its parameters and mode "
            f"would not be the model's: give a function, such as torch.tanh."
        )
    if not isinstance(forward, str) and _works_in_place(forward):
        raise PlanError(
            f"the forward {shown(forward)} writes into its argument, which is the model's own tensor, at {where}. "
            f"Give the function that does not: torch.relu, not torch.relu_."
        )
    if place.op is not None and not place.op.keeps_shape:
        raise PlanError(
            f"forward={forward!r} keeps the shape, but {place.op.name} changes it, at {where}."
        )
