"""The sites that a block sees, and what its table decides for them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._torch.dispatch import dispatch_modes, function_transforms_active
from .._torch.modules import is_replica
from .._torch.tensors import version
from ..backward.joint import recomputations, require_whole
from ..capture.captured import CapturedModule
from ..context import ambient_sites_were_compiled, table_in_force
from ..core.rule import Rule
from ..errors import RuleError
from ..graph.provenance import caller
from ..modules import Activation
from ..plan import Decision, Plan
from ..plan.decide import also, decide
from ..plan.groups import acts_together
from ..plan.noise import with_noise
from ..plan.parts import as_part
from ..plan.reach import require_reached
from ..sites.compounds import NORMS
from ..sites.remarks import Opaque
from ..sites.site import REPLACE, Located
from ..table import RuleTable
from ..vocabulary.op import Spelling
from .ambient import at_ambient_sites, follows_blocks, path_in
from .classes import calls_of_modules
from .functions import calls_of_functions, parameters_of_functions
from .modules import calls_of_compounds
from .names import ParameterNames
from .parameters import is_parameter, parameters_swapped_in, role_of
from .rules import Decisions
from .running import running_modules
from .sites import EagerSites, Place, decoupled_parameter, parameter_site
from .together import decoupled_together

__all__ = ["Here", "Observed"]

_FIRST = "<first>"
"""Takes the place of a path in the counts of what entries for the first operation have matched."""

_UNSEEN = (
    "its module ran in the block, and no function of PyTorch that was called from Python took it"
)
_TRANSFORMED = "its own table decides its sites, and its ambient sites follow the block; report(model) lists them"


@dataclass
class Here:
    """Where a thread is in a model.

    Attributes:
        modules: The modules whose calls are running, the innermost first.
        calls: How many sites have run in this call of the model, by path and op.
    """

    modules: tuple[nn.Module, ...] = ()
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)


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


class Observed(EagerSites):
    """The sites that were seen in a block, with their decisions.

    Args:
        table: The rule table.
        model: The model to which the table refers, or None.

    Attributes:
        model: The model to which the table refers, or None.
        ran: Whether a function of PyTorch was called in the block.
    """

    def __init__(self, table: RuleTable, model: nn.Module | None) -> None:
        super().__init__(table)
        self.model = model
        self.lines_tell_sites_apart = model is None
        self.names_tell_parameters_apart = model is not None
        self._known: dict[tuple[Any, ...], Decisions] = {}
        self._opaque: dict[Opaque, None] = {}
        self._wholes: dict[tuple[str, str, str, int, str], str] = {}
        self._thread = _Thread()
        self._ran: set[int] = set()  # the modules that were called
        self.ran = False
        self._follow = False  # whether models with sites of their own, which may be ambient, ran
        self._paths: dict[int, str] = {}
        self._names = ParameterNames(model)
        self._ambient: WeakKeyDictionary[nn.Module, Mapping[str, tuple[Rule, ...] | None]] = (
            WeakKeyDictionary()
        )
        if model is not None:
            for path, module in model.named_modules():
                self._paths[id(module)] = path

    def count(self, place: Place, op: str) -> int:
        """Count a site. Without a model there are no call indices."""
        if self.model is None:
            return 0
        self._thread.calls[place.path, op] += 1
        return self._thread.calls[place.path, op] - 1

    @contextmanager
    def classes(self) -> Iterator[None]:
        """A context in which the calls of the classes that the table selects are sites.

        In it, autograd.Functions take parameters with their rules, and their rules can learn.
        """
        with ExitStack() as stack:
            learns = any(
                rule.learnt for e in self.table for rule in e.rules or () if e.sites.by_class
            )
            if self.wants_parameters or learns:
                stack.enter_context(parameters_of_functions())
                stack.enter_context(parameters_swapped_in())
            if any(entry.sites.by_class for entry in self.table.entries):
                selected = self.table.types_in(self.model or nn.Module())
                modules = [kind for kind in selected if issubclass(kind, nn.Module)]
                functions = [kind for kind in selected if issubclass(kind, torch.autograd.Function)]
                stack.enter_context(calls_of_modules(modules, self, self.on_demand))
                stack.enter_context(calls_of_functions(functions, self))
            compounds = NORMS & self.on_demand
            if self.model is not None and any("gelu" in e.sites.ops for e in self.table):
                compounds |= {"gelu"}
            if compounds:
                of_model = None if self.model is None else [*self.model.modules()]
                stack.enter_context(calls_of_compounds(of_model, compounds, self))
            yield

    # --- decisions ---

    def decisions(self, place: Place) -> dict[tuple[Any, ...], Decisions]:
        """The decisions of this block."""
        return self._known

    def decided(self, place: Place, located: Located, table: RuleTable) -> Decision:
        """Decide a site that is not known yet, by the table as it is in force there."""
        return also(located, decide(located, table), table)

    def passed(self, place: Place) -> tuple[int, ...]:
        """The entries for the first operation that have matched one before, in this call of the model."""
        calls = self._thread.calls
        return tuple(i for i in self.table.ordered if calls[_FIRST, str(i)])

    def pass_by(self, place: Place, entry: int) -> None:
        """Note that an entry for the first operation has matched one."""
        self._thread.calls[_FIRST, str(entry)] += 1

    def takes(self, place: Place) -> bool:
        """Whether a call at a place is a site: that in an `Activation` is one if a table decides."""
        innermost = place.modules[0] if place.modules else None
        self._follow = self._follow or isinstance(innermost, Activation)
        return not isinstance(innermost, Activation) or (table_in_force() and not innermost.rules)

    def at_ambient_sites(self, model: CapturedModule) -> Mapping[str, tuple[Rule, ...] | None]:
        """The rules for the ambient sites of a transformed model, by their names in it; None where no entry decides."""
        known = self._ambient.get(model)
        if known is None:
            known = self._ambient[model] = self._decided_in(model)
        self.ran = True
        return known

    def _decided_in(self, model: CapturedModule) -> Mapping[str, tuple[Rule, ...] | None]:
        path = "" if self.model is None else path_in(self.model, model)
        found: dict[str, tuple[Rule, ...] | None] = {}
        for name, decision in at_ambient_sites(model, self.table, path or ""):
            if path is None or decision.entry is None:
                found[name] = None
                continue
            # Frozen parameters can be unfrozen while the block goes on
            entry = self.table.entries[decision.entry]
            found[name] = (entry.rules or ()) if decision.frozen else decision.rules
            self._known["ambient", decision.site.key] = {REPLACE: decision}
        return found

    def gives_rules_to(
        self,
        spelling: Spelling | None,
        function: type[Any] | None,
        given: Iterable[Any],
        modules: Sequence[nn.Module],
    ) -> bool:
        """Whether the table may give a rule to a call in another thread, where also replicas of modules run.

        Args:
            spelling: How the call calls an op; None if it calls none.
            function: The autograd.Function whose forward makes the call, or None.
            given: The arguments of the call.
            modules: The modules that are running.
        """
        replicas = any(map(is_replica, modules))
        if self.model is not None and not (replicas or any(id(m) in self._paths for m in modules)):
            return False
        captured = [m for m in modules if isinstance(m, CapturedModule)]
        if captured:
            return any(follows_blocks(model) for model in captured)
        for entry in self.table.entries:
            sites = entry.sites
            if spelling is not None and spelling.op.name in sites.ops:
                return entry.rules is not None
            of_parameters = entry.rules is not None and sites.wants_parameters
            if of_parameters and (replicas or any(map(is_parameter, given))):
                return True  # a replica has plain tensors for parameters
        kinds = tuple(self.table.types_in(self.model or nn.Module()))
        of_function = function is not None and issubclass(function, kinds)
        return of_function or any(isinstance(m, kinds) for m in modules)

    # --- parameters ---

    def names(self, parameter: Tensor, place: Place) -> tuple[str, ...] | None:
        """The names of a parameter in the model, or in the outermost running module that holds it."""
        names = self._names_of(parameter)
        if names is None and self.model is None:
            return _names_among(parameter, place.modules)
        return names

    def _names_of(self, parameter: Tensor) -> tuple[str, ...] | None:
        """The names of a parameter of the model, or of that whose role a tensor takes; None for others."""
        role = role_of(parameter)
        if role is None:
            return self._names.of(parameter)
        path = self._paths.get(id(role.holder))
        name = role.name if not path else f"{path}.{role.name}"
        return None if path is None else self._names.tied.get(name)

    def holders(self, parameter: Tensor, names: tuple[str, ...], place: Place) -> list[nn.Module]:
        """The modules that hold a parameter."""
        if self.model is None:
            return [m for m in place.modules if any(p is parameter for p in m.parameters())][:1]
        return self._holders(names)

    def _holders(self, names: tuple[str, ...]) -> list[nn.Module]:
        assert self.model is not None
        return [self.model.get_submodule(name.rpartition(".")[0]) for name in names]

    def in_place_of(
        self, parameter: Tensor, decision: Decision, acts: bool, place: Place
    ) -> Tensor:
        """The tensor that takes the place of a parameter: the same one while the parameter does not change."""
        together = acts and acts_together(decision.rules)
        if function_transforms_active() and not together:
            return decoupled_parameter(parameter, decision, acts)
        state = self._state_of(parameter, decision, acts)
        # What a tensor that is swapped in was decoupled into must not outlive the swap
        role = role_of(parameter)
        kept, key = (self._thread.parameters, parameter) if role is None else (role.kept, self)
        known = kept.get(id(key))
        if known is None or known.state != state:
            if together:
                return self._in_place_of_all(parameter, decision, place)
            tensor = decoupled_parameter(parameter, decision, acts)
            known = kept[id(key)] = _Decoupled(state, tensor)
        return known.tensor

    def _state_of(self, parameter: Tensor, decision: Decision, acts: bool) -> tuple[Any, ...]:
        """What changes if another tensor has to take the place of a parameter."""
        state: tuple[Any, ...] = (version(parameter), parameter.data_ptr(), acts, dispatch_modes())
        # a write through `.data` changes no version
        return state if decision.forward is None else (*state, self._thread.call)

    def _in_place_of_all(self, parameter: Tensor, decision: Decision, place: Place) -> Tensor:
        """The tensor that takes the place of a parameter, which is made with those of all parameters of its entry."""
        if self.model is None or role_of(parameter) is not None:
            raise RuleError(
                f"{', '.join(map(repr, decision.rules))} acts on several parameters together, but "
                f"{decision.site.name!r} is swapped in by torch.func.functional_call in a use() block. Transform the "
                f"model with the table: transform(model, rules)."
            )
        if recomputations() and all(r.module is not self.model for r in running_modules(1) or ()):
            require_whole(-1)  # the recomputation is that of a part
        all_of_model = [(p, self._decision_for(p, place)) for p in self.model.parameters()]
        chosen = [
            (p, d)
            for p, d in all_of_model
            if d is not None and d.entry == decision.entry and d.action == "rewrite"
        ]
        tensors = decoupled_together([p for p, _ in chosen], [d for _, d in chosen])
        for (other, its), tensor in zip(chosen, tensors, strict=True):
            state = self._state_of(other, its, True)
            self._thread.parameters[id(other)] = _Decoupled(state, tensor)
        return self._thread.parameters[id(parameter)].tensor

    def drop(self, parameter: Tensor) -> None:
        """Drop the tensor that takes the place of a parameter."""
        self._thread.parameters.pop(id(parameter), None)

    # --- the place ---

    def _modules(self, in_functions: bool = False) -> tuple[nn.Module, ...] | None:
        """The modules whose calls are running, the innermost first; None where no call is a site."""
        running = running_modules(2, in_functions=in_functions)
        if running is None:
            return None
        outermost = [r.frame for r in running if self.model is None or r.module is self.model]
        if outermost and outermost[-1] is not self._thread.call_of_model:
            self._thread.call_of_model = outermost[-1]
            self._thread.call += 1
            self._thread.calls.clear()
            self._names.new_call()
        modules = (*(r.module for r in running), *self._thread.around)
        if self.wants_parameters or self.table.reaches:
            self._ran.update(map(id, modules))
        return modules

    def place(self, *, in_functions: bool = False) -> Place | None:
        """The place of the call that runs now; None outside of the model, and where no call is a site."""
        modules = self._modules(in_functions)
        if modules is None:
            return None
        if self.model is None:
            return Place(modules, modules[0] if modules else None)
        owner = next((m for m in modules if id(m) in self._paths), None)
        return None if owner is None else Place(modules, owner, self._paths[id(owner)])

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

    def require_reached(self) -> None:
        """Raise `PlanError` if the table does not reach what it has to reach in the model."""
        if self.table.reaches and self.model is not None:
            ran = {path for identity, path in self._paths.items() if identity in self._ran}
            require_reached(self.plan(), self.model, ran)

    def without_a_site(self) -> Iterator[str]:
        """That the rule of the block, which has no table, got no site at all, as a text."""
        if self._follow or ambient_sites_were_compiled() or any(self.plan().meant):
            return
        seen = ", ".join(sorted({d.site.op for d in self.plan().decisions})) or "none"
        rules = " and ".join(dict.fromkeys(repr(r) for e in self.table for r in e.rules or ()))
        yield (
            f"{rules} got no site in the use() block; the ops that ran: {seen}. A single rule is for activations, "
            f"or with scope='params' for parameters; a table names others: use({{'linear': rule}}, model=model)"
        )

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

    def note_call(self) -> None:
        """Note that a function of PyTorch was called, and in which modules if the table has to reach some."""
        self.ran = True
        if self.table.reaches:
            self._modules()

    def note_opaque(self, place: Place, opaque: Opaque) -> None:
        """Note a call inside of which PyTorch computes activations."""
        self._opaque[opaque] = None

    def transformed(self, model: nn.Module) -> None:
        """Note a call of a model that was transformed."""
        self._follow = True
        place = self.place()
        if place is not None:
            name = type(model).__name__
            self._opaque[Opaque(place.path, name, _TRANSFORMED, caller())] = None

    def plan(self) -> Plan:
        """The sites that were seen, with their decisions."""
        name = "The code in the block" if self.model is None else type(self.model).__name__
        decisions = sorted(self._decided(), key=lambda d: d.site.kind == "parameter")
        plan = Plan(
            model=name,
            decisions=tuple(dict.fromkeys((*decisions, *self._unseen()))),
            table=self.table,
            opaque=tuple(self._opaque),
        )
        return with_noise(plan, self.model)

    def _decided(self) -> list[Decision]:
        made = (decision for found in self._known.values() for decision in found.values())
        return [
            as_part(d, self._wholes[d.site.key]) if d.site.key in self._wholes and d.acts else d
            for d in made
        ]

    def note_parts(self, decisions: Decisions, whole: str) -> None:
        """Note that a call is a part of an operation whose rule has replaced the backward."""
        self._wholes.update((decision.site.key, whole) for decision in decisions.values())

    def _unseen(self) -> Iterator[Decision]:
        """The parameters with a rule that no call in the block took, though their modules ran."""
        if self.model is None or not self._ran:
            return
        seen = {d.site.names for d in self._decided()}
        parameters = dict(self.model.named_parameters())
        for names in self._names:
            if names not in seen and any(map(self._may_have_taken, names)):
                holders = self._holders(names)
                place = parameter_site(parameters[names[0]], names, holders)
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


def _names_among(parameter: Tensor, modules: tuple[nn.Module, ...]) -> tuple[str, ...]:
    """The names of a parameter in the outermost running module that holds it."""
    for module in reversed(modules):
        named = module.named_parameters(remove_duplicate=False)
        if found := tuple(name for name, other in named if other is parameter):
            return found
    return ("a parameter",)
