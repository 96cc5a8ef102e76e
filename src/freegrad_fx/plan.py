"""Sites × RuleTable → Plan: what is to happen at every site, and why. Nothing is rewritten here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from .activations import OPS
from .aliasing import Aliasing
from .capture import Capture, Opaque
from .errors import PlanError, unknown
from .rules.rule import Rule
from .sites import Located, Site, find_opaque, find_sites
from .table import Entry, RuleTable

__all__ = ["Decision", "Plan", "make_plan"]


@dataclass(frozen=True)
class Decision:
    """What happens at one site.

    Attributes:
        site: The site.
        action: ``"rewrite"``; ``"native"`` where the table leaves it; ``"skip"`` where the table wants a rule and
            none can be given.
        rules: The rules it gets, the first for the gradient that comes in.
        forward: The canonical name of the operation that replaces its forward, or None.
        entry: The index of the table's entry that decided, or None.
        reason: Why.
        modes: In which of the model's modes the site exists; ``""`` for all.
    """

    site: Site
    action: str
    rules: tuple[Rule, ...] = ()
    forward: str | None = None
    entry: int | None = None
    reason: str = ""
    modes: str = ""


@dataclass(frozen=True)
class Plan:
    """The decision for every site of a model, and what no decision could reach.

    Attributes:
        model: The name of the model's class.
        decisions: In execution order.
        table: The table.
        opaque: Code that was kept whole, in which activations may be computed.
        lost: What the graph cannot do that the model did.
        meant: For every entry of the table the number of sites it matches, decided by it or by an earlier one.
    """

    model: str
    decisions: tuple[Decision, ...]
    table: RuleTable
    opaque: tuple[Opaque, ...] = ()
    lost: tuple[Opaque, ...] = ()
    meant: tuple[int, ...] = ()

    @property
    def hits(self) -> tuple[int, ...]:
        """For every entry of the table the number of sites it decided."""
        decided = [decision.entry for decision in self.decisions]
        return tuple(decided.count(index) for index in range(len(self.table.entries)))

    @property
    def unmatched(self) -> tuple[Entry, ...]:
        """The entries that match no site."""
        meant = self.meant or self.hits
        return tuple(e for e, sites in zip(self.table.entries, meant, strict=True) if not sites)

    def with_action(self, action: str) -> tuple[Decision, ...]:
        """The decisions of one action."""
        return tuple(decision for decision in self.decisions if decision.action == action)

    def __str__(self) -> str:
        from .report import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from .report import as_html

        return as_html(self)

    def to_dict(self) -> dict[str, object]:
        """The plan as plain data."""
        from .report import as_dict

        return as_dict(self)


def make_plan(
    capture: Capture, table: RuleTable, leaf_modules: Sequence[type[nn.Module]] = ()
) -> tuple[Plan, list[list[tuple[Located, Decision]]]]:
    """Decide every site of a capture.

    Args:
        capture: The capture.
        table: The table.
        leaf_modules: The module classes that the caller wanted kept whole.

    Returns:
        The plan, and for every graph of the capture its sites with the decisions.

    Raises:
        PlanError: An entry gives a rule to a site that the rule cannot serve.
    """
    decided = [_decide_all(variant.graph, capture.root, table) for variant in capture.variants]
    located = [[place for place, _ in pairs] for pairs in decided]
    modes: dict[Decision, list[str]] = {}
    for variant, pairs in zip(capture.variants, decided, strict=True):
        for _, decision in pairs:
            modes.setdefault(decision, []).append(variant.label)
    everywhere = len(capture.variants)
    opaque = [*capture.opaque]
    whole = {note.path for note in opaque}
    lost = [*capture.lost]
    for variant, pairs in zip(capture.variants, decided, strict=True):
        calls = find_opaque(variant.graph, capture.root, table.types, leaf_modules)
        opaque += [c for c in calls if c not in opaque and c.path not in whole]
        rewritten = [place for place, decision in pairs if decision.action == "rewrite"]
        lost += [n for n in _silent_hooks(rewritten, capture.root) if n not in lost]
    plan = Plan(
        model=capture.class_name,
        decisions=tuple(
            replace(decision, modes="" if len(found) == everywhere else "; ".join(found))
            for decision, found in modes.items()
        ),
        table=table,
        opaque=tuple(opaque),
        lost=tuple(lost),
        meant=tuple(
            len({p.site for sites in located for p in sites if entry.matches(p)})
            for entry in table.entries
        ),
    )
    return plan, decided


def _decide_all(
    graph: fx.Graph, root: nn.Module, table: RuleTable
) -> list[tuple[Located, Decision]]:
    """The decisions for one graph. A place is not the same one in another graph for having the same name there."""
    aliasing: Aliasing | None = None
    decided = []
    for place in find_sites(graph, root, table.types):
        decision = _decide(place, table)
        if decision.action == "rewrite" and (place.op is None or place.op.name == "identity"):
            # It may return its input itself. A write into the result would then reach the input, behind autograd's back
            aliasing = aliasing or Aliasing(graph, root)
            if aliasing.written_after(
                place.node, place.node, certainly=True
            ) and aliasing.read_after(place.input, place.node):
                reason = "it may return its input, which is read after the result is written into"
                decision = Decision(place.site, "skip", entry=decision.entry, reason=reason)
        decided.append((place, decision))
    return decided


def _silent_hooks(sites: Sequence[Located], root: nn.Module) -> Iterator[Opaque]:
    """Backward hooks of modules whose backward is replaced: no gradient passes through the module any more."""
    for place in sites:
        if place.node.op == "call_module":
            module = root.get_submodule(str(place.node.target))
            if module._backward_hooks or module._backward_pre_hooks:
                what = f"the backward hooks of {type(module).__name__}"
                reason = "they do not fire: the rule takes the place of the module's backward"
                yield Opaque(str(place.node.target), what, reason, place.site.source)


def _decide(place: Located, table: RuleTable) -> Decision:
    site = place.site
    index = table.decide(place)
    if index is None:
        return Decision(site, "native", reason=place.obstacle or "no entry matches")
    entry = table.entries[index]
    if entry.rules is None:
        return Decision(site, "native", entry=index, reason=f"{entry.selector} = None")
    if place.obstacle:
        return Decision(site, "skip", entry=index, reason=place.obstacle)
    _check_fit(place, entry)
    return Decision(site, "rewrite", entry.rules, entry.forward, index, f"matches {entry.selector}")


def _check_fit(place: Located, entry: Entry) -> None:
    """Raise `PlanError` if the rules of an entry cannot serve a site."""
    assert entry.rules is not None
    where = f"site {place.site.name} ({place.site.spelling})"
    if place.op is not None and not place.op.keeps_shape:
        for rule in entry.rules:
            if rule.keeps_shape:
                raise PlanError(
                    f"rule {rule.name!r} returns a gradient of the shape of the output, but {place.op.name} changes "
                    f"the shape, at {where}. Leave it native ({{{place.op.name!r}: None}}), or give it a rule "
                    f"registered with keeps_shape=False."
                )
    for rule in entry.rules[1:]:
        if "y" in rule.inputs:
            raise PlanError(
                f"rule {rule.name!r} needs the output y of the operation, so it must come first in a composition; "
                f"at {where}."
            )
    if entry.forward is None:
        return
    replaceable = [op.name for op in OPS.values() if op.function is not None and op.keeps_shape]
    if entry.forward not in replaceable:
        raise PlanError(unknown("forward", entry.forward, replaceable, f"Asked for at {where}."))
    if place.op is not None and not place.op.keeps_shape:
        raise PlanError(
            f"forward={entry.forward!r} keeps the shape, but {place.op.name} changes it, at {where}."
        )
