"""Sites × RuleTable → Plan: the decision for each site, and the reason for it. This module rewrites nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from torch import fx, nn

from ..capture import Capture
from ..core.rule import Rule
from ..errors import PlanError, RuleError
from ..graph.aliasing import Aliasing
from ..sites.hidden import hidden_sites
from ..sites.opaque import find_opaque
from ..sites.operations import find_sites
from ..sites.outputs import changes_shape, returns_several
from ..sites.parameters import find_parameters, unused_parameters
from ..sites.remarks import Lost, Opaque
from ..sites.site import REPLACE, Located, LocatedOperation, LocatedParameter
from ..table import Entry, RuleTable
from ..vocabulary.activations import OPS
from .decision import Decided, Decision
from .dims import check_dims
from .edges import check_edge
from .forwards import check_learnt, check_replaceable
from .groups import acts_together
from .notes import remark_on, steps_left
from .operands import check_operands, native_at
from .own import with_own_tensors
from .parts import without_parts
from .plan import Plan

__all__ = ["also", "decide", "make_plan"]


def make_plan(
    capture: Capture,
    table: RuleTable,
    leaf_modules: Sequence[type[nn.Module]] = (),
    parameters: bool = False,
    ambient: bool = False,
    ambient_before: Collection[fx.Node | str] = (),
) -> tuple[Plan, list[Decided]]:
    """Decide what happens at every site of a captured model.

    Args:
        capture: The captured model.
        table: The rule table.
        leaf_modules: The module classes that the caller asked to keep as one opaque call.
        parameters: List the parameters even if no entry of the table can select one.
        ambient: Make every activation and every parameter that no entry decides follow `use` blocks.
        ambient_before: Operations, and names of parameters, that follow `use` blocks already. They continue to do so
            unless an entry decides them.

    Returns:
        The plan, and for each graph of the capture its sites with their decisions.

    Raises:
        PlanError: An entry gives a site a rule that cannot act there.
    """
    types = table.types_in(capture.root)
    aliasings = [cache(partial(Aliasing, v.graph, capture.root)) for v in capture.variants]
    found = [find_sites(v.graph, capture.root, types, table.on_demand) for v in capture.variants]
    tables = [table.among(places) for places in found]
    decided = [
        _decide_operations(places, own, aliasing)
        for places, own, aliasing in zip(found, tables, aliasings, strict=True)
    ]
    unused: Decided = []
    named = any(isinstance(place, str) for place in ambient_before)
    if parameters or ambient or table.wants_parameters or named:
        decided, unused = _with_parameters(capture, table, decided, aliasings)
    decided = [
        without_parts(
            [(p, also(p, _ambient(p, d, ambient, ambient_before), own)) for p, d in pairs]
        )
        for pairs, own in zip(decided, tables, strict=True)
    ]
    opaque, lost = _remarks(capture, types, leaf_modules)
    opaque = tuple(replace(note, holds=_selected_in(note, capture.root, table)) for note in opaque)
    plan = Plan(
        model=capture.class_name,
        decisions=(*_merged(capture, decided), *(also(p, d, table) for p, d in unused)),
        table=table,
        opaque=opaque,
        lost=lost,
        steps=steps_left(capture, decided),
    )
    return plan, decided


def _with_parameters(
    capture: Capture,
    table: RuleTable,
    decided: Sequence[Decided],
    aliasings: Sequence[Callable[[], Aliasing]],
) -> tuple[list[Decided], Decided]:
    """Decide the parameters, given the decisions for the operations.

    Returns:
        For each graph the operations and the parameters with their decisions, and the parameters that no graph uses.
    """
    both: list[Decided] = []
    found: list[LocatedParameter] = []
    for variant, pairs, aliasing in zip(capture.variants, decided, aliasings, strict=True):
        here = find_parameters(variant.graph, capture.root)
        replaced = {
            place.node
            for place, decision in pairs
            if decision.forward is not None and isinstance(place, LocatedOperation)
        }
        both.append([*pairs, *((p, _decide_parameter(p, table, aliasing, replaced)) for p in here)])
        found += here
    unused = unused_parameters(capture.root, found)
    return both, [(place, decide(place, table)) for place in unused]


def _merged(capture: Capture, decided: Sequence[Decided]) -> Iterator[Decision]:
    """The decisions of all graphs, each once, with the modes in which its site exists; operations come first."""
    modes: dict[Decision, list[str]] = {}
    for variant, pairs in zip(capture.variants, decided, strict=True):
        for _, decision in pairs:
            if decision.listed:
                modes.setdefault(decision, []).append(variant.label)
    for decision in sorted(modes, key=lambda decision: decision.site.kind == "parameter"):
        labels = modes[decision]
        in_all = len(labels) == len(capture.variants)
        yield replace(decision, modes="" if in_all else "; ".join(labels))


def _remarks(
    capture: Capture,
    types: Sequence[type[Any]],
    leaf_modules: Sequence[type[nn.Module]],
) -> tuple[tuple[Opaque, ...], tuple[Lost, ...]]:
    """The opaque calls of all graphs, and what the rewritten graphs will not do."""
    opaque = [*capture.opaque]
    listed = {note.path for note in opaque}
    for variant in capture.variants:
        calls = find_opaque(variant.graph, capture.root, types, leaf_modules)
        opaque += [c for c in calls if c not in opaque and c.path not in listed]
    return tuple(opaque), capture.lost


def also(place: Located, decision: Decision, table: RuleTable) -> Decision:
    """The decision for a site, with the entries that match the site too, after the one that decides it."""
    if decision.entry is None:
        return decision
    return replace(decision, also=tuple(table.matching(place, decision.entry + 1)))


def _selected_in(note: Opaque, root: nn.Module, table: RuleTable) -> tuple[str, ...]:
    """The operations that an entry with a rule or a forward selects in a module that could not be traced."""
    if note.asked or not table.entries:
        return ()
    try:
        module = root.get_submodule(note.path)
    except AttributeError:
        return ()
    if note.what != f"{type(module).__name__}, kept as one opaque call":
        return ()  # the note is on a part of the module, which is traced
    found = []
    for place in hidden_sites(module, note.path, table.on_demand):
        if table.gives(place) is not None:
            found.append(f"{place.site.path}:{place.site.op}")
    return tuple(found)


def _ambient(
    place: Located, decision: Decision, everywhere: bool, before: Collection[fx.Node | str]
) -> Decision:
    """The decision for a site, made ambient if no entry decides the site and it has to follow `use` blocks."""
    if decision.action != "native" or decision.entry is not None or place.obstacle:
        return decision
    if place.site.at != REPLACE:
        return decision
    eligible, keys = True, set[fx.Node | str](place.site.names)
    if isinstance(place, LocatedOperation):
        eligible, keys = place.op is not None and "activations" in place.op.groups, {place.node}
    if not (everywhere and eligible) and keys.isdisjoint(before):
        return decision
    return replace(decision, action="ambient", reason="native outside of use() blocks")


def _decide_operations(
    places: Sequence[LocatedOperation], table: RuleTable, aliasing: Callable[[], Aliasing]
) -> Decided:
    """The decisions for the operations of one graph, each followed by those for the places at it."""
    decided: Decided = []
    edges = table.placements
    for place in (p for found in places for p in (found, *(edges and found.edges(edges)))):
        decision = decide(place, table)
        may_return_x = place.op is None or place.op.may_return_x
        if decision.action == "rewrite" and may_return_x and not decision.packs:
            # It can return the input tensor itself. Autograd would not notice that a write into the result changes it
            memory = aliasing()
            if memory.written_after(place.node, place.node, certainly=True) and memory.read_after(
                place.input, place.node
            ):
                reason = "it can return its input itself, and the input is read after the result has been written into"
                decision = Decision(place.site, "skip", entry=decision.entry, reason=reason)
        decided.append((place, decision))
    return decided


def _decide_parameter(
    place: LocatedParameter,
    table: RuleTable,
    aliasing: Callable[[], Aliasing],
    replaced: Collection[fx.Node],
) -> Decision:
    """The decision for a parameter; `replaced` holds the operations whose forward is replaced."""
    users = {*(u for node in place.reads for u in node.users), *(node for node, _ in place.calls)}
    if users and users.issubset(replaced):
        unused = replace(place, obstacle="every operation that uses it has its forward replaced")
        return decide(unused, table)
    decision = decide(place, table)
    if decision.forward is not None and (
        place.renormalised or any(map(aliasing().written, place.reads))
    ):
        # The write would change the result of the new forward instead of the parameter
        reason = "the model writes into it in its forward, so its own forward cannot be replaced"
        return Decision(place.site, "skip", entry=decision.entry, reason=reason)
    return decision


def decide(place: Located, table: RuleTable) -> Decision:
    """The decision of the table for a site.

    Raises:
        PlanError: The entry that decides the site gives it a rule or a forward that cannot act there.
    """
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
    entry = with_own_tensors(place, entry)
    assert entry.rules is not None
    if acts_together(entry.rules) and site.kind != "parameter":
        raise PlanError(
            f"entry {entry.selector!r} gives a rule that acts on several parameters together to the {site.kind} "
            f"{site.name}: {', '.join(map(repr, entry.rules))}. Leave out over=, or select parameters: on('params')."
        )
    if site.at == REPLACE:
        _check_rules(place, entry)
        check_dims(place, entry)
        if obstacle := _computed_operand(place, entry.rules[0]):
            return Decision(site, "skip", entry=index, reason=obstacle)
        if reason := native_at(place, entry.rules[0]):
            return Decision(site, "native", entry=index, reason=reason)
    else:
        check_edge(place, entry)
    if entry.forward is not None:
        check_replaceable(place, entry.forward)
        check_learnt(place, entry)
    elif isinstance(place, LocatedParameter) and not place.tensor.requires_grad:
        return Decision(site, "native", entry=index, reason=_FROZEN, frozen=True)
    rules = _at_operation(place, entry, entry.rules)
    if any(rule.declaration.of_site for rule in rules):
        rules = tuple(rule.at_site(site.name) for rule in rules)
    return Decision(
        site,
        "rewrite",
        rules,
        entry.forward,
        index,
        f"matches {entry.selector}",
        remark=remark_on(place, rules, entry.forward),
    )


def _computed_operand(place: Located, rule: Rule) -> str:
    """The reason why a rule cannot be given an operand that it uses; ``""`` if it can."""
    uses = rule.declaration.uses(place.op.operands) if place.op is not None else None
    if uses is None or not isinstance(place, LocatedOperation):
        return ""
    return next(filter(None, map(place.computed, sorted(uses.takes))), "")


_FROZEN = "it is frozen (requires_grad=False), so it gets no gradient; transform again after unfreezing it"


def _at_operation(place: Located, entry: Entry, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of an entry, with the values that they have at the operation of a site.

    Raises:
        PlanError: A rule has no such values.
    """
    if not any(rule.declaration.of_op for rule in rules):
        return rules
    line, function = place.op, place.alone
    if isinstance(entry.forward, str):
        line, function = OPS[entry.forward], OPS[entry.forward].function
    elif entry.forward is not None:
        line, function = None, entry.forward
    found = []
    for rule in rules:
        problem = ""
        if line is None and entry.forward is None:
            problem = "it is no operation of the vocabulary"
        elif line is not None and not line.elementwise:
            problem = f"{line.name} is not elementwise"
        elif function is None:
            problem = (
                "it takes other tensors besides its input, or the site is ambient, so that its arguments are not known "
                "(then transform the original model with the table)"
            )
        else:
            try:
                found.append(rule.at_operation(function))
            except RuleError as error:
                problem = str(error)
        if problem:
            raise PlanError(
                f"rule {rule.name!r} depends on the operation whose backward it replaces. At site {place.site.name} "
                f"({place.site.spelling}) it is not possible, as {problem}. Give this site another rule or None in an "
                f"entry before {entry.selector!r}."
            )
    return tuple(found)


def _check_rules(place: Located, entry: Entry) -> None:
    """Raise `PlanError` if a rule of an entry cannot act at a site."""
    assert entry.rules is not None
    where = f"site {place.site.name} ({place.site.spelling})"
    if isinstance(place, LocatedOperation) and place.op is None:
        _check_module(place, entry, where)
    for rule in entry.rules:
        if place.site.kind not in rule.kinds:
            raise PlanError(
                f"rule {rule.name!r} is for {' and '.join(rule.kinds)} sites only, but entry {entry.selector!r} gives "
                f"it to the {place.site.kind} {place.site.name}. Narrow the entry, or put an entry before it that "
                f"gives this site another rule or None."
            )
        several = bool(rule.declaration.needs_operation)
        if several:
            check_operands(place, entry, rule, where)
        if place.op is not None and not (place.op.keeps_shape or several) and rule.keeps_shape:
            raise PlanError(
                f"rule {rule.name!r} returns a gradient of the shape of the output, but {place.op.name} changes "
                f"the shape, at {where}. Keep its native backward ({{{place.op.name!r}: None}}), let the rule act "
                f"beside it (on({place.op.name!r}, at={place.op.operands[0]!r}), or at='output'), or give it a rule "
                f"registered with keeps_shape=False."
            )
        if isinstance(place, LocatedParameter) and place.sparse and not rule.sparse:
            raise PlanError(
                f"rule {rule.name!r} cannot take the sparse gradient of {where}. Build the embedding with "
                f"sparse=False, or give it a rule registered with sparse=True."
            )
    no_output = isinstance(place, LocatedParameter) and entry.forward is None
    for rule in entry.rules if no_output else entry.rules[1:]:
        if "y" in rule.inputs:
            problem = (
                "a parameter has no output; choose a rule that does not read y"
                if no_output
                else "it must come first in the composition"
            )
            raise PlanError(
                f"rule {rule.name!r} needs the output y of an operation: {problem}; at {where}."
            )


def _check_module(place: LocatedOperation, entry: Entry, where: str) -> None:
    """Raise `PlanError` if the rules of an entry cannot act on a module that the entry selects by its class."""
    if place.module is None or entry.rules is None:
        return
    kind = type(place.module).__name__
    remedy = (
        f"To give the rule to the parameters of these modules, write on(parameter='*', type={kind}).backward(...); to "
        f"keep the native backward of the call, give the class None."
    )
    gives = f"entry {entry.selector!r} gives the rule"
    if returns_several(place.module):
        raise PlanError(
            f"{gives} {entry.rules[0].name!r} to the call of {kind}, which returns a tuple. A rule needs one tensor; "
            f"at {where}. {remedy}"
        )
    keeping = next((rule.name for rule in entry.rules if rule.keeps_shape), None)
    if keeping is not None and changes_shape(place.module):
        raise PlanError(
            f"{gives} {keeping!r} to the call of {kind}. The rule returns a gradient of the shape of the output, but "
            f"{kind} changes the shape; at {where}. {remedy}"
        )
