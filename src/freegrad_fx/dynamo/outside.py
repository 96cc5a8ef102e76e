"""The sites of a compiled program that run in Python, where Dynamo could not capture them.

Their calls are intercepted as in a `use` block, with the names, call indices and parameters of the program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any, Protocol, Self

from torch import Tensor, nn

from .._torch.dispatch import function_transforms_active
from .._torch.dynamo import is_tracing
from ..context import Block, explicit_rules_act
from ..eager.classes import calls_in_python
from ..eager.interception import enter, leave, resuming
from ..eager.rules import Decisions, replaced_forward
from ..eager.running import running_modules
from ..eager.sites import EagerSites, Place, decoupled_parameter
from ..modules import Activation
from ..ops.checks import warn_if_native
from ..plan import Decision
from ..plan.decide import decide
from ..sites.owners import already
from ..sites.remarks import Opaque
from ..sites.site import Located
from ..table import RuleTable
from ..vocabulary.op import Spelling
from . import frames
from .findings import Findings
from .frames import Setting
from .pieces import Decoupled, version_of
from .programs import Calls, Program

__all__ = ["InPython", "Outside"]


class Call(Protocol):
    """What is needed of a call of a compiled program that runs."""

    calls: Calls
    decoupled: Decoupled
    python: bool
    root: nn.Module | None

    def setting(self) -> Setting:
        """The place of the program that is running."""

    def uses_outside(self, program: Program, parameter: str) -> None:
        """Note a parameter with a rule that is used outside of the graphs."""

    def missed(self, parameter: Tensor) -> None:
        """Note a parameter that is used where no rule can act."""

    def unwatched(self, call: Callable[[], Any]) -> Any:
        """Call something that has been looked at."""


class Owner(Protocol):
    """What is needed of the backend."""

    table: RuleTable
    findings: Findings

    @property
    def session(self) -> Call | None:
        """The innermost call that runs in this thread."""

    def program_of(self, root: nn.Module | None) -> Program:
        """The program of a model."""


@dataclass(frozen=True)
class Here:
    """Where a call of a program was, when a thread continues it after its end.

    Attributes:
        setting: The place of the program.
        calls: The sites that have run, counted.
        decoupled: The tensors that take the place of parameters.
    """

    setting: Setting
    calls: Calls
    decoupled: Decoupled = field(default_factory=dict)


class Outside(EagerSites):
    """The sites that the calls of compiled programs run in Python.

    Args:
        backend: The backend that compiles the programs.
    """

    def __init__(self, backend: Owner) -> None:
        super().__init__(backend.table)
        self._backend = backend
        self._resumed: dict[int, Here] = {}  # by thread
        self._has_classes = any(entry.sites.by_class for entry in backend.table.entries)

    @property
    def _call(self) -> Call:
        call = self._backend.session
        assert call is not None
        return call

    @property
    def _here(self) -> Here | None:
        return self._resumed.get(get_ident())

    @property
    def _calls(self) -> Calls:
        return self._call.calls if self._here is None else self._here.calls

    @property
    def _decoupled(self) -> Decoupled:
        return self._call.decoupled if self._here is None else self._here.decoupled

    def note_call(self) -> None:
        """Note that a function of PyTorch was called."""
        if self._here is None:
            self._call.python = True

    # --- places ---

    def _setting(self) -> Setting:
        here = self._here
        if here is None:
            return self._call.setting()
        root, modules = here.setting.root, here.setting.modules
        return Setting(root, (*modules, *frames.setting(root, None).modules))

    def place(self, *, in_functions: bool = False) -> Place | None:
        """The place of the call that runs now; None where no call is a site."""
        if is_tracing() or running_modules(2, in_functions=in_functions) is None:
            return None
        if frames.compiled_otherwise() is not None:
            return None
        setting = self._setting()
        program = self._backend.program_of(setting.top())
        owner = program.owner(setting.modules)
        return Place(setting.modules[::-1], owner, program.path(owner), program)

    def traced(self) -> None:
        """Look at the code that Dynamo traces: another backend can compile it."""
        function = frames.compiled_otherwise()
        if function is not None and self._here is None:
            module = frames.compiled_module(function)
            setting = self._call.setting()
            program = self._backend.program_of(setting.top())
            self._backend.findings.compiled_otherwise(program, function, module)

    def here(self) -> Here:
        """Where the call is now."""
        return Here(self._setting(), Counter(self._calls))

    @contextmanager
    def resumed(self, here: Here) -> Iterator[None]:
        """A context in which this thread continues in a place where the call was before."""
        thread = get_ident()
        before = self._here
        self._resumed[thread] = Here(here.setting, Counter(here.calls))
        try:
            yield
        finally:
            del self._resumed[thread]
            if before is not None:
                self._resumed[thread] = before

    # --- sites ---

    def count(self, place: Place, op: str) -> int:
        """Count a site, together with those of the graphs."""
        calls = self._calls
        key = place.program, place.path, op
        calls[key] += 1
        return calls[key] - 1

    def decisions(self, place: Place) -> dict[tuple[Any, ...], Decisions]:
        """The decisions of the program for calls in Python."""
        known: dict[tuple[Any, ...], Decisions] = place.program.outside
        return known

    def decided(self, place: Place, located: Located, table: RuleTable) -> Decision:
        """Decide a site that is not known yet, and report it."""
        decision = decide(located, table)
        self._backend.findings.outside(place.program, located, decision)
        return decision

    def operation(
        self,
        spelling: Spelling,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        passed: tuple[int, ...] | None = None,
    ) -> Decisions | None:
        """The decisions for the operation that is called now. In a `native` block they have no rules."""
        return _in_force(super().operation(spelling, function, args, kwargs, passed))

    def note_parts(self, decisions: Decisions, whole: str) -> None:
        """Note that a call is a part of an operation: the report lists it as it was decided by itself."""

    def module_call(self, module: nn.Module, inplace: bool) -> Decisions | None:
        """The decisions for the call of a module whose class the table selects, without rules in a `native` block."""
        return _in_force(super().module_call(module, inplace))

    def takes(self, place: Place) -> bool:
        """Whether a call at a place is a site."""
        return True

    def obstacle(self, place: Place) -> str:
        """The reason why no rule can act at a place: an `Activation` has its own."""
        innermost = place.modules[0] if place.modules else None
        if isinstance(innermost, Activation) and innermost.rules:
            return already(innermost.rules[0].name)
        return ""

    def note_opaque(self, place: Place, opaque: Opaque) -> None:
        """Note a call inside of which PyTorch computes activations."""
        self._backend.findings.opaque(place.program, opaque)

    def run(self, call: Callable[[], Any]) -> Any:
        """Run a call that has been looked at."""
        return call() if self._here is not None else self._call.unwatched(call)

    # --- parameters ---

    def parameter(self, parameter: Tensor) -> Tensor | None:
        """The tensor that takes the place of a parameter. Inside of an `autograd.Function`, no rule can act."""
        inside = running_modules() is None and frames.compiled_otherwise() is None
        if inside and parameter.requires_grad and self._here is None and not is_tracing():
            self._call.missed(parameter)
        return None if inside else super().parameter(parameter)

    def names(self, parameter: Tensor, place: Place) -> tuple[str, ...] | None:
        """The names of a parameter in the program; None if it is no part of it."""
        return place.program.names(parameter) or None

    def holders(self, parameter: Tensor, names: tuple[str, ...], place: Place) -> list[nn.Module]:
        """The modules that hold a parameter."""
        found = map(place.program.holder, names)
        return [module for module in found if module is not None]

    def in_place_of(
        self, parameter: Tensor, decision: Decision, acts: bool, place: Place
    ) -> Tensor:
        """The tensor that takes the place of a parameter, in the graphs of this call too."""
        if not explicit_rules_act():
            forward = decision.forward
            if forward is None:
                return parameter
            warn_if_native(parameter, decision.site.name)
            return self.run(lambda: replaced_forward(forward, parameter))  # type: ignore[no-any-return]
        if self._here is None and acts:
            self._call.uses_outside(place.program, decision.site.name)
        known = {} if function_transforms_active() else self._decoupled
        key, version = (id(parameter), acts), version_of(parameter)
        if key not in known or known[key][1] != version:
            tensor = self.run(lambda: decoupled_parameter(parameter, decision, acts))
            known[key] = parameter, version, tensor
        return known[key][2]

    def drop(self, parameter: Tensor) -> None:
        """Drop the tensor that takes the place of a parameter."""
        for acts in (True, False):
            self._decoupled.pop((id(parameter), acts), None)

    def classes(self) -> AbstractContextManager[None]:
        """A context in which the calls of the module classes that the table selects are sites."""
        if not self._has_classes:
            return nullcontext()
        here = self._here
        root = self._call.root if here is None else here.setting.root
        selected = self.table.types_in(root or nn.Module())
        modules = [kind for kind in selected if issubclass(kind, nn.Module)]
        return calls_in_python(modules, self.table.on_demand)


def _in_force(decisions: Decisions | None) -> Decisions | None:
    """Decisions, without their rules in a `native` block."""
    if decisions is None or explicit_rules_act():
        return decisions
    return {at: replace(decision, rules=()) for at, decision in decisions.items()}


class InPython(Block):
    """The block around a call of a compiled program, which acts on what Dynamo leaves to Python.

    Args:
        observed: The sites that run in Python.
    """

    intercepts = True
    ends_interception = True
    of_program = True

    def __init__(self, observed: Outside) -> None:
        super().__init__()
        self.observed = observed

    def __enter__(self) -> Self:
        super().__enter__()
        enter(self)
        return self

    def __exit__(self, *error: object) -> None:
        leave(self)
        super().__exit__(*error)

    def resume(self) -> Callable[[], AbstractContextManager[Any]]:
        """A function that returns a context in which code runs again as it runs now."""
        return resuming(self)
