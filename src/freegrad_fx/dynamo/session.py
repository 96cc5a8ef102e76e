"""One call of a compiled program: counts the sites that have run, and sees what runs outside of the captured graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from .._torch import tree
from .._torch.dynamo import is_tracing
from ..graph.provenance import Origin, caller
from ..sites.site import Located
from ..table import Entry
from ..vocabulary.activations import OPS
from . import frames
from .frames import Setting
from .pieces import Decoupled, Occurrence, Piece
from .programs import Calls, Program, class_of
from .watch import Watch, activation_call, located, located_parameter, possible_activations

__all__ = ["Session"]


class Owner(Protocol):
    """What a session asks of the backend that it belongs to."""

    @property
    def sessions(self) -> list[Session]:
        """The calls that run in this thread, the innermost last."""

    def program_of(self, root: nn.Module | None) -> Program:
        """The program of a model."""

    def entry_for(self, place: Located) -> Entry | None:
        """The entry of the table that decides a site."""

    def take_up(self, piece: Piece, occurrence: Occurrence) -> None:
        """Take up in the report what runs."""

    def missed(self, program: Program, place: Located) -> None:
        """Say that a site has run where no rule could be given to it."""

    def torn(self, parameters: Iterable[tuple[Program, str]]) -> None:
        """Say that several graphs that run in one call use a parameter with a rule."""

    def after(self, session: Session) -> None:
        """After a call: say what the caller asked for and has not got."""


class Session:
    """One call of what was compiled with a backend. It begins when it is made.

    Args:
        backend: The backend.
        function: What was compiled.
        frame: The frame that calls it.

    Attributes:
        name: What was compiled.
        calls: How many sites have run.
        pending: How many sites have been captured in graphs that have not run yet.
        ran: How many captured graphs have run.
        error: What went wrong while a graph was rewritten.
        one_call: Whether it is one call of a module, in which a rule acts once on the gradient of a parameter.
    """

    def __init__(self, backend: Owner, function: Callable[..., Any], frame: FrameType) -> None:
        self._backend = backend
        self._root = frames.compiled_module(function)
        self._frame: FrameType | None = frame
        self._activation: FrameType | None = None
        self._watch = Watch(self._seen)
        # Those that graphs have used, and whether their rules are in one of these
        self._parameters: dict[tuple[Program, str], bool] = {}
        self._decoupled: Decoupled = {}
        self.one_call = frames.calls_module(function)
        self.name = type(self._root).__name__
        if self._root is None:
            self.name = getattr(function, "__qualname__", "a function")
        self.calls: Calls = Counter()
        self.pending: Calls = Counter()
        self.ran = 0
        self.error: Exception | None = None
        backend.sessions.append(self)
        self._watch.__enter__()

    def end(self, failed: bool) -> None:
        """The call is over.

        Args:
            failed: Whether it raised.

        Raises:
            PlanError: A rule could not serve a site; under `strict`, what is otherwise a warning.
            RuleError: A rule is not what it was when the backend was made.
        """
        self._watch.__exit__(None, None, None)
        self._backend.sessions.pop()
        self._frame = self._activation = None
        if self.error is not None:
            raise self.error
        if not failed:
            self._backend.after(self)

    def has(self, function: Callable[..., Any]) -> bool:
        """Whether something compiled is a part of the model that this session runs."""
        module = frames.compiled_module(function)
        return module is not None and self._root is not None and module in self._root.modules()

    def holds_all(self, gm: fx.GraphModule, setting: Setting) -> bool:
        """Whether a graph that is captured now holds all that this call runs, as far as can be told.

        Args:
            gm: The graph.
            setting: Where it is captured.
        """
        reason = getattr(gm, "compile_subgraph_reason", None)  # DDP's parts of a graph have none
        ended = reason is not None and not reason.graph_break
        return ended and not self.ran and not self.pending and len(setting.modules) <= 1

    def setting(self) -> Setting:
        """Where the code that is running stands in the program."""
        return frames.setting(self._root, self._frame)

    def run(self, piece: Piece, compiled: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a captured graph."""
        occurrence = piece.at(self.setting(), self.calls)
        self._backend.take_up(piece, occurrence)
        self.calls.update(occurrence.counts)
        self.pending.clear()
        self.ran += 1
        if occurrence.parameters and torch.is_grad_enabled():
            self._use(occurrence.parameters)
        known = self._decoupled if self.one_call else {}
        return self._watch.unseen(lambda: compiled(*piece.decouple(args, known)), ())

    def _use(self, parameters: Mapping[tuple[Program, str], bool]) -> None:
        """Say which of the parameters that a graph uses have been used before, so that a rule acts on each part."""
        used = self._parameters
        inside = {p: inside or not self.one_call for p, inside in parameters.items()}
        self._backend.torn(p for p in inside if p in used and (inside[p] or used[p]))
        used.update({p: inside[p] or used.get(p, False) for p in inside})

    def _seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at an operation that runs outside of the captured graphs."""
        if is_tracing():
            return  # a compiler runs it on fake tensors
        learns = torch.is_grad_enabled() and func is not torch.ops.aten.detach.default
        tensors = [t for t in tree.leaves((args, kwargs)) if isinstance(t, Tensor)]
        learning = [t for t in tensors if learns and t.requires_grad]
        called = activation_call()
        possible = possible_activations(func)
        if called is None and not possible and not learning:
            return
        setting = self.setting()
        program = self._backend.program_of(setting.top())
        for parameter in learning:
            if names := program.names(parameter):
                self._parameter(program, parameter, names)
        if called is not None:
            frame, name = called
            if frame is self._activation:
                return  # a further step of it
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
        """Count one call of an activation, and say if a rule was meant for it, under whichever of its names."""
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
            if entry is not None and entry.rules is not None and (learning or entry.forward):
                wanted = wanted or place
        self.calls.update((program, place.site.path, place.site.op) for place in names[:1])
        if wanted is not None:
            self._backend.missed(program, wanted)

    def _parameter(self, program: Program, parameter: Tensor, names: tuple[str, ...]) -> None:
        """Say if a rule was meant for a parameter that is used."""
        owner = program.holder(names[0])
        where = Origin(program.path(owner), "", class_of(owner), names)
        place = located_parameter(parameter, where)
        entry = self._backend.entry_for(place)
        if entry is not None and entry.rules is not None:
            place = replace(place, site=replace(place.site, source=caller()))
            self._backend.missed(program, place)
