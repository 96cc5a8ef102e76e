"""The version of a forward for calls that nothing traces or watches: it calls each site once.

In the graph, and in the code that readers see, a site is three calls: the operation, and a function before it and
after it. Here the three are one call, `backward.fused`. `Chooser` asks before each call of a model whether that is the
same. It does not ask again within the call: after a part that can run code of the user, which can change anything, the
sites stay three calls.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn

from .._torch.dispatch import (
    dispatch_modes,
    function_modes,
    function_transforms_active,
    in_pre_dispatch,
    tracing_state,
)
from .._torch.dynamo import is_compiling, takes_for_constant
from .._torch.graphs import code_generator, is_fx_tracing, qualified_name
from .._torch.modules import COMPILED_CALL, buffers_of, children_of, hooks_of, parameters_of
from ..backward.fused import Operation
from ..backward.node import extension_in_use
from ..backward.observing import observers_of_now, thread_observers
from ..context import explicit_rules_act, intercepted, thread_state
from ..graph.nodes import argument, called_path, takes_parameters
from ..ops.direct import called_directly, site_function
from ..ops.gradients import decoupled, stop_gradient
from ..vocabulary.activations import OPS
from ..vocabulary.recognition import recognise

__all__ = ["DIRECT", "FUSED", "Chooser", "Kept", "made_later"]

Forward: TypeAlias = Callable[..., Any]

DIRECT = -2
"""The version for a call that runs, without hooks: the functions around operations are those of the C++ extension."""

FUSED = -3
"""The version for a call of `DIRECT` that nothing watches, with gradients: each site is one call."""


class Kept:
    """What has to be as it was when code was generated: tables without entries, entries of dicts, and attributes."""

    def __init__(self) -> None:
        self.tables: list[Mapping[int, Any]] = []
        self.holders: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.parts: list[Any] = []
        self.owners: list[Any] = []
        self.attributes: list[str] = []
        self.values: list[Any] = []
        self.known: set[tuple[int, str]] = set()

    def add(self, holder: dict[str, Any], name: str, part: Any) -> None:
        """Keep the entry of a dict; None if there has to be none."""
        key = id(holder), name
        if key not in self.known:
            self.known.add(key)
            self.holders.append(holder)
            self.names.append(name)
            self.parts.append(part)

    def add_attribute(self, owner: Any, name: str) -> None:
        """Keep an attribute of a class."""
        key = id(owner), name
        if key not in self.known:
            self.known.add(key)
            self.owners.append(owner)
            self.attributes.append(name)
            self.values.append(getattr(owner, name))

    def lists(self) -> tuple[list[Any], ...]:
        """What is compared before each call."""
        entries = self.holders, self.names, self.parts
        return self.tables, *entries, self.owners, self.attributes, self.values

    def same_parts(self) -> bool:
        """Whether the entries of the dicts are those of then."""
        return [*map(dict.get, self.holders, self.names)] == self.parts


class Chooser:
    """Chooses the version of a forward that a call runs at once.

    Attributes:
        of_model: What has to be kept for a call that runs no hooks.
        choose: Returns the number of the version; 0 if `hooking.Versions` has to find it.
    """

    def __init__(self) -> None:
        self.of_model, self.of_sites = Kept(), Kept()
        never = is_compiling, is_fx_tracing
        extension = extension_in_use()
        if extension is None:
            self.choose = takes_for_constant(self._in_python())
            return
        lists = self.of_model.lists(), self.of_sites.lists()
        ask = extension.chooser(never, intercepted, *lists, FUSED, DIRECT)
        # Dynamo takes only a function for a constant
        self.choose = takes_for_constant(lambda: ask())

    def _in_python(self) -> Callable[[], int]:
        tables, holders, names, parts, *_ = self.of_model.lists()
        site_tables, site_holders, site_names, site_parts, *of_classes = self.of_sites.lists()
        owners, attributes, values = of_classes
        used, *_ = thread_state()
        observing, _ = thread_observers()
        gradients_enabled, exporting = torch.is_grad_enabled, torch.compiler.is_exporting

        def choose() -> int:
            if (
                is_compiling()
                or any(tables)
                or is_fx_tracing()
                or (used and intercepted())
                or (parts and [*map(dict.get, holders, names)] != parts)
            ):
                return 0
            if (
                not gradients_enabled()
                or function_transforms_active()
                or dispatch_modes()
                or function_modes()
                or tracing_state()
                or exporting()
                or in_pre_dispatch()
                or (observing and observers_of_now())
                or (used and not explicit_rules_act())
                or any(site_tables)
                or (site_parts and [*map(dict.get, site_holders, site_names)] != site_parts)
                or (values and [*map(getattr, owners, attributes)] != values)
            ):
                return DIRECT
            return FUSED

        return choose

    def module(self, root: nn.Module, path: str) -> nn.Module:
        """A module that the version calls while it is in its place."""
        found = root
        for name in path.split("."):
            holder = children_of(found)
            self.of_sites.add(holder, name, holder[name])
            found = holder[name]  # type: ignore[assignment]
        return found

    def runs_alone(self, module: nn.Module) -> bool:
        """Whether a module runs no code of the user; if so, the version is for calls in which it runs none."""
        if not all(map(_is_own_module, module.modules())):
            return False
        for part in module.modules():
            self.of_sites.add(vars(part), "forward", None)
            self.of_sites.tables.extend(hooks_of(part)[:2])  # those that run in the forward
        return True

    def forward(self, module: nn.Module) -> Callable[..., Any]:
        """The forward of a module of PyTorch, which the version calls while its call does nothing else."""
        kept = self.of_sites
        for name in ("forward", COMPILED_CALL):
            kept.add(vars(module), name, None)
        kept.tables.extend(hooks_of(module))
        kept.add_attribute(module, "__class__")
        kept.add_attribute(type(module), "forward")
        kept.add_attribute(type(module), "__call__")
        return types.MethodType(type(module).forward, module)

    def finds(self, function: Callable[..., Any]) -> bool:
        """Whether code finds only functions of PyTorch or of this package by the names that a function reads.

        If so, the version is for calls in which it finds the same: a program can put others in their place.
        """
        if not _is_own(function):
            return False
        code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        if code is None or names["__name__"] not in _LOOKED_INTO:
            return True
        read = [names.get(name) for name in code.co_names]
        owners = [names, *(vars(v) for v in read if v is torch or v is nn.functional)]
        for holder in owners:
            for name in code.co_names:
                found = holder.get(name)
                if isinstance(found, _FUNCTIONS) and (id(holder), name) not in self.of_sites.known:
                    self.of_sites.add(holder, name, found)
                    if not self.finds(found):
                        return False
        return True

    def finds_target(self, function: Callable[..., Any]) -> bool:
        """`finds` for a function that generated code finds by its qualified name, if it is one of PyTorch."""
        first, *path, name = qualified_name(function).split(".")
        owner: Any = torch if first == "torch" else None
        for step in path:
            owner = getattr(owner, step, None)
        if isinstance(owner, types.ModuleType):
            if vars(owner).get(name) is not function:
                return False
            self.of_sites.add(vars(owner), name, function)
        return self.finds(function)


_CALLS = 1
"""After so many calls the version is made: a single one does not pay for it."""


def made_later(direct: Sequence[Forward], chooser: Chooser) -> tuple[Forward, ...]:
    """The functions of `FUSED` until they are made.

    Args:
        direct: The functions of `DIRECT`, for each graph.
        chooser: Learns which modules the sites call.
    """
    calls, made = itertools.count(1), False

    def until(index: int) -> Forward:
        def run(module: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal made
            if next(calls) <= _CALLS:
                return direct[index](module, *args, **kwargs)
            with module.graph_lock:
                if not made:
                    module.add_version(FUSED, _made(module, direct, chooser))
                    made = True
            return module.run_version(FUSED, *args, **kwargs)

        return run

    return tuple(map(until, range(len(direct))))


def _made(module: Any, direct: Sequence[Forward], chooser: Chooser) -> list[Forward]:
    forwards = []
    for index, variant in enumerate(module.variants):
        sites: dict[fx.Node, Site] = {}
        # A graph that was edited runs as before until `recompile()`
        for node in variant.graph.nodes if module.has_code_of(index) else ():
            if not _runs_alone(node, module, chooser):
                break
            if (site := _site(node, module, chooser)) is not None:
                sites[node] = site
        if sites:
            graph = _with_sites(variant.graph, sites, partial(chooser.module, module))
            forward = module.forward_of(index, graph)
            forwards.append(called_directly(forward))
        else:
            forwards.append(direct[index])
    return forwards


def _with_sites(
    graph: fx.Graph, sites: Mapping[fx.Node, Site], module_at: Callable[[str], nn.Module]
) -> fx.Graph:
    """A copy of a graph in which each site is one call, and modules are not looked up as far as the last site."""
    within = {node for site in sites.values() for node in site.within}
    new, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    left = len(sites)
    for node in graph.nodes:
        if node in sites:
            site, left = sites[node], left - 1
            copies[node] = new.call_function(site.function, (copies[site.x],))
        elif node in within:
            continue
        elif node.op == "call_module" and left:
            called: Any = partial(module_at(str(node.target)))
            called.__name__, called.__module__ = "called", __name__
            given = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = new.call_function(called, *given)
        else:
            copies[node] = new.node_copy(node, copies.__getitem__)
    new.set_codegen(code_generator(graph))
    return new


def _runs_alone(node: fx.Node, root: nn.Module, chooser: Chooser) -> bool:
    """Whether a node runs only code of PyTorch and of this package."""
    if node.op == "call_module" or takes_parameters(node):
        return chooser.runs_alone(root.get_submodule(called_path(node)))
    return node.op != "call_function" or _is_own(node.target)


_LOOKED_INTO = nn.functional.__name__, nn.modules.activation.__name__
_FUNCTIONS = types.FunctionType, types.BuiltinFunctionType


def _is_own(function: Any) -> bool:
    """Whether a function is one of PyTorch, of this package, or of C. Its name can be that of one that it wraps."""
    names = getattr(function, "__globals__", None)
    if names is None:
        return isinstance(function, _OF_C) or type(function).__module__.startswith("torch.")
    return str(names.get("__name__")).partition(".")[0] in ("torch", "freegrad_fx")


_OF_C = types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, type


def _is_own_module(module: nn.Module) -> bool:
    kind = type(module)
    own = kind.__module__.startswith(("torch.nn.", "freegrad_fx."))
    return own and not issubclass(kind, fx.GraphModule) and _is_own(kind.forward)


class Site(NamedTuple):
    """A site that can be one call.

    Attributes:
        function: What is called.
        x: Its argument.
        within: The nodes that are no longer needed.
    """

    function: Callable[[Tensor], Any]
    x: fx.Node
    within: tuple[fx.Node, ...]


def _site(last: fx.Node, root: nn.Module, chooser: Chooser) -> Site | None:
    """The site that ends at a node; None if it cannot be one call, or none ends there."""
    if last.target is not decoupled or len(last.args) != 2:
        return None
    y, x = last.args
    before = last.prev
    within = (before,) if before.target is stop_gradient else (before.prev, before)
    stop, inputs = within[0], set(last.all_input_nodes)
    follows = y is before and stop.target is stop_gradient and stop.args == (x,) and not stop.kwargs
    users = [*within[1:], last]
    if not (follows and inputs == {x, y} and all(map(_reads_alone, users, within))):
        return None
    operation: Operation | None = Operation()
    if before is not stop:
        operation = _operation(before, stop, root)
    if operation is None:
        return None
    called = operation.function
    if isinstance(called, nn.Module):
        chooser.module(root, str(before.target))
        operation.function = chooser.forward(called)
        found = chooser.finds(type(called).forward)
    elif before.op == "call_method":
        chooser.of_sites.add_attribute(Tensor, str(before.target))
        found = _is_own(called)
    else:
        found = called is None or chooser.finds_target(called)
    if not found:
        return None
    function = site_function(operation, last.kwargs)
    if function is None:
        return None
    return Site(function, x, within)  # type: ignore[arg-type]


def _reads_alone(user: fx.Node, node: fx.Node) -> bool:
    return set(node.users) == {user}


def _operation(node: fx.Node, x: fx.Node, root: nn.Module) -> Operation | None:
    """The operation of a node that computes each entry from the entry of `x` at the same place; None for others."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    spelling = recognise(node, module, wanted=OPS)
    if spelling is None or spelling.inplace or spelling.writes_out:
        return None
    op = spelling.op
    if not op.elementwise or op.may_return_x or op.operands != ("x",):
        return None
    values = [*node.args, *node.kwargs.values()]
    others = [v for v in values if v is not x]
    if argument(node, spelling.key) is not x or len(others) != len(values) - 1:
        return None
    if not all(type(v) in _PLAIN for v in others):
        return None
    function: Any = node.target
    if module is not None:
        if type(module) not in op.modules or parameters_of(module) or buffers_of(module):
            return None
        function = module
    elif node.op == "call_method":
        function = getattr(Tensor, function)
    place = values.index(x)
    return Operation(
        function, (*values[:place], None, *values[place + 1 :]), place, (*node.kwargs,)
    )


_PLAIN = (int, float, bool, str, type(None), torch.dtype)
