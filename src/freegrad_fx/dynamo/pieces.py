"""One graph that Dynamo captured: its sites, their decisions, and its rewriting.

Dynamo runs the code that it compiled for one module also for other modules of the same class, unless a guard fails. A
piece therefore tells the names of its sites, and the entries that decide them, for each place of the program where it
runs. This file does not know in which order pieces run.
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
from ..sites.remarks import Remark
from ..sites.site import REPLACE, Located, LocatedOperation, LocatedParameter
from ..table import RuleTable
from .closed import closed_operators, is_given_a_rule, sites_in_closed
from .folding import fold_calls
from .frames import Setting
from .homes import Home, Modules, find_homes, names_inside, number_calls
from .lowering import lower
from .programs import Calls, Program
from .whole import unfold

__all__ = ["Decoupled", "Occurrence", "Piece", "version_of"]


Decoupled: TypeAlias = dict[tuple[int, bool], tuple[Tensor, int, Tensor]]
"""Parameters by identity and grad mode: the parameter, its version, and the result of its rules."""


@dataclass(frozen=True, eq=False)
class Occurrence:
    """The sites of a piece at one place of the program where it runs.

    Attributes:
        sites: Every site with the name that it has there, its program and its decision.
        entries: For each site, the index of the table entry that decides it there.
        counts: The number of sites by program, owner path and op.
        parameters: The parameters that get rules, and whether these rules are in the graph.
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
    # The path of its owner, or the parameter's name, relative to the module that is running
    anchored: str | None
    inside: bool  # whether its rules are in the graph


class Piece:
    """A captured graph with its rules.

    Args:
        gm: The graph; it is changed.
        table: The rule table.
        setting: The place of the program where the graph is captured.
        before: The sites that run before the graph in the same call, counted.
        program_of: Returns the program of a model.
        alone: Whether the graph is the only one that runs in the call, so that it can contain the rules of parameters.

    Attributes:
        program: The program in which the graph is captured.
        opaque: The calls in the graph that no rule can reach.
        steps: The steps in the graph that are comparisons.
        unreached: For each site in such a call to which the table gives a rule, a text that names it.
        entries: For each site, the index of the table entry that decides it.
        learnt: The ids of the parameters that the graph uses.

    Raises:
        PlanError: The table gives a site a rule that cannot act there.
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
        self._given: dict[int, fx.GraphModule] = {}
        self.program = program_of(setting.top())
        modules = Modules(setting)
        folded = fold_calls(gm, table, setting, self.program, modules)
        self._sets_grad_mode = sets_grad_mode(gm.graph)
        homes = find_homes(gm, setting, program_of, modules)
        graph_modules = _with_origins(homes, table, before)
        self.opaque = list(closed_operators(homes))
        self.steps: list[Remark] = []
        self.unreached = list(_unreached(homes, setting, modules, table))
        self.learnt = {id(home.parameter_or_owner) for home in homes.values()}
        decided: dict[fx.Node, Decided] = {}
        for module in graph_modules:
            pairs = self._decided(module)
            for place, decision in pairs:
                decided.setdefault(_node(place), []).append((place, _guarded(decision)))
            if module is gm and not alone:
                pairs = self._take_out(gm, pairs)
            _rewrite(module, pairs, folded[module])
        name_sources(gm)
        self._places = self._places_in(gm, homes, decided, self.program.owner(setting.modules))
        self.entries = tuple(placed.decision.entry for placed in self._places)

    def _decided(self, module: fx.GraphModule) -> Decided:
        """The sites of one graph with their decisions. Its opaque calls are added to those of the piece."""
        capture = Capture(module, self.program.name, (Variant({}, module.graph),))
        plan, (pairs,) = make_plan(capture, self._table)
        self.opaque += [note for note in plan.opaque if note not in self.opaque]
        self.steps += plan.steps
        transformed = set(_transformed(module.graph))
        return [(p, _kept(p, d) if _node(p) in transformed else d) for p, d in pairs]

    def _places_in(
        self,
        gm: fx.GraphModule,
        homes: Mapping[fx.Node, Home],
        decided: Mapping[fx.Node, Decided],
        anchor: nn.Module | None,
    ) -> list[_Place]:
        """The sites as they were captured, relative to the module that was running."""
        names = names_inside(anchor)
        inputs = gm.graph.find_nodes(op="placeholder")
        outside = {inputs[index] for index in self._given}
        return [
            _Place(
                home.program,
                place,
                decision,
                names.get(id(home.parameter_or_owner)),
                node not in outside,
            )
            for node, home in homes.items()
            for place, decision in decided.get(node, ())
        ]

    def at(self, setting: Setting, before: Calls) -> Occurrence:
        """Return the sites at a place where the piece runs.

        Args:
            setting: The place of the program.
            before: The sites that ran before it in the same call, counted.
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
                counts[key] += place.site.at == REPLACE  # the places at an operation follow it
                call = before[key] + counts[key] - 1
                place = replace(place, site=replace(place.site, call=call))
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
        """Take out the parameters, whose rules run outside of the graph because other graphs can use them too.

        Operations stay in the graph, and so do parameters that the graph writes into.
        """
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
        """Return the inputs of the graph, with the rules applied to the parameters whose rules are not in the graph.

        Args:
            args: The inputs.
            known: The results for other graphs of the same call. New results are added.
        """
        result = list(args)
        enabled = torch.is_grad_enabled() or self._sets_grad_mode
        for index, with_rules in self._given.items():
            parameter = args[index]
            key = id(parameter), enabled
            # A parameter that was written into has to go through its new forward again
            if key not in known or known[key][1] != version_of(parameter):
                with torch.set_grad_enabled(enabled):
                    known[key] = parameter, version_of(parameter), with_rules(parameter)
            result[index] = known[key][2]
        return result


def _with_origins(
    homes: Mapping[fx.Node, Home], table: RuleTable, before: Calls
) -> tuple[fx.GraphModule, ...]:
    """Write the origins on the nodes, and return the graphs that contain them."""
    for node, home in homes.items():
        node.meta[META] = home.origin(node)
    graph_modules = tuple(dict.fromkeys(home.graph_module for home in homes.values()))
    number_calls(homes, graph_modules, table, before)
    return graph_modules


def _unreached(
    homes: Mapping[fx.Node, Home], setting: Setting, modules: Modules, table: RuleTable
) -> Iterator[str]:
    """The sites in nested graphs to which the table gives a rule that cannot act there, as text."""
    for name, place in sites_in_closed(homes, setting, modules, table):
        if is_given_a_rule(place, table):
            site = place.site
            yield (
                f"site {site.name} ({site.source}) keeps its backward: it is inside of torch.{name}, which runs "
                f"nested graphs"
            )


def _rewrite(module: fx.GraphModule, pairs: Decided, folded: Sequence[fx.Node]) -> None:
    """Rewrite one graph, and put the nodes of folded calls back into it."""
    rewrite(module.graph, module, pairs)
    for node in folded:
        if not is_erased(node):  # a call whose forward is replaced is erased
            unfold(module, node)
    lower(module.graph)
    module.graph.lint()
    module.recompile()


def version_of(tensor: Tensor) -> int:
    """The number of writes into a tensor; 0 for tensors of inference mode."""
    return 0 if tensor.is_inference() else version(tensor)


def _with_rules(place: LocatedParameter, decision: Decision) -> fx.GraphModule:
    """A graph that applies the rules of a parameter to it."""
    graph, root = fx.Graph(), nn.Module()
    node = graph.placeholder("parameter")
    node.meta.update({META: origin(place.reads[0]), "val": place.tensor})
    graph.output(node)
    rewrite(graph, root, [(found, decision) for found in find_parameters(graph, root)])
    return fx.GraphModule(root, graph)


def _renamed(placed: _Place, program: Program, anchor: nn.Module | None) -> tuple[Program, Located]:
    """A site under its name at the place where its piece runs: there, `anchor` is the module that is running."""
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
    """A decision as it is reported. Dynamo compiles again if `requires_grad` of a parameter changes."""
    if not decision.frozen:
        return decision
    reason = "it is frozen (requires_grad=False), so it gets no gradient; compiled again once it is trained"
    return replace(decision, reason=reason)


def _node(place: Located) -> fx.Node:
    return place.reads[0] if isinstance(place, LocatedParameter) else place.node  # type: ignore[attr-defined]


def _transformed(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes inside of a transform of `torch.func`, where PyTorch drops the backward of a rule."""
    depth = 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        depth += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
        if depth and node.op != "placeholder":
            yield node


def _kept(place: Located, decision: Decision) -> Decision:
    """The decision for a site inside of a transform of `torch.func`."""
    if decision.action != "rewrite":
        return decision
    reason = (
        "it is inside of a transform of torch.func, and compiled code would drop the rule there"
    )
    return Decision(place.site, "skip", entry=decision.entry, reason=reason)
