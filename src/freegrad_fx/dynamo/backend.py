"""`backend` and `compile`: what `torch.compile` calls, and what it tells of what was compiled."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from .._torch import dynamo as torch_dynamo
from .._torch.releases import warn_if_untested
from ..context import explicit_rules_act
from ..core.rule import get
from ..errors import FreegradWarning, PlanError, RuleError
from ..graph.provenance import is_users
from ..plan import PLAN, Plan
from ..sites.site import Located
from ..table import Entry, RulesLike, RuleTable
from . import frames
from .pieces import Occurrence, Piece
from .programs import Calls, Program
from .session import Session
from .watch import operations

__all__ = ["Backend", "backend", "compile"]

_COMPILER_OPTIONS = ("mode", "options", "dynamic")
_SESSION = "_freegrad_fx"  # marks a function whose calls are sessions
_REMEDY = (
    "Dynamo left that code to Python; TORCH_LOGS=graph_breaks,recompiles says why. Change the code so that it "
    "compiles, or use transform()"
)


class Backend:
    """A backend for `torch.compile` that puts rules into what it compiles. Made by `backend`.

    Args:
        table: The rules.
        inner: What compiles the rewritten graphs.
        strict: Raise where the default is a warning.
        options: Options for `inner`.
    """

    def __init__(
        self, table: RuleTable, inner: Any, strict: bool, options: Mapping[str, Any]
    ) -> None:
        warn_if_untested()
        self.table = table
        self.inner = inner
        self.strict = strict
        self._options = dict(options)
        self._programs: dict[nn.Module | None, Program] = {}
        self._taken_up: weakref.WeakSet[Occurrence] = weakref.WeakSet()
        # What is wrong, and whether it has been said
        self._problems: dict[str, bool] = {}
        self._missed: dict[tuple[Program, str], bool] = {}
        self._checked = False
        _refuse_functions(table)
        self._depends_on_place = any(_depends_on_place(entry) for entry in table.entries)
        self._local = threading.local()
        self.__dict__[PLAN] = self.report
        operations()
        # Dynamo looks for this name, and enters around every call what it returns
        self.backend_ctx_ctor = self._follow

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        return self  # a copy of a compiled model is a further model that it compiles

    def __reduce__(self) -> tuple[Any, ...]:
        return Backend, (self.table, self.inner, self.strict, self._options)

    def __repr__(self) -> str:
        return f"freegrad_fx.backend({self.table!r}, inner={self.inner!r})"

    # -- what PyTorch asks

    @property
    def __name__(self) -> str:
        """The name of the backend. `torch.compile`, which asks for it, is handed what is to be entered around calls."""
        asking = torch_dynamo.compile_wrapper_of(sys._getframe(1))
        if asking is not None:
            asking.backend_ctx_ctor = self.backend_ctx_ctor
        return "freegrad_fx"

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Any, **options: Any
    ) -> Callable[..., Any]:
        """Rewrite a graph of Dynamo's, and compile it."""
        given = {**self._options, **options}
        compiler = torch_dynamo.compiler(self.inner, *map(given.get, _COMPILER_OPTIONS))
        if torch_dynamo.is_compiling_backward():
            return compiler(gm, example_inputs)  # type: ignore[no-any-return]
        session = self.session
        if session is None:
            warnings.warn(
                "this backend is called by something else than a function that torch.compile returned: it cannot see "
                "what runs outside of the graphs, and call indices begin anew in each of them",
                FreegradWarning,
                stacklevel=2,
            )
        try:
            piece = self._rewritten(gm, session)
        except (PlanError, RuleError) as error:
            if session is not None:
                session.error = error
            raise
        compiled = compiler(gm, example_inputs)

        def run(*args: Any) -> Any:
            if torch_dynamo.is_tracing():
                return compiled(*args)  # a compiler runs it on fake tensors
            session = self.session
            if session is None:
                return compiled(*piece.decouple(args, {}))
            return session.run(piece, compiled, args)

        return run

    def reset(self) -> None:
        """Forget what has been captured. `torch._dynamo.reset` calls it."""
        self._programs.clear()
        self._problems.clear()
        self._missed.clear()
        self._checked = False

    # -- the report

    def report(self, model: nn.Module | None = None) -> Plan:
        """What has been rewritten so far, what has not, and why. It grows as graphs are captured and run.

        Args:
            model: Which of the models that were compiled, where there are several.

        Raises:
            PlanError: Nothing has run yet, or there are several models and none is named.
        """
        found = self._programs
        if model is not None:
            found = {root: program for root, program in found.items() if root is model}
        if len(found) == 1:
            return next(iter(found.values())).plan
        names = ", ".join(program.name for program in self._programs.values())
        raise PlanError(
            f"this backend has captured several models ({names}); say which: report(model)"
            if found
            else f"this backend has captured nothing of that model yet; it has captured: {names or 'nothing'}"
        )

    # -- what its sessions ask

    @property
    def sessions(self) -> list[Session]:
        """The calls that run in this thread, the innermost last."""
        found: list[Session] = self._local.__dict__.setdefault("sessions", [])
        return found

    @property
    def session(self) -> Session | None:
        """The innermost call that runs in this thread."""
        return self.sessions[-1] if self.sessions else None

    def program_of(self, root: nn.Module | None) -> Program:
        """The program of a model; of None, that of functions."""
        if root not in self._programs:
            name = type(root).__name__
            if root is None:
                name = "a function" if self.session is None else self.session.name
            self._programs[root] = Program(root, name, self.table)
        return self._programs[root]

    def entry_for(self, place: Located) -> Entry | None:
        """The entry of the table that decides a site."""
        index = self.table.decide(place)
        return None if index is None else self.table.entries[index]

    def take_up(self, piece: Piece, occurrence: Occurrence) -> None:
        """Take up in the report what runs."""
        if occurrence in self._taken_up:
            return
        if occurrence.entries != piece.entries:
            names = ", ".join(place.site.name for _, place, _ in occurrence.sites)
            raise PlanError(
                f"a graph that was captured for other sites runs for {names}, which the table gives other rules"
            )
        self._taken_up.add(occurrence)
        for program, place, decision in occurrence.sites:
            program.add(place, decision)
            if decision.action == "skip":
                self._complain(f"site {place.site.name} keeps its backward: {decision.reason}")
        for text in piece.unreached:
            self._complain(text)
        piece.program.note(opaque=piece.opaque)
        if self.strict:
            for note in piece.opaque:
                self._complain(f"not looked into: {note}")

    def missed(self, program: Program, place: Located) -> None:
        """Say that a site has run where no rule could be given to it."""
        site = place.site
        text = f"{site.name} ({site.source})" if site.source else site.name
        program.miss(place)
        self._missed.setdefault((program, text), False)
        if self.strict:
            raise PlanError(f"strict: {_outside(program, [text])}")

    def torn(self, parameters: Iterable[tuple[Program, str]]) -> None:
        """Say that several graphs that run in one call use a parameter with a rule."""
        for program, name in parameters:
            self._complain(
                f"the parameter {name} of {program.name} is used in several of the captured graphs that run in one "
                f"call: its rule acts on the gradient from each of them, not on their sum. Remove the graph breaks "
                f"between its uses, compile the model itself and not what calls it, or use transform()"
            )

    def after(self, session: Session) -> None:
        """After a call: say what the caller asked for and has not got."""
        if not session.ran and not self._missed:
            self._complain(f"no captured graph ran in a call of {session.name}. {_REMEDY}")
        elif session.ran and not self._checked:
            self._checked = True
            self._check_entries()
        missed: dict[Program, list[str]] = {}
        for (program, text), said in self._missed.items():
            if not said:
                missed.setdefault(program, []).append(text)
        for program, texts in missed.items():
            self._missed.update(dict.fromkeys(((program, text) for text in texts), True))
            self._complain(_outside(program, texts))
        new = [text for text, said in self._problems.items() if not said]
        self._problems.update(dict.fromkeys(new, True))
        if new and self.strict:
            raise PlanError("strict: " + "; ".join(new))
        for text in new:
            warnings.warn(text, FreegradWarning, stacklevel=_users_level())

    # -- our own

    def _follow(self) -> contextlib.AbstractContextManager[None]:
        """Make the call that begins, and all later ones of the same function, a session."""
        frame = torch_dynamo.compiled_function(frames.frames())
        if frame is not None:
            torch_dynamo.wrap_compiled_function(frame, self._in_a_session, _SESSION)
        return contextlib.nullcontext()

    def _in_a_session(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Dynamo is to compile neither what happens around the call, nor the call as one function with it
        begin = torch.compiler.disable(Session)  # type: ignore[no-untyped-call]
        end = torch.compiler.disable(Session.end)  # type: ignore[no-untyped-call]
        compiled = torch_dynamo.looked_into(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.session is not None and self.session.has(function):
                return compiled(*args, **kwargs)
            session = begin(self, function, sys._getframe())
            try:
                result = compiled(*args, **kwargs)
            except BaseException:
                end(session, failed=True)
                raise
            end(session, failed=False)
            return result

        torch_dynamo.skip(call.__code__)
        setattr(call, _SESSION, True)
        return call

    def _complain(self, text: str) -> None:
        self._problems.setdefault(text, False)

    def _check_entries(self) -> None:
        plans = [program.plan for program in self._programs.values()]
        names = ", ".join(plan.model for plan in plans)
        ops = sorted({d.site.op for plan in plans for d in plan.decisions})
        for index, entry in enumerate(self.table.entries):
            if not any(plan.meant[index] for plan in plans):
                self._complain(
                    f"the entry {entry.selector!r} matched nothing in the first call of {names}; the ops it has are: "
                    f"{', '.join(ops) or 'none'}"
                )

    def _rewritten(self, gm: fx.GraphModule, session: Session | None) -> Piece:
        self._require_rules()
        for program in self._programs.values():
            program.refresh()
        if session is None:
            here = frames.setting(None, None)
            piece = Piece(gm, self.table, here, Counter(), self.program_of, alone=True)
            self._guard(piece, Counter())
            return piece
        pending = Counter(session.pending)
        setting = session.setting()
        alone = not session.one_call or session.holds_all(gm, setting)
        piece = Piece(gm, self.table, setting, session.calls + pending, self.program_of, alone)
        session.pending.update(piece.at(setting, session.calls + pending).counts)
        self._guard(piece, pending)
        return piece

    def _registered_anew(self) -> str | None:
        """The name of a rule whose formula is another one than when the backend was made."""
        rules = (rule for entry in self.table.entries for rule in entry.rules or ())
        return next(
            (rule.name for rule in rules if get(rule.name).function is not rule.function), None
        )

    def _require_rules(self) -> None:
        """Raise `RuleError` if a rule has been registered anew: graphs would call another one than was asked for."""
        name = self._registered_anew()
        if name is not None:
            raise RuleError(
                f"rule {name!r} has been registered anew since this backend was made. Make a new one, and compile with "
                f"it."
            )

    def _guard(self, piece: Piece, pending: Calls) -> None:
        """Let Dynamo compile anew where a graph would not do any more what it was compiled for.

        It has not seen what was put into the graph: neither that rules may be off, nor that they have names, nor that
        the same code may run for sites that have other rules.
        """
        act = explicit_rules_act()

        def same_rules(_: Any) -> bool:
            if explicit_rules_act() is not act or self._registered_anew() is not None:
                return False
            session = self.session
            if not self._depends_on_place or session is None:
                return True
            try:
                here = piece.at(session.setting(), session.calls + pending)
            except AttributeError:  # a module of another structure
                return False
            return here.entries == piece.entries

        torch_dynamo.add_guard(same_rules, "freegrad_fx: the same rules act on these sites")


def _depends_on_place(entry: Entry) -> bool:
    """Whether an entry asks for more than what an operation is, so that one code may need several rules."""
    sites = entry.sites
    return bool(sites.module or sites.type or sites.parameter or sites.call or sites.where)


def _outside(program: Program, sites: list[str]) -> str:
    return (
        f"outside of the captured graphs of {program.name} ran, with their native backward: {', '.join(sites)}. "
        f"{_REMEDY}"
    )


def _table(rules: RulesLike) -> RuleTable:
    """The table that a user gives; raise `TypeError` for None, by which `transform` means ambient rules."""
    if rules is None:
        raise TypeError(
            "rules is None, which lets a transformed model follow use() blocks. What Dynamo captures cannot: compile "
            "the transformed model, torch.compile(transform(model)), or give the rules here."
        )
    return RuleTable.of(rules)


def _refuse_functions(table: RuleTable) -> None:
    """Raise `PlanError` for an entry that means the calls of a `torch.autograd.Function`."""
    for entry in table.entries:
        for kind in entry.sites.classes_in(nn.Module()):
            if issubclass(kind, torch.autograd.Function):
                raise PlanError(
                    f"the entry {entry.selector!r} means the calls of the autograd.Function {kind.__name__}, which "
                    f"Dynamo takes apart. Leave it out (it keeps the backward it has), or use transform()."
                )


def _users_level() -> int:
    """The `stacklevel` of a warning in the caller of this function's caller that blames the user's code."""
    for level, frame in enumerate(frames.frames()):
        if is_users(frame.f_code):
            return level
    return 1


def backend(
    rules: RulesLike,
    inner: str | Callable[..., Any] = "inductor",
    *,
    strict: bool = False,
    **options: Any,
) -> Backend:
    """Make a backend for `torch.compile` that gives activations and parameters a decoupled backward.

    Formula: that of `transform`, for every site of every graph that Dynamo captures:
    ∂x = rule(∂y, x, y) instead of f'(x)·∂y.

    It is for programs that no tracer can flatten: control flow on data, detection models, `generate`, methods. The
    model keeps its class, and code that Dynamo cannot capture runs in Python: a site in it keeps its native backward,
    which is a warning that names it.

    Args:
        rules: As for `transform`, but not None. Sites have the same owner paths, ops, names and call indices.
        inner: What compiles the rewritten graphs: the name of a backend, or one.
        strict: Raise `PlanError` where the default is a warning: for an entry that matched nothing in the first call,
            a site that cannot be given its rule, and one that ran outside of the captured graphs.
        **options: `mode`, `options` and `dynamic`, for `inner`.

    Returns:
        The backend. Its `report()` tells what has been done; it grows as graphs are captured.

    Raises:
        RuleError: A rule is unknown or not fully bound.
        PlanError: A key names no op or group; or, while something is compiled, a rule cannot serve a site.
        TypeError: An option is none of those above; or `rules` is None.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> backend = fg.backend({"relu": "straight_through"}, inner="aot_eager")
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> _ = torch.compile(model, backend=backend)(torch.randn(2, 4))
        >>> print(backend.report().decisions[0].site.name)
        1:relu[0]
    """
    if others := options.keys() - {*_COMPILER_OPTIONS}:
        raise TypeError(
            f"backend() takes for inner the options {', '.join(_COMPILER_OPTIONS)}; got {', '.join(sorted(others))}. "
            f"What is for torch.compile is given to it: torch.compile(model, backend=freegrad_fx.backend(...), ...)."
        )
    return Backend(_table(rules), inner, strict, options)


def compile(
    model: Any,
    rules: RulesLike,
    *,
    strict: bool = False,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **others: Any,
) -> Any:
    """Compile a model, or a function, whose activations and parameters have a decoupled backward.

    Formula: that of `transform`; the short form of ``torch.compile(model, backend=freegrad_fx.backend(rules), ...)``.

    Args:
        model: A module or a function. It is not changed.
        rules: As for `backend`.
        strict: As for `backend`.
        backend: What compiles the rewritten graphs.
        mode: For that backend; likewise `options`.
        options: See `mode`.
        **others: What else `torch.compile` takes: `fullgraph`, `dynamic`, ...

    Returns:
        What `torch.compile` returns. `report` tells what has been done; it grows as graphs are captured.

    Raises:
        TypeError: As for `backend`; likewise RuleError and PlanError.
    """
    compiler = Backend(
        _table(rules),
        backend,
        strict,
        {"mode": mode, "options": options, "dynamic": others.get("dynamic")},
    )
    compiled = torch.compile(model, backend=compiler, **others)
    # Not by setattr, which would write to the model
    compiled.__dict__[PLAN] = compiler.report
    return compiled
