"""Runs modules that compute an operation by several calls, such as the norms of language models, by their graphs.

While such a module runs, its first calls do not tell that they belong to a norm. Its forward is therefore traced alone,
once for a class, and rewritten as `transform` does it. The graph makes the same calls, with the module's own tensors.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from .._torch.dynamo import is_compiling, leave_to_python
from .._torch.replacing import all_replaced
from ..capture import capture
from ..context import intercepting_blocks
from ..errors import CaptureError
from ..graph.provenance import is_users
from ..plan import Decided, Decision
from ..plan.parts import is_part, wholes_of, without_parts
from ..rewrite import rewrite
from ..sites.compounds import NORMS
from ..sites.operations import find_sites
from ..sites.site import LocatedOperation
from .interception import unintercepted
from .rules import Decisions
from .running import looks_for_sites, one_site
from .surroundings import is_constant, is_known, values_read, without_decorators

__all__ = ["calls_of_compounds"]

_PARTS = ("rsqrt", "sqrt", "pow")
"""The ops of a norm at which its denominator can be stopped, if the norm is not found."""

_OF_NORMS = ({"mean"}, {"rsqrt", "sqrt", "pow"})
"""Names of functions, some of each set of which the code of a norm uses."""

_OF_GELUS = (({"tanh", "erf"}, 0.5), ({"sigmoid"}, 1.702))
"""Names of functions, some of which the code of a GELU uses, and a number in it."""

_MOST = 16
"""So many graphs are made for a class. It has more if its attributes change from call to call."""


class Decides(Protocol):
    """What is needed of what a block sees."""

    on_demand: frozenset[str]

    def calls(self, module: nn.Module, places: Sequence[LocatedOperation]) -> Decided | None:
        """The decisions for calls of the module that runs now; None if they are no sites."""

    def note_parts(self, decisions: Decisions, whole: str) -> None:
        """Note that a call is a part of an operation whose rule has replaced the backward."""

    def not_traced(self, module: nn.Module, ops: Collection[str], reason: str) -> None:
        """Note a module that may compute an operation by several calls, and could not be traced alone."""

    def run(self, call: Callable[[], Any]) -> Any:
        """Run a call that has been looked at."""


def calls_of_compounds(
    modules: Collection[nn.Module] | None, wanted: frozenset[str], decides: Decides
) -> AbstractContextManager[None]:
    """A context in which operations of several calls in modules of their own are sites of a block.

    Args:
        modules: The modules of the model; None if there is no model, and all classes are looked at.
        wanted: The ops that are looked for.
        decides: What the block sees and decides.
    """

    def around(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            called = _called_in_python if is_compiling() else _called
            return called(forward, decides, self, args, kwargs)

        setattr(run, _ORIGINAL, _original(forward))  # blocks can be nested
        return run

    kinds: Any = _all_classes(nn.Module) if modules is None else map(type, modules)
    found = (kind for kind in dict.fromkeys(kinds) if not wanted.isdisjoint(_may_compute(kind)))
    return all_replaced((kind, "forward", around) for kind in found)


_ORIGINAL = "_freegrad_fx_original"


def _original(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of the class, without the blocks in force."""
    found: Callable[..., Any] = getattr(forward, _ORIGINAL, forward)
    return found


def _all_classes(kind: type[Any]) -> Iterator[type[Any]]:
    for derived in kind.__subclasses__():
        yield derived
        yield from _all_classes(derived)


_known: weakref.WeakKeyDictionary[type[Any], frozenset[str]] = weakref.WeakKeyDictionary()


def _may_compute(kind: type[nn.Module]) -> frozenset[str]:
    """The ops that the code of a class may compute by several calls, by the functions and numbers that it uses."""
    known = _known.get(kind)
    if known is None:
        own = kind.__mro__[: kind.__mro__.index(nn.Module)]
        values = (without_decorators(value) for base in own for value in vars(base).values())
        functions = [value for value in values if isinstance(value, FunctionType)]
        forward = without_decorators(inspect.getattr_static(kind, "forward"))
        found: set[str] = set()
        if isinstance(forward, FunctionType) and is_users(forward.__code__):
            codes = [code for function in functions for code in _codes_in(function)]
            names = {name for code in codes for name in code.co_names}
            defaults = [n for function in functions for n in function.__defaults__ or ()]
            constants = [*defaults, *(n for code in codes for n in code.co_consts)]
            numbers = {n for n in constants if isinstance(n, float)}
            if not any(map(names.isdisjoint, _OF_NORMS)):
                found |= NORMS
            if any(not names.isdisjoint(some) and n in numbers for some, n in _OF_GELUS):
                found.add("gelu")
        known = _known[kind] = frozenset(found)
    return known


def _codes_in(function: FunctionType) -> Iterator[CodeType]:
    """The code of a function, and of the functions of users that it calls by a global name."""
    yield function.__code__
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if isinstance(called, FunctionType) and is_users(called.__code__):
            yield called.__code__


@leave_to_python
def _called_in_python(*given: Any) -> Any:
    return _called(*given)


def _called(
    forward: Callable[..., Any],
    decides: Decides,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if not looks_for_sites(decides):
        return forward(module, *args, **kwargs)
    traced = unintercepted(
        lambda: _traced(_original(forward), module, args, kwargs, decides.on_demand)
    )
    if traced is None or not traced.places:
        stops_parts = not decides.on_demand.isdisjoint(_PARTS)
        ops = set() if traced is None else traced.computes
        if traced is not None and not stops_parts:
            ops = ops | (NORMS & _may_compute(type(module)) & decides.on_demand)
        if traced is not None and ops:
            decides.not_traced(module, ops, traced.problem)
        return forward(module, *args, **kwargs)
    compounds = [place for place in traced.places if place.compound is not None]
    decided = decides.calls(module, compounds)
    if decided is None or all(decision.entry is None for _, decision in decided):
        return forward(module, *args, **kwargs)
    observing = [block.observed for block in intercepting_blocks()]
    for outer in observing[observing.index(decides) + 1 :]:
        outer.calls(module, compounds)  # a block also lists what another one decides
    if not any(decision.acts for _, decision in decided):
        return _original(forward)(module, *args, **kwargs)
    others = decides.calls(module, [place for place in traced.places if place.compound is None])
    wholes = wholes_of(decided)
    for place, decision in others or []:
        if is_part(place, decision, wholes):
            decides.note_parts({decision.site.at: decision}, wholes[place.node])
    decided = without_parts([*decided, *(others or [])])
    rewritten = traced.rewritten(decided)

    def whole() -> Any:
        with one_site():
            return rewritten(module, *args, **kwargs)

    return decides.run(whole)


def _others_than_default(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[str]:
    """The arguments of a call that the graph of the forward takes for their default, and that are something else."""
    positional, defaults = _arguments_of(forward)
    given = {**dict(zip(positional, args, strict=False)), **kwargs}
    return [
        name
        for name, value in given.items()
        if (name in defaults or name not in positional) and not _same(value, defaults.get(name))
    ]


def _same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, int | float | str) and value == default)


@functools.lru_cache(maxsize=256)
def _arguments_of(forward: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
    """The names of the arguments without the module itself, and the defaults."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    return names, {p.name: p.default for p in parameters if p.default is not p.empty}


# --- the graphs ---


@dataclass
class _Traced:
    """The graph of the forward of modules of a class.

    Attributes:
        graph: The graph.
        places: Its sites; none if it could not be traced.
        problem: Why it could not be traced.
        computes: The ops that a call of the module computes that could have been traced.
        known: The rewritten forwards, by what was decided for its sites.
    """

    graph: fx.Graph
    places: list[LocatedOperation]
    problem: str = ""
    computes: set[str] = field(default_factory=set)
    known: dict[tuple[Decision, ...], Callable[..., Any]] = field(default_factory=dict)

    def rewritten(self, decided: Decided) -> Callable[..., Any]:
        """The forward with rules: a function of the module and of the arguments."""
        key = tuple(decision for _, decision in decided)
        if key not in self.known:
            if len(self.known) > 1000:  # tables of a long program
                self.known.clear()
            self.known[key] = unintercepted(lambda: self._rewrite(decided))
        return self.known[key]

    def _rewrite(self, decided: Decided) -> Callable[..., Any]:
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.output(graph.graph_copy(self.graph, copies))
        own = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        operations = ((p, d) for p, d in decided if isinstance(p, LocatedOperation))
        moved: Decided = [(place.moved(copies), decision) for place, decision in operations]
        root = nn.Module()
        for name in own:
            root.register_buffer(
                name, torch.empty(0)
            )  # the tensors of the modules take their place
        rewrite(graph, root, moved)
        gm = fx.GraphModule(root, graph)
        function = type(gm).forward

        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return function(_Tensors(module, gm, own), *args, **kwargs)

        return run


class _Tensors:
    """The tensors that a graph reads: those of a module, and what its rules hold."""

    def __init__(self, module: nn.Module, held: nn.Module, own: Collection[str]) -> None:
        self._module, self._held, self._own = module, held, own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module if name in self._own else self._held, name)


_OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that every module has."""


def _problem(reason: str) -> _Traced:
    return _Traced(fx.Graph(), [], f"{reason}. transform with example_inputs, and compile, find it")


_graphs: dict[Any, _Traced | None] = {}


def _traced(
    forward: Callable[..., Any],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    wanted: frozenset[str],
) -> _Traced | None:
    """The graph of a call of the forward of a module; None if it computes no operation by several calls."""
    if "forward" in vars(module):
        return _problem("its forward is not that of its class")
    if any(True for _ in module.children()):
        return _problem("it has submodules; write the norm as a module of its own")
    state = {k: v for k, v in vars(module).items() if k not in _OF_MODULES}
    for name, value in state.items():
        if not is_constant(value):
            return _problem(f"its attribute {name!r} is a {type(value).__name__}")
    read = values_read(type(module), _original(forward))
    for name, value in read.items():
        if not is_known(value):
            return _problem(f"its code reads {name.split()[1]!r}, a {type(value).__name__}")
    tensors = [*module.named_parameters(), *module.named_buffers()]
    described = tuple((n, t.dtype, t.shape, t.device, t.requires_grad, type(t)) for n, t in tensors)
    key = type(module), forward, (*state.items(), *read.items()), described, wanted
    if key not in _graphs:
        if sum(other[:2] == key[:2] for other in _graphs) >= _MOST:
            return _problem("its attributes change from call to call")
        _graphs[key] = _trace(forward, module, wanted)
    found = _graphs[key]
    others = _others_than_default(forward, args, kwargs)
    if not others:
        return found
    problem = _problem(f"it is called with {', '.join(others)}, not the default")
    places = [] if found is None else found.places
    problem.computes |= {place.site.op for place in places if place.compound is not None}
    return problem


def _trace(
    forward: Callable[..., Any], module: nn.Module, wanted: frozenset[str]
) -> _Traced | None:
    kind = type(module)
    copied = copy.copy(module)
    # functional_call puts other tensors in the place of parameters, which are those of the norm all the same
    copied._parameters = {
        name: nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        if isinstance(p, Tensor) and not isinstance(p, nn.Parameter)
        else p
        for name, p in module._parameters.items()
    }
    # The class has another forward while it is in a block
    copied.__class__ = type(
        kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__}
    )
    try:
        with one_site():  # so that no block acts in the forward of another class that it calls
            found = capture(copied)
    except CaptureError as error:
        return _problem(str(error).partition("\n")[0].rpartition(": ")[2])
    if len(found.variants) != 1 or found.variants[0].flags or found.opaque or found.lost:
        return _problem(
            "it depends on its mode or on settings of PyTorch, or calls code that cannot be traced"
        )
    graph = found.variants[0].graph
    places = find_sites(graph, found.root, (), wanted)
    return _Traced(graph, places) if any(p.compound is not None for p in places) else None
