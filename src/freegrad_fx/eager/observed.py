"""The sites that a block sees, and what its table decides for them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .._torch.dispatch import dispatch_modes, function_transforms_active, is_transformed
from .._torch.functions import Function
from .._torch.tensors import version
from ..graph.provenance import caller
from ..modules import Activation
from ..plan import Decision, Plan
from ..plan.decide import also, decide
from ..sites.operations import spelled_function
from ..sites.owners import qualified, short_name
from ..sites.remarks import Opaque
from ..sites.site import Located, LocatedParameter, Site
from ..table import RuleTable
from ..vocabulary.activations import OPS
from ..vocabulary.op import Op, Spelling
from .classes import calls_of_modules
from .functions import calls_of_functions, parameters_of_functions
from .opaque import opaque_call
from .parameters import parameters_swapped_in, role_of
from .rules import parameter_by, replaced_forward, rules_act
from .running import is_compiled_graph, running_modules

__all__ = ["Here", "Observed"]

_UNSEEN = (
    "its module ran in the block, and no function of PyTorch that was called from Python took it"
)
_TRANSFORMED = "its own table decides its sites, and its ambient sites follow the block; report(model) lists them"
_OUT = "it writes its result into an out= tensor, which autograd does not support"


@dataclass
class Here:
    """Where a thread is in a model.

    Attributes:
        modules: The modules whose calls are running, the innermost first.
        calls: How many sites have run in this call of the model, by path and op.
    """

    modules: tuple[nn.Module, ...] = ()
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Place:
    """Where a call is: the modules that are running, the innermost first, and the owner of the site with its path."""

    modules: tuple[nn.Module, ...]
    owner: nn.Module | None
    path: str = ""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.around: tuple[nn.Module, ...] = ()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.call_of_model: FrameType | None = None
        self.call = 0  # the number of the call
        self.parameters: dict[int, _Decoupled] = {}


@dataclass
class _Decoupled:
    """The tensor that takes the place of a parameter, while the parameter is in a certain state."""

    state: tuple[Any, ...]
    tensor: Tensor


class Observed:
    """The sites that were seen in a block, with their decisions.

    Args:
        table: The rule table.
        model: The model to which the table refers, or None.
    """

    def __init__(self, table: RuleTable, model: nn.Module | None) -> None:
        self.table = table
        self.wants_parameters = table.wants_parameters
        self.model = model
        self._decisions: dict[tuple[Any, ...], Decision] = {}
        self._opaque: dict[Opaque, None] = {}
        self._thread = _Thread()
        self._ran: set[int] = set()  # the modules that were called
        self.ran = False  # whether a function of PyTorch was called in the block
        self._paths: dict[int, str] = {}
        self._names: dict[int, tuple[str, ...]] = {}
        if model is not None:
            for path, module in model.named_modules():
                self._paths[id(module)] = path
            for name, parameter in model.named_parameters(remove_duplicate=False):
                self._names[id(parameter)] = (*self._names.get(id(parameter), ()), name)
        self._tied = {name: names for names in self._names.values() for name in names}

    # --- operations ---

    def operation(self, spelling: Spelling, function: Callable[..., Any]) -> Decision | None:
        """The decision for the operation that is called now; None if it is no site."""
        self.ran = True
        place = self._place()
        if place is None or (place.modules and isinstance(place.modules[0], Activation)):
            return None  # rules act around the call of an Activation
        called = None
        if place.owner is not None and place.owner is place.modules[0]:
            kind = type_before_parametrizations(place.owner)
            called = kind if kind in spelling.op.modules else None
        inplace = spelling.inplace
        spelled = _module(called, inplace) if called else spelled_function(function, inplace)
        obstacle = _OUT if spelling.writes_out else ""
        key = (function, inplace)
        return self._decision(key, place, spelling.op.name, spelled, obstacle, spelling.op, called)

    def module_call(self, module: nn.Module, inplace: bool) -> Decision | None:
        """The decision for the call of a module whose class the table selects; None if it is no site."""
        place = self._place()
        if place is None or place.owner is None or place.modules[0] is not module:
            return None
        kind = type_before_parametrizations(module)
        spelled = _module(kind, inplace)
        return self._decision((kind, inplace), place, kind.__name__, spelled, called=kind)

    def function_call(self, function: type[Any]) -> Decision | None:
        """The decision for the `apply` of an autograd.Function that runs now; None if it is no site."""
        place = self._place()
        if place is None:
            return None
        name = function.__name__
        return self._decision((function,), place, name, f"{name}.apply", called=function)

    def _decision(
        self,
        written: tuple[Any, ...],
        place: _Place,
        op: str,
        spelled: str,
        obstacle: str = "",
        line: Op | None = None,
        called: type[Any] | None = None,
    ) -> Decision:
        """The decision for a call, which is known if the same was `written` at the same place before."""
        call = self._count(place.path, op)
        source = caller() if self.model is None else ""
        key = (op, place.path, call, *written, type(place.owner), source)
        found = self._decisions.get(key)
        if found is not None:
            return found
        owners = () if place.owner is None else (type_before_parametrizations(place.owner),)
        site = Site(
            kind="operation",
            op=op,
            path=place.path,
            call=call,
            spelling=spelled,
            source=source or caller(),
            type=qualified(owners[0]) if owners else "",
        )
        return self._note(key, Located(site, owners, obstacle, line, called))

    def _count(self, path: str, op: str) -> int:
        """The number of sites that have run before at this place, in this call of the model."""
        if self.model is None:
            return 0
        self._thread.calls[path, op] += 1
        return self._thread.calls[path, op] - 1

    @contextmanager
    def classes(self) -> Iterator[None]:
        """A context in which the calls of the classes that the table selects are sites.

        In it, autograd.Functions take parameters with their rules.
        """
        with ExitStack() as stack:
            if self.wants_parameters:
                stack.enter_context(parameters_of_functions())
                stack.enter_context(parameters_swapped_in())
            if any(entry.sites.by_class for entry in self.table.entries):
                selected = self.table.types_in(self.model or nn.Module())
                modules = [kind for kind in selected if issubclass(kind, nn.Module)]
                functions = [kind for kind in selected if issubclass(kind, torch.autograd.Function)]
                spelled = {kind for op in OPS.values() for kind in op.modules}
                stack.enter_context(calls_of_modules(modules, spelled, self))
                stack.enter_context(calls_of_functions(functions, self))
            yield

    def _note(self, key: tuple[Any, ...], place: Located) -> Decision:
        found = self._decisions[key] = also(place, decide(place, self.table), self.table)
        return found

    # --- parameters ---

    def parameter(self, parameter: Tensor) -> Tensor | None:
        """The tensor that takes the place of a parameter in the call that runs now; None if no entry decides it."""
        decision = self.parameter_decision(parameter)
        if decision is None or decision.entry is None:
            return None
        if decision.action != "rewrite" or not (decision.forward or parameter.requires_grad):
            return parameter
        acts = rules_act()
        if decision.forward is None and not acts:
            return parameter
        role = role_of(parameter)
        if parameter.is_inference() or (is_transformed(parameter) and role is None):
            return parameter
        if function_transforms_active():
            return _decoupled(parameter, decision, acts)
        state: tuple[Any, ...] = (version(parameter), parameter.data_ptr(), acts, dispatch_modes())
        if decision.forward is not None:
            state = (*state, self._thread.call)  # a write through `.data` changes no version
        # What a tensor that is swapped in was decoupled into must not outlive the swap
        kept, key = (self._thread.parameters, parameter) if role is None else (role.kept, self)
        known = kept.get(id(key))
        if known is None or known.state != state:
            known = kept[id(key)] = _Decoupled(state, _decoupled(parameter, decision, acts))
        return known.tensor

    def parameter_decision(self, parameter: Tensor) -> Decision | None:
        """The decision for a parameter that the call that runs now takes; None if it is no site."""
        place = self._place()
        if place is None or place.owner is None:
            return None  # an optimizer, for example
        names = self._names_of(parameter)
        if names is None:
            if self.model is not None:
                return None
            names = _names_among(parameter, place.modules)
        identity = id(parameter) if role_of(parameter) is None else names
        key = ("parameter", identity, parameter.requires_grad)
        decision = self._decisions.get(key)
        if decision is None:
            decision = self._note(key, self._parameter_site(parameter, names, place.modules))
        return decision

    def _names_of(self, parameter: Tensor) -> tuple[str, ...] | None:
        """The names of a parameter of the model, or of that whose role a tensor takes; None for others."""
        role = role_of(parameter)
        if role is None:
            return self._names.get(id(parameter))
        path = self._paths.get(id(role.holder))
        name = role.name if not path else f"{path}.{role.name}"
        return None if path is None else self._tied.get(name)

    def _parameter_site(
        self, parameter: Tensor, names: tuple[str, ...], modules: tuple[nn.Module, ...]
    ) -> Located:
        path, _, name = names[0].rpartition(".")
        if self.model is not None:
            holders = [self.model.get_submodule(n.rpartition(".")[0]) for n in names]
        else:
            holders = [m for m in modules if any(p is parameter for p in m.parameters())][:1]
        owners = tuple(map(type_before_parametrizations, holders))
        site = Site(
            kind="parameter",
            op="parameter",
            path=path,
            call=0,
            spelling=f"{short_name(owners[0])}.{name}" if owners else name,
            type=qualified(owners[0]) if owners else "",
            names=names,
        )
        return LocatedParameter(site, owners, tensor=parameter, reads=())

    # --- the place ---

    def _modules(self) -> tuple[nn.Module, ...] | None:
        """The modules whose calls are running, the innermost first; None in a graph that Dynamo captured.

        Dynamo has asked about the calls of such a graph when it captured it.
        """
        running = tuple(running_modules(2))
        if any(is_compiled_graph(r.module) for r in running):
            return None
        outermost = [r.frame for r in running if self.model is None or r.module is self.model]
        if outermost and outermost[-1] is not self._thread.call_of_model:
            self._thread.call_of_model = outermost[-1]
            self._thread.call += 1
            self._thread.calls.clear()
        modules = (*(r.module for r in running), *self._thread.around)
        if self.wants_parameters:
            self._ran.update(map(id, modules))
        return modules

    def _place(self) -> _Place | None:
        """The place of the call that runs now; None outside of the model, and in a graph that Dynamo captured."""
        modules = self._modules()
        if modules is None:
            return None
        if self.model is None:
            return _Place(modules, modules[0] if modules else None)
        owner = next((m for m in modules if id(m) in self._paths), None)
        return None if owner is None else _Place(modules, owner, self._paths[id(owner)])

    def here(self) -> Here:
        """Where the thread is now."""
        return Here(self._modules() or (), Counter(self._thread.calls))

    @contextmanager
    def resumed(self, here: Here) -> Iterator[None]:
        """A context in which the thread continues in a place where a thread was before."""
        thread = self._thread
        before = thread.around, thread.calls
        thread.around, thread.calls = here.modules, Counter(here.calls)
        try:
            yield
        finally:
            thread.around, thread.calls = before

    def end_call(self) -> None:
        """Forget the call of the model and its tensors, which have ended with the block."""
        self._thread.call_of_model = None
        self._thread.parameters.clear()

    def unmatched(self) -> Iterator[str]:
        """The entries of the table that matched no site, and the sites where no rule can act, as texts."""
        plan = self.plan()
        for decision in plan.with_action("skip"):
            yield f"site {decision.site.name} keeps its backward: {decision.reason}"
        seen = ", ".join(sorted({d.site.op for d in plan.decisions})) or "none"
        for entry in plan.unmatched:
            yield (
                f"the entry {entry.selector!r} matched nothing that ran in the use() block; the ops that ran: {seen}. "
                f"report(block) lists what was seen"
            )

    # --- the report ---

    def opaque(self, function: Callable[..., Any]) -> None:
        """Note a call inside of which PyTorch computes activations."""
        self.ran = True
        reason = opaque_call(function)
        if not reason:
            return
        place = self._place()
        if place is None:
            return
        self._opaque[Opaque(place.path, spelled_function(function, False), reason, caller())] = None

    def inside(self, function: Function) -> None:
        """Note an autograd.Function whose forward computes an activation."""
        self.ran = True
        place = self._place()
        if place is not None:
            what = f"autograd.Function {function.__qualname__}"
            self._opaque[Opaque(place.path, what, "keeps its own backward", caller())] = None

    def transformed(self, model: nn.Module) -> None:
        """Note a call of a model that was transformed."""
        place = self._place()
        if place is not None:
            name = type(model).__name__
            self._opaque[Opaque(place.path, name, _TRANSFORMED, caller())] = None

    def plan(self) -> Plan:
        """The sites that were seen, with their decisions."""
        name = "The code in the block" if self.model is None else type(self.model).__name__
        decisions = sorted(self._decisions.values(), key=lambda d: d.site.kind == "parameter")
        return Plan(
            model=name,
            decisions=tuple(dict.fromkeys((*decisions, *self._unseen()))),
            table=self.table,
            opaque=tuple(self._opaque),
        )

    def _unseen(self) -> Iterator[Decision]:
        """The parameters with a rule that no call in the block took, though their modules ran."""
        if self.model is None or not self._ran:
            return
        seen = {d.site.names for d in self._decisions.values()}
        parameters = dict(self.model.named_parameters())
        for names in dict.fromkeys(self._names.values()):
            if names not in seen and any(map(self._may_have_taken, names)):
                place = self._parameter_site(parameters[names[0]], names, ())
                found = also(
                    place, decide(replace(place, obstacle=_UNSEEN), self.table), self.table
                )
                if found.action == "skip":
                    yield found

    def _may_have_taken(self, name: str) -> bool:
        """Whether the module that holds a parameter was called. What a script calls is not seen."""
        assert self.model is not None
        holder = self.model.get_submodule(name.rpartition(".")[0])
        return id(holder) in self._ran or isinstance(holder, torch.jit.ScriptModule)


def _module(kind: type[nn.Module], inplace: bool) -> str:
    return f"{short_name(kind)}({'inplace=True' if inplace else ''})"


def _names_among(parameter: Tensor, modules: tuple[nn.Module, ...]) -> tuple[str, ...]:
    """The names of a parameter in the outermost running module that holds it."""
    for module in reversed(modules):
        named = module.named_parameters(remove_duplicate=False)
        if found := tuple(name for name, other in named if other is parameter):
            return found
    return ("a parameter",)


def _decoupled(parameter: Tensor, decision: Decision, acts: bool) -> Tensor:
    value: Tensor = parameter.detach()
    if decision.forward is not None:
        value = replaced_forward(decision.forward, value)
    if not acts:
        return value
    return parameter_by(decision, value, parameter)
