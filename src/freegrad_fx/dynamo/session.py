"""One call of a compiled program: counts the sites that run, and detects those that no rule can reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from .._torch import tree
from .._torch.dynamo import is_tracing
from ..context import explicit_rules_act
from ..eager.interception import unintercepted
from ..eager.sites import parameter_site
from ..graph.provenance import Origin, caller
from ..sites.site import Located
from ..table import Entry
from ..vocabulary.activations import OPS
from . import frames
from .findings import Findings
from .frames import Setting
from .outside import InPython
from .pieces import Decoupled, Piece
from .programs import Calls, Program, class_of
from .watch import Watch, activation_call, located, possible_activations

__all__ = ["Session"]


class Owner(Protocol):
    """What a session needs of the backend that it belongs to."""

    findings: Findings
    in_python: InPython

    @property
    def sessions(self) -> list[Session]:
        """The calls that run in this thread, the innermost last."""

    def program_of(self, root: nn.Module | None) -> Program:
        """The program of a model."""

    def entry_for(self, place: Located) -> Entry | None:
        """The table entry that gives a rule to a site, or to a place at it."""


class Session:
    """One call of a compiled function or model. The session starts when the object is created.

    Args:
        backend: The backend.
        function: The function that was compiled.
        frame: The frame that calls it.

    Attributes:
        name: The name of the model or the function.
        calls: The sites that have run, counted.
        pending: The sites in graphs that have been captured and have not run yet, counted.
        ran: How many captured graphs have run.
        error: The error of rewriting a graph, or None.
        root: The model; None for a function.
        decoupled: The tensors that take the place of parameters with rules.
        python: Whether functions of PyTorch were called in Python.
        one_call: Whether this is one call of a module, in which a rule acts once on the gradient of a parameter.
    """

    def __init__(self, backend: Owner, function: Callable[..., Any], frame: FrameType) -> None:
        self._backend = backend
        self.root = frames.compiled_module(function)
        self._frame: FrameType | None = frame
        self._activation: FrameType | None = None
        self._watch = Watch(self._seen)
        # The parameters that graphs have used, and whether their rules are in a graph
        self._parameters: dict[tuple[Program, str], bool] = {}
        self.decoupled: Decoupled = {}
        self.one_call = frames.calls_module(function)
        self.name = type(self.root).__name__
        if self.root is None:
            self.name = getattr(function, "__qualname__", "a function")
        self.calls: Calls = Counter()
        self.pending: Calls = Counter()
        self.ran = 0
        self.python = False
        self.error: Exception | None = None
        backend.sessions.append(self)
        try:
            backend.in_python.__enter__()
        except BaseException:
            backend.sessions.pop()
            raise
        self._watch.__enter__()

    def end(self, failed: bool) -> None:
        """End the session.

        Args:
            failed: Whether the call raised an error.

        Raises:
            PlanError: A rule cannot act at a site; or there is a new problem, and the backend is strict.
            RuleError: A rule was registered again after the backend was created.
        """
        self._watch.__exit__(None, None, None)
        self._backend.in_python.__exit__(None, None, None)
        self._backend.sessions.pop()
        self._frame = self._activation = None
        self.decoupled.clear()
        if self.error is not None:
            raise self.error
        if not failed:
            self._backend.findings.after(self.name, ran=self.ran > 0 or self.python)

    def has(self, function: Callable[..., Any]) -> bool:
        """Whether a compiled function belongs to a part of the model that this session runs."""
        module = frames.compiled_module(function)
        return module is not None and self.root is not None and module in self.root.modules()

    def holds_all(self, gm: fx.GraphModule, setting: Setting) -> bool:
        """Whether a graph that is being captured contains everything that this call runs, as far as is known.

        Args:
            gm: The graph.
            setting: The place of the program where it is captured.
        """
        # The parts into which DDP splits a graph have no reason
        reason = getattr(gm, "compile_subgraph_reason", None)
        ended = reason is not None and not reason.graph_break
        return (
            ended
            and not self.ran
            and not self.pending
            and not self.python
            and len(setting.modules) <= 1
        )

    def setting(self) -> Setting:
        """The place of the program that is running."""
        return frames.setting(self.root, self._frame)

    def run(self, piece: Piece, compiled: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a captured graph."""
        occurrence = piece.at(self.setting(), self.calls)
        self._backend.findings.add(piece, occurrence)
        self.calls.update(occurrence.counts)
        self.pending.clear()
        self.ran += 1
        if occurrence.parameters and torch.is_grad_enabled():
            parameters = occurrence.parameters.items()
            self._use({p: inside or not self.one_call for p, inside in parameters})
        known = self.decoupled if self.one_call else {}
        return unintercepted(lambda: self.unwatched(lambda: compiled(*piece.decouple(args, known))))

    def unwatched(self, call: Callable[[], Any]) -> Any:
        """Call something that has been looked at."""
        return self._watch.unseen(call, ())

    def uses_outside(self, program: Program, parameter: str) -> None:
        """Note a parameter with a rule that is used outside of the graphs."""
        if self._parameters.get((program, parameter)) is not False:
            self._use({(program, parameter): False})

    def missed(self, parameter: Tensor) -> None:
        """Note a parameter that is used where no rule can act."""
        program = self._backend.program_of(self.setting().top())
        if explicit_rules_act() and (names := program.names(parameter)):
            self._parameter(program, parameter, names)

    def _use(self, inside: Mapping[tuple[Program, str], bool]) -> None:
        """Note parameters that are used, and those whose rule acts on a part of the gradient because of it.

        Args:
            inside: The parameters, and whether their rules belong to one graph.
        """
        used = self._parameters
        self._backend.findings.torn(p for p in inside if p in used and (inside[p] or used[p]))
        used.update({p: inside[p] or used.get(p, False) for p in inside})

    def _seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Examine an operation that runs in Python and was not intercepted."""
        if is_tracing() or not explicit_rules_act():
            return  # a compiler runs the operation on fake tensors; or the user wants the native backward
        learns = torch.is_grad_enabled() and func is not torch.ops.aten.detach.default
        tensors = [t for t in tree.leaves((args, kwargs)) if isinstance(t, Tensor)]
        learning = [t for t in tensors if learns and t.requires_grad]
        called = activation_call()
        possible = possible_activations(func)
        asks = bool(learning) and self._backend.in_python.observed.wants_parameters
        if called is None and not possible and not asks:
            return
        setting = self.setting()
        program = self._backend.program_of(setting.top())
        for parameter in learning if asks else ():
            if names := program.names(parameter):
                self._parameter(program, parameter, names)
        if called is not None:
            frame, name = called
            if frame is self._activation:
                return  # another operation of the same activation
            self._activation = frame
            if name not in possible:
                target, given = OPS[name].function, (tensors[0],)
                self._activations(program, setting, [(target, given, {})], bool(learning))
                return
        if possible:
            builtins = [OPS[name].function for name in possible if func not in OPS[name].aten]
            calls: list[tuple[Any, Any, Any]] = [(func, args, kwargs)]
            calls += [(f, (tensors[0],), {}) for f in builtins]
            self._activations(program, setting, calls, bool(learning))

    def _activations(
        self, program: Program, setting: Setting, calls: list[tuple[Any, Any, Any]], learning: bool
    ) -> None:
        """Count one call of an activation. Note it as missed if the table gives a rule to one of its names."""
        owner = program.owner(setting.modules)
        where = Origin(program.path(owner), caller(), class_of(owner))
        names = [
            place
            for target, given, keywords in calls
            if (place := located(target, given, keywords, where)) is not None
        ]
        wanted: Located | None = None
        for place in names:
            key = program, place.site.path, place.site.op
            place = replace(place, site=replace(place.site, call=self.calls[key]))
            entry = self._backend.entry_for(place)
            if entry is not None and (learning or entry.forward):
                wanted = wanted or place
        self.calls.update((program, place.site.path, place.site.op) for place in names[:1])
        if wanted is not None:
            self._backend.findings.missed(program, wanted)

    def _parameter(self, program: Program, parameter: Tensor, names: tuple[str, ...]) -> None:
        """Note a parameter as missed if the table gives a rule to it."""
        holders = [program.holder(name) for name in names]
        place = parameter_site(parameter, names, [h for h in holders if h is not None])
        if self._backend.entry_for(place) is not None:
            place = replace(place, site=replace(place.site, source=caller()))
            self._backend.findings.missed(program, place)
