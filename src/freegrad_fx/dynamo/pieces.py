"""One graph that Dynamo captured: its sites and their decisions, and its rewriting.

The code that Dynamo makes for one module runs for every other one of its class, unless a guard forbids it: so a piece
can say what its sites are called, and what the table decides for them, when it runs elsewhere in the program. Knows
nothing of what runs when.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from .._torch.dynamo import name_sources
from .._torch.graphs import is_erased
from .._torch.tensors import version
from ..capture import Capture
from ..capture.captured import Variant, sets_grad_mode
from ..graph.aliasing import Aliasing
from ..graph.provenance import META, origin
from ..plan import Decided, Decision, make_plan
from ..rewrite import rewrite
from ..sites.parameters import find_parameters
from ..sites.site import Located, LocatedOperation, LocatedParameter
from ..table import RuleTable
from .closed import closed_operators, is_given_a_rule, sites_in_closed
from .folding import fold_calls
from .frames import Setting
from .homes import Modules, find_homes, names_inside, number_calls
from .lowering import lower
from .programs import Calls, Program
from .whole import unfold

__all__ = ["Decoupled", "Occurrence", "Piece"]


Decoupled: TypeAlias = dict[tuple[int, bool], tuple[Tensor, int, Tensor]]
"""What rules made of parameters, which stand with it in their version of then; by identity and grad mode."""


@dataclass(frozen=True, eq=False)
class Occurrence:
    """The sites of a piece where it runs.

    Attributes:
        sites: Every site as it is called there, with its program and the decision for it.
        entries: For every site the index of the entry of the table that decides it there.
        counts: How many sites of each kind it has.
        parameters: The names of the parameters to which rules are given, and whether these are in the graph.
    """

    sites: tuple[tuple[Program, Located, Decision], ...]
    entries: tuple[int | None, ...]
    counts: Calls
    parameters: Mapping[tuple[Program, str], bool]


@dataclass(frozen=True)
class _Place:
    """A site as it was captured."""

    program: Program
    place: Located
    decision: Decision
    # The path of its owner, or its name, from the module whose code the piece is
    anchored: str | None
    inside: bool  # whether its rules are in the graph


class Piece:
    """A graph of Dynamo's, rewritten.

    Args:
        gm: The graph; it is changed.
        table: The rules.
        setting: Where it is captured.
        before: How many sites came before it.
        program_of: The program of a model.
        alone: Whether no other graph runs in the same call, so that the rules of parameters can be in it.

    Attributes:
        program: The program that it is captured in.
        opaque: What is in it that no rule can reach.
        unreached: The names of the sites among it to which the table gives a rule, each with where it is.
        entries: For every site the index of the entry of the table that decided it.

    Raises:
        PlanError: The table gives a rule to a site that the rule cannot serve.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        table: RuleTable,
        setting: Setting,
        before: Calls,
        program_of: Callable[[nn.Module | None], Program],
        alone: bool,
    ) -> None:
        self._table = table
        self._program_of = program_of
        self._names: dict[
            Any, tuple[list[tuple[Program, Located]], list[Any], tuple[Any, ...]]
        ] = {}
        self._occurrences: dict[Any, Occurrence] = {}
        self.program = program_of(setting.top())
        modules = Modules(setting)
        whole = fold_calls(gm, table, setting, self.program, modules)
        homes = find_homes(gm, setting, program_of, modules)
        for node, home in homes.items():
            node.meta[META] = home.origin(node)
        graph_modules = tuple(dict.fromkeys(home.graph_module for home in homes.values()))
        number_calls(homes, graph_modules, table, before)
        self.opaque = list(closed_operators(homes))
        self.unreached = [
            f"site {place.site.name} ({place.site.source}) keeps its backward: it is in torch.{name}, which runs "
            f"graphs of its own"
            for name, place in sites_in_closed(homes, setting, modules)
            if is_given_a_rule(place, table)
        ]
        self._given: dict[int, fx.GraphModule] = {}
        self._sets_grad_mode = sets_grad_mode(gm.graph)
        decided: dict[fx.Node, tuple[Located, Decision]] = {}
        for module in graph_modules:
            capture = Capture(module, self.program.name, (Variant({}, module.graph),))
            plan, (pairs,) = make_plan(capture, table)
            transformed = set(_transformed(module.graph))
            pairs = [(p, _kept(p, d) if _node(p) in transformed else d) for p, d in pairs]
            self.opaque += [note for note in plan.opaque if note not in self.opaque]
            decided.update({_node(place): (place, _guarded(decision)) for place, decision in pairs})
            if module is gm and not alone:
                pairs = self._take_out(gm, pairs)
            rewrite(module.graph, module, pairs)
            for node in whole[module]:
                if not is_erased(node):  # a call whose forward has been replaced is gone
                    unfold(module, node)
            lower(module.graph)
            module.graph.lint()
            module.recompile()
        name_sources(gm)
        anchor = self.program.owner(setting.modules)
        inside = names_inside(anchor)
        inputs = gm.graph.find_nodes(op="placeholder")
        given = {inputs[index] for index in self._given}
        self._places = [
            _Place(
                home.program,
                *decided[node],
                inside.get(id(home.parameter_or_owner)),
                node not in given,
            )
            for node, home in homes.items()
            if node in decided
        ]
        self.entries = tuple(placed.decision.entry for placed in self._places)

    def at(self, setting: Setting, before: Calls) -> Occurrence:
        """What its sites are where it runs.

        Args:
            setting: Where it runs.
            before: How many sites came before it.
        """
        program = self._program_of(setting.top())
        anchor = program.owner(setting.modules)
        if (program, anchor) not in self._names:
            named = [_renamed(placed, program, anchor) for placed in self._places]
            keys = [(p, place.site.path, place.site.op) for p, place in named]
            self._names[program, anchor] = named, keys, tuple(dict.fromkeys(keys))
        named, keys, distinct = self._names[program, anchor]
        first = tuple(before[key] for key in distinct) if before else None
        known = self._occurrences.get((program, anchor, first))
        if known is not None:
            return known
        counts: Calls = Counter()
        sites, entries = [], []
        for (owner, place), key, placed in zip(named, keys, self._places, strict=True):
            if isinstance(place, LocatedOperation):
                call = before[key] + counts[key]
                place = replace(place, site=replace(place.site, call=call))
                counts[key] += 1
            sites.append((owner, place, replace(placed.decision, site=place.site)))
            entries.append(self._table.decide(place))
        parameters = {
            (owner, place.site.name): placed.inside
            for (owner, place, decision), placed in zip(sites, self._places, strict=True)
            if isinstance(place, LocatedParameter) and decision.action == "rewrite"
        }
        found = Occurrence(tuple(sites), tuple(entries), counts, parameters)
        self._occurrences[program, anchor, first] = found
        return found

    def _take_out(self, gm: fx.GraphModule, pairs: Decided) -> Decided:
        """Leave in the graph what no other graph of the same call can have a part in, and parameters it writes into."""
        aliasing = Aliasing(gm.graph, gm)
        inputs = gm.graph.find_nodes(op="placeholder")
        inside: Decided = []
        for place, decision in pairs:
            if (
                isinstance(place, LocatedParameter)
                and decision.action == "rewrite"
                and not any(map(aliasing.written, place.reads))
            ):
                with_rules = _with_rules(place, decision)
                self._given.update({inputs.index(node): with_rules for node in place.reads})
            else:
                inside.append((place, decision))
        return inside

    def decouple(self, args: Sequence[Any], known: Decoupled) -> list[Any]:
        """The inputs of the graph, with what rules make of parameters in the place of those whose rules are not in it.

        Args:
            args: The inputs.
            known: What other graphs of the same call were given; it is added to.
        """
        result = list(args)
        enabled = torch.is_grad_enabled() or self._sets_grad_mode
        for index, with_rules in self._given.items():
            parameter = args[index]
            key = id(parameter), enabled
            # One that has been written into may be another for a new forward
            if key not in known or known[key][1] != _version(parameter):
                with torch.set_grad_enabled(enabled):
                    known[key] = parameter, _version(parameter), with_rules(parameter)
            result[index] = known[key][2]
        return result


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else version(tensor)


def _with_rules(place: LocatedParameter, decision: Decision) -> fx.GraphModule:
    """The function of a parameter that its rules are put into."""
    graph, root = fx.Graph(), nn.Module()
    node = graph.placeholder("parameter")
    node.meta.update({META: origin(place.reads[0]), "val": place.tensor})
    graph.output(node)
    rewrite(graph, root, [(found, decision) for found in find_parameters(graph, root)])
    return fx.GraphModule(root, graph)


def _renamed(placed: _Place, program: Program, anchor: nn.Module | None) -> tuple[Program, Located]:
    """A site under the name that it has where the code of its piece runs for another module."""
    place, site = placed.place, placed.place.site
    if placed.anchored is None or anchor is None:
        return placed.program, place
    if isinstance(place, LocatedParameter):
        names = program.names(anchor.get_parameter(placed.anchored))
        site = replace(site, path=names[0].rpartition(".")[0], names=names)
    else:
        site = replace(site, path=program.path(anchor.get_submodule(placed.anchored)))
    return program, replace(place, site=site)


def _guarded(decision: Decision) -> Decision:
    """A decision as it is reported: Dynamo guards whether a parameter learns."""
    if not decision.frozen:
        return decision
    reason = (
        "it is frozen (requires_grad=False), so it gets no gradient; compiled anew once it learns"
    )
    return replace(decision, reason=reason)


def _node(place: Located) -> fx.Node:
    return place.reads[0] if isinstance(place, LocatedParameter) else place.node  # type: ignore[attr-defined]


def _transformed(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes that run inside of a transform of `torch.func`, where PyTorch drops the backward of a rule."""
    depth = 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        depth += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
        if depth and node.op != "placeholder":
            yield node


def _kept(place: Located, decision: Decision) -> Decision:
    if decision.action != "rewrite":
        return decision
    reason = "it is inside of a transform of torch.func, whose compiled form would drop the rule"
    return Decision(place.site, "skip", entry=decision.entry, reason=reason)
