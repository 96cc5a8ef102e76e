"""One graph that Dynamo captured: where its nodes come from, its sites and their decisions, and its rewriting.

Dynamo opens every module, and says of a node which modules were being called. The code that it makes for one module
runs for every other one of its class, unless a guard forbids it: so a piece can say what its sites are called, and what
the table decides for them, when it runs elsewhere in the program. Knows nothing of what runs when.
"""

from __future__ import annotations

import gc
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from .._torch.dynamo import name_sources
from .._torch.graphs import is_erased
from .._torch.operators import GraphOperator, operator_name
from .._torch.tensors import version
from ..aliasing import Aliasing
from ..capture import Capture, Opaque
from ..captured import Variant, sets_grad_mode
from ..plan import FROZEN, Decided, Decision, make_plan
from ..provenance import META, Origin, is_users_file, origin
from ..rewrite import rewrite
from ..sites import Located, Operation, Parameter, find_parameters, find_sites
from ..table import RuleTable
from .frames import Setting
from .lowering import lower
from .programs import Program, class_of
from .whole import Call, captured_tensor, fold, refusal, unfold

__all__ = ["Calls", "Decoupled", "Occurrence", "Piece"]

Calls: TypeAlias = "Counter[tuple[Program, str, str]]"
"""How many sites of a program, owner path and op there have been."""

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
        modules = _Modules(setting)
        whole = _fold(gm, table, setting, self.program, modules)
        homes = _homes(gm, setting, program_of, modules)
        for node, home in homes.items():
            node.meta[META] = home.origin(node)
        graph_modules = tuple(dict.fromkeys(home.graph_module for home in homes.values()))
        _number(homes, graph_modules, table, before)
        self.opaque = list(_closed(homes))
        self.unreached = [
            f"site {place.site.name} ({place.site.source}) keeps its backward: it is in torch.{name}, which runs "
            f"graphs of its own"
            for name, place in _in_closed(homes, setting, modules)
            if _given_a_rule(place, table)
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
        inside = _inside(anchor)
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
            if isinstance(place, Operation):
                call = before[key] + counts[key]
                place = replace(place, site=replace(place.site, call=call))
                counts[key] += 1
            sites.append((owner, place, replace(placed.decision, site=place.site)))
            entries.append(self._table.decide(place))
        parameters = {
            (owner, place.site.name): placed.inside
            for (owner, place, decision), placed in zip(sites, self._places, strict=True)
            if isinstance(place, Parameter) and decision.action == "rewrite"
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
                isinstance(place, Parameter)
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


def _with_rules(place: Parameter, decision: Decision) -> fx.GraphModule:
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
    if isinstance(place, Parameter):
        names = program.names(anchor.get_parameter(placed.anchored))
        site = replace(site, path=names[0].rpartition(".")[0], names=names)
    else:
        site = replace(site, path=program.path(anchor.get_submodule(placed.anchored)))
    return program, replace(place, site=site)


def _guarded(decision: Decision) -> Decision:
    """A decision as it is reported: Dynamo guards whether a parameter learns."""
    if decision.reason is not FROZEN:
        return decision
    reason = (
        "it is frozen (requires_grad=False), so it gets no gradient; compiled anew once it learns"
    )
    return replace(decision, reason=reason)


def _node(place: Located) -> fx.Node:
    return place.reads[0] if isinstance(place, Parameter) else place.node  # type: ignore[attr-defined]


# --- transforms of torch.func ---


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


# --- where nodes come from ---


@dataclass(frozen=True)
class _Home:
    """Where a node comes from."""

    graph_module: fx.GraphModule  # the graph that it is in
    program: Program
    owner: nn.Module | None
    parameter: Tensor | None = None

    @property
    def parameter_or_owner(self) -> Any:
        return self.owner if self.parameter is None else self.parameter

    def origin(self, node: fx.Node) -> Origin:
        names = () if self.parameter is None else self.program.names(self.parameter)
        return Origin(self.program.path(self.owner), _source(node), class_of(self.owner), names)


def _homes(
    gm: fx.GraphModule,
    setting: Setting,
    program_of: Callable[[nn.Module | None], Program],
    modules: _Modules,
) -> dict[fx.Node, _Home]:
    """Where every node comes from, in the order in which they run."""
    homes: dict[fx.Node, _Home] = {}
    for node, graph_module in _nodes(gm):
        called = modules.of(node)
        program = program_of(setting.top(*called))
        owner = program.owner((*setting.modules, *called))
        homes[node] = _Home(graph_module, program, owner)
    programs = dict.fromkeys(home.program for home in homes.values())
    for node in homes:
        if (example := _example(node)) is None:
            continue
        for program in programs:
            if names := program.names(example):
                homes[node] = _Home(gm, program, program.holder(names[0]), example)
    return homes


class _Modules:
    """Finds the modules that Dynamo names by their identity."""

    def __init__(self, setting: Setting) -> None:
        tops = [m for m in (setting.root, *setting.modules) if m is not None]
        self._known = {id(module): module for top in tops for module in top.modules()}
        self._searched = False

    def of(self, node: fx.Node) -> list[nn.Module]:
        """The modules that were being called when a node was made, the outermost first, as far as they exist."""
        return [module for _, module in self.calls(node)]

    def calls(self, node: fx.Node) -> list[tuple[str, nn.Module]]:
        """The same, with the key of the call."""
        found = []
        for key, (_, kind) in (node.meta.get("nn_module_stack") or {}).items():
            # a second call of a module is marked by an @
            module = self._find(int(key.partition("@")[0]))
            if module is not None and type(module) is kind:
                found.append((key, module))
        return found

    def _find(self, identity: int) -> nn.Module | None:
        if identity not in self._known and not self._searched:
            # What a compiled function calls is known to Dynamo alone
            self._searched = True
            alive = (thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module))
            self._known.update((id(module), module) for module in alive)
        return self._known.get(identity)


def _example(node: fx.Node) -> Tensor | None:
    """The parameter that an input of a graph is."""
    tensor = captured_tensor(node)
    return tensor if isinstance(tensor, nn.Parameter) else None


_FRAME = re.compile(r'^  File "(.*)", line (\d+), in ', re.MULTILINE)


def _source(node: fx.Node) -> str:
    """``file:line`` of the user's code; the last of the frames is the innermost."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    users = [f"{file}:{line}" for file, line in frames if is_users_file(file)]
    return users[-1] if users else ""


def _inside(anchor: nn.Module | None) -> dict[int, str]:
    """The paths of modules and the names of parameters inside of a module, by identity."""
    if anchor is None:
        return {}
    named = [*anchor.named_modules(), *anchor.named_parameters()]
    return {id(thing): path for path, thing in named}


def _number(
    homes: Mapping[fx.Node, _Home],
    graph_modules: tuple[fx.GraphModule, ...],
    table: RuleTable,
    before: Calls,
) -> None:
    """Count the calls of sites over several graphs, in the order in which their nodes run."""
    calls = Counter(before)
    sites = {
        place.node: place.site
        for module in graph_modules
        for place in find_sites(module.graph, module, table.types_in(module))
    }
    for node, home in homes.items():
        if node in sites:
            key = home.program, sites[node].path, sites[node].op
            node.meta[META] = replace(origin(node), call=calls[key])
            calls[key] += 1


# --- calls that are kept whole ---


def _fold(
    gm: fx.GraphModule, table: RuleTable, setting: Setting, program: Program, modules: _Modules
) -> dict[fx.GraphModule, list[fx.Node]]:
    """Make one node of every call of a class that the table names."""
    folded: dict[fx.GraphModule, list[fx.Node]] = defaultdict(list)
    kinds = tuple(table.types_in(program.root or gm))
    if not kinds:
        return folded
    for module in setting.modules:
        if isinstance(module, kinds):
            raise refusal(module, program.path(module), "Dynamo captures it in several graphs")
    calls: dict[tuple[fx.GraphModule, str], list[fx.Node]] = defaultdict(list)
    called: dict[str, nn.Module] = {}
    for node, graph_module in _nodes(gm):
        if node.op in ("placeholder", "get_attr", "output"):
            continue  # Dynamo writes the first use of an input to it
        outermost = next((c for c in modules.calls(node) if isinstance(c[1], kinds)), None)
        if outermost is not None:
            key, module = outermost
            called[key] = module
            calls[graph_module, key].append(node)
    for number, ((graph_module, key), nodes) in enumerate(calls.items()):
        stack = dict(nodes[0].meta["nn_module_stack"])
        for further in list(stack)[list(stack).index(key) + 1 :]:
            del stack[further]
        call = Call(called[key], program.path(called[key]), stack, tuple(nodes))
        folded[graph_module].append(fold(graph_module, call, number))
    return folded


# --- graphs in graphs ---

# These run the graph that they are given, once, where they stand.
_OPEN = frozenset(
    {
        "tag_activation_checkpoint",
        "wrap",
        "wrap_activation_checkpoint",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    }
)


def _nodes(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """The nodes of a graph and of the graphs that it runs, in the order in which they run."""
    for node in gm.graph.nodes:
        if _operator(node) in _OPEN:
            yield from (pair for body in _bodies(node, gm)[:1] for pair in _nodes(body))
        yield node, gm


def _operator(node: fx.Node) -> str:
    """The name of the operator that runs graphs, which a node calls; ``""`` for other nodes."""
    return operator_name(node.target) if isinstance(node.target, GraphOperator) else ""


def _bodies(node: fx.Node, gm: fx.GraphModule) -> list[fx.GraphModule]:
    named = [a.target for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    found = [getattr(gm, str(name), None) for name in named]
    return [body for body in found if isinstance(body, fx.GraphModule)]


def _all_bodies(node: fx.Node, gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graphs that an operator runs, and those that they run."""
    for body in _bodies(node, gm):
        yield body
        for inner in body.graph.nodes:
            if _operator(inner):
                yield from _all_bodies(inner, body)


def _in_closed(
    homes: Mapping[fx.Node, _Home], setting: Setting, modules: _Modules
) -> Iterator[tuple[str, Located]]:
    """The sites in the graphs that such an operator runs, with its name."""
    for node, home in homes.items():
        name = _operator(node)
        if not name or name in _OPEN or name == "autograd_function_apply":
            continue
        for body in _all_bodies(node, home.graph_module):
            for inner in body.graph.nodes:
                owner = home.program.owner(
                    (*setting.modules, *modules.of(node), *modules.of(inner))
                )
                where = Origin(home.program.path(owner), _source(inner), class_of(owner))
                inner.meta[META] = where
            yield from ((name, place) for place in find_sites(body.graph, body))


def _given_a_rule(place: Located, table: RuleTable) -> bool:
    index = table.decide(place)
    return index is not None and table.entries[index].rules is not None


def _closed(homes: Mapping[fx.Node, _Home]) -> Iterator[Opaque]:
    """The operators that run graphs in which a rule would not act, as far as these compute activations."""
    for node, home in homes.items():
        name = _operator(node)
        if not name or name in _OPEN:
            continue
        where = origin(node)
        if name == "autograd_function_apply":
            what, reason = "an autograd.Function", "keeps the backward it has"
        elif any(find_sites(b.graph, b) for b in _all_bodies(node, home.graph_module)):
            what, reason = f"torch.{name}", "its branches are graphs of their own"
        else:
            continue
        yield Opaque(where.owner, what, reason, where.source)
