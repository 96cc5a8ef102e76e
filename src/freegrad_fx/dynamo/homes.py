"""The module or parameter that each node of a captured graph belongs to, read from the metadata that Dynamo writes."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from .._torch.functions import forwards_by_line
from ..graph.provenance import META, Origin, is_users_file, origin
from ..sites.operations import find_sites
from ..sites.site import Site
from ..table import RuleTable
from .frames import Setting
from .nested import nodes_in_order
from .programs import Calls, Program, class_of
from .whole import captured_tensor

__all__ = ["Home", "Modules", "find_homes", "names_inside", "number_calls", "source_of"]


@dataclass(frozen=True)
class Home:
    """The graph, the program, and the module or parameter that a node belongs to."""

    graph_module: fx.GraphModule  # the graph that it is in
    program: Program
    owner: nn.Module | None
    parameter: Tensor | None = None
    function: str = ""  # the autograd.Function whose forward made it

    @property
    def parameter_or_owner(self) -> Any:
        """The parameter of a node that is a parameter; the owner of other nodes."""
        return self.owner if self.parameter is None else self.parameter

    def origin(self, node: fx.Node) -> Origin:
        """The origin to write on a node."""
        names = () if self.parameter is None else self.program.names(self.parameter)
        path, kind = self.program.path(self.owner), class_of(self.owner)
        return Origin(path, source_of(node), kind, names, function=self.function)


def find_homes(
    gm: fx.GraphModule,
    setting: Setting,
    program_of: Callable[[nn.Module | None], Program],
    modules: Modules,
) -> dict[fx.Node, Home]:
    """The homes of all nodes, in the order in which the nodes run."""
    homes: dict[fx.Node, Home] = {}
    forward_at = forwards_by_line()
    for node, graph_module in nodes_in_order(gm):
        called = modules.of(node)
        program = program_of(setting.top(*called))
        owner = program.owner((*setting.modules, *called))
        homes[node] = Home(graph_module, program, owner, function=_function_of(node, forward_at))
    programs = dict.fromkeys(home.program for home in homes.values())
    for node in homes:
        if (example := _example(node)) is None:
            continue
        for program in programs:
            if names := program.names(example):
                homes[node] = Home(gm, program, program.holder(names[0]), example)
    return homes


class Modules:
    """Finds modules by their identity, by which Dynamo refers to them."""

    def __init__(self, setting: Setting) -> None:
        tops = [m for m in (setting.root, *setting.modules) if m is not None]
        self._known = {id(module): module for top in tops for module in top.modules()}
        self._searched = False

    def of(self, node: fx.Node) -> list[nn.Module]:
        """The existing modules that were being called when a node was recorded, the outermost first."""
        return [module for _, module in self.calls(node)]

    def calls(self, node: fx.Node) -> list[tuple[str, nn.Module]]:
        """The same as `of`, each module with the key of the call."""
        found = []
        for key, (_, kind) in (node.meta.get("nn_module_stack") or {}).items():
            # the key of a second call of a module has an @
            module = self._find(int(key.partition("@")[0]))
            if module is not None and type(module) is kind:
                found.append((key, module))
        return found

    def _find(self, identity: int) -> nn.Module | None:
        if identity not in self._known and not self._searched:
            # A compiled function can call modules that no known module contains
            self._searched = True
            alive = (thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module))
            self._known.update((id(module), module) for module in alive)
        return self._known.get(identity)


def _example(node: fx.Node) -> Tensor | None:
    """The parameter that is an input of a graph; None for other nodes."""
    tensor = captured_tensor(node)
    return tensor if isinstance(tensor, nn.Parameter) else None


_FRAME = re.compile(r'^  File "(.*)", line (\d+), in ', re.MULTILINE)


def source_of(node: fx.Node) -> str:
    """``file:line`` of the innermost line of user code that recorded a node; ``""`` if it is not known."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    users = [f"{file}:{line}" for file, line in frames if is_users_file(file)]
    return users[-1] if users else ""


def _function_of(node: fx.Node, forward_at: Callable[[str, int], type[Any] | None]) -> str:
    """The name of the autograd.Function that Dynamo has traced into, because nothing in it needs a gradient."""
    value = node.meta.get("example_value")
    if isinstance(value, Tensor) and value.requires_grad:
        return ""  # its forward is called, without `apply`
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    found = (forward_at(file, int(line)) for file, line in frames)
    return next((function.__qualname__ for function in found if function is not None), "")


def names_inside(anchor: nn.Module | None) -> dict[int, str]:
    """The paths of submodules and the names of parameters, relative to a module, by identity."""
    if anchor is None:
        return {}
    named = [*anchor.named_modules(), *anchor.named_parameters()]
    return {id(thing): path for path, thing in named}


def number_calls(
    homes: Mapping[fx.Node, Home],
    graph_modules: tuple[fx.GraphModule, ...],
    table: RuleTable,
    before: Calls,
) -> None:
    """Write the call indices on the nodes of sites, counted over all graphs in the order in which nodes run."""
    calls = Counter(before)
    sites: dict[fx.Node, list[Site]] = {}
    for module in graph_modules:
        for place in find_sites(module.graph, module, table.types_in(module), table.on_demand):
            sites.setdefault(place.node, []).append(place.site)
    for node, home in homes.items():
        numbers = {}
        for site in sites.get(node, ()):
            key = home.program, site.path, site.op
            numbers[site.op] = calls[key]
            calls[key] += 1
        if numbers:
            node.meta[META] = replace(origin(node), calls=tuple(numbers.items()))
