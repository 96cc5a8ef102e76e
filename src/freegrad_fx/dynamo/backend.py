"""`backend` and `compile`: the backend that `torch.compile` calls."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from .._torch import dynamo as torch_dynamo
from .._torch.releases import warn_if_untested
from ..backward.functions import explained
from ..capture.beside import hold_beside
from ..context import explicit_rules_act
from ..core.contract import OVER
from ..core.rule import get, learnt_by
from ..errors import FreegradWarning, PlanError, RuleError
from ..plan import PLAN, Plan
from ..sites.site import Located
from ..table import Entry, RulesLike, RuleTable
from . import frames
from .findings import Findings
from .outside import InPython, Outside
from .pieces import Piece
from .programs import Calls, Program
from .session import Session
from .watch import operations

__all__ = ["Backend", "backend", "compile"]

_COMPILER_OPTIONS = ("mode", "options", "dynamic")


class Backend:
    """A backend for `torch.compile` that adds rules to the graphs it compiles. Created by `backend`.

    Args:
        table: The rule table.
        inner: The backend that compiles the rewritten graphs.
        strict: Raise an error where the default is a warning.
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
        # What was found in the compiled programs; `report` shows it
        self.findings = Findings(table, strict)
        _refuse_entries(table)
        self._depends_on_place = any(_depends_on_place(entry) for entry in table.entries)
        self._local = threading.local()
        # The block around each call, which acts on what runs in Python
        self.in_python = InPython(Outside(self))
        self.__dict__[PLAN] = self.report
        operations()
        # Dynamo looks up this name, and enters the returned context around every call
        self.backend_ctx_ctor = self._follow

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        return self  # a copy of a compiled model uses the same backend

    def __reduce__(self) -> tuple[Any, ...]:
        return Backend, (self.table, self.inner, self.strict, self._options)

    def __repr__(self) -> str:
        return f"freegrad_fx.backend({self.table!r}, inner={self.inner!r})"

    # -- called by PyTorch

    @property
    def __name__(self) -> str:
        """The name of the backend. `torch.compile` reads it, and then receives the context to enter around calls."""
        asking = torch_dynamo.compile_wrapper_of(sys._getframe(1))
        if asking is not None:
            asking.backend_ctx_ctor = self.backend_ctx_ctor
        return "freegrad_fx"

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Any, **options: Any
    ) -> Callable[..., Any]:
        """Rewrite a graph that Dynamo captured, and compile it."""
        given = {**self._options, **options}
        compiler = torch_dynamo.compiler(self.inner, *map(given.get, _COMPILER_OPTIONS))
        if torch_dynamo.is_compiling_backward():
            return compiler(gm, example_inputs)  # type: ignore[no-any-return]
        session = self.session
        if session is None:
            warnings.warn(
                "this backend is not called through torch.compile: it cannot detect what runs outside of the graphs, "
                "and call indices start at 0 in each graph. Use torch.compile(model, backend=backend)",
                FreegradWarning,
                stacklevel=2,
            )
        try:
            piece = self._rewritten(gm, session)
        except (PlanError, RuleError) as error:
            if session is not None:
                session.error = error
            raise
        try:
            compiled = compiler(gm, example_inputs)
        except Exception as error:
            if not (reason := explained(error)):
                raise
            refusal = RuleError(reason)
            if session is not None:
                session.error = refusal
            raise refusal from error

        def run(*args: Any) -> Any:
            if torch_dynamo.is_tracing():
                return compiled(*args)  # a compiler runs the graph on fake tensors
            session = self.session
            if session is None:
                return compiled(*piece.decouple(args, {}))
            return session.run(piece, compiled, args)

        return run

    def reset(self) -> None:
        """Forget everything that was captured. `torch._dynamo.reset` calls this."""
        self.findings.reset()

    # -- the report

    def report(self, model: nn.Module | None = None) -> Plan:
        """Return the plan of a compiled model. It grows as graphs are captured and run.

        Args:
            model: The model, if several models were compiled with this backend.

        Raises:
            PlanError: Nothing has run yet, or there are several models and `model` is not given.
        """
        return self.findings.plan(model)

    # -- called by sessions

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
        """The program of a model; of None, the program of functions."""
        return self.findings.program(root, "" if self.session is None else self.session.name)

    def entry_for(self, place: Located) -> Entry | None:
        """The table entry that gives a rule to a site, or to a place at it."""
        return self.table.gives(place)

    # -- internals

    def _follow(self) -> contextlib.AbstractContextManager[None]:
        """Make the call that starts now, and all later calls of the same function, a session."""
        frame = torch_dynamo.compiled_function(frames.frames())
        if frame is not None:
            torch_dynamo.wrap_compiled_function(frame, self._in_a_session, frames.SESSION)
        return contextlib.nullcontext()

    def _in_a_session(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Dynamo must not compile the code around the call, alone or together with the call
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
        setattr(call, frames.SESSION, True)
        return call

    def _rewritten(self, gm: fx.GraphModule, session: Session | None) -> Piece:
        """Rewrite a graph, and let Dynamo compile again where the rewritten graph is not valid."""
        self._require_rules()
        self.findings.refresh()
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

    def _registered_again(self) -> str | None:
        """The name of a rule whose formula has changed since the backend was created; None if there is no such rule."""
        rules = (rule for entry in self.table.entries for rule in entry.rules or ())
        return next(
            (rule.name for rule in rules if get(rule.name).function is not rule.function), None
        )

    def _require_rules(self) -> None:
        """Raise `RuleError` if a rule was registered again, because graphs would call the new formula."""
        name = self._registered_again()
        if name is not None:
            raise RuleError(
                f"rule {name!r} was registered again after this backend was created. Create a new backend, and compile "
                f"with it."
            )

    def _guard(self, piece: Piece, pending: Calls) -> None:
        """Let Dynamo compile again where a graph is not valid.

        Dynamo's own guards do not cover the rules in the graph: rules can be switched off or registered again, and the
        same code can run for sites with other rules.
        """
        act = explicit_rules_act()

        def same_rules(_: Any) -> bool:
            if explicit_rules_act() is not act or self._registered_again() is not None:
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
    """Whether an entry selects by more than the op, so that the same code can need other rules elsewhere."""
    sites = entry.sites
    return bool(sites.module or sites.type or sites.parameter or sites.call or sites.where)


def _table(rules: RulesLike) -> RuleTable:
    """The rule table. Raise `TypeError` for None, which is for `transform` only."""
    if rules is None:
        raise TypeError(
            "rules must not be None: code that Dynamo captures cannot follow use() blocks. Give the rules here, or "
            "compile the transformed model: torch.compile(freegrad_fx.transform(model))."
        )
    return RuleTable.of(rules)


def _refuse_entries(table: RuleTable) -> None:
    """Raise `PlanError` for an entry that compiled code cannot serve."""
    for entry in table.entries:
        if entry.sites.order:
            raise PlanError(
                f"the entry {entry.selector!r} selects the {entry.sites.order} operation, and Dynamo captures a "
                f"program in parts, whose order is not known in advance. Compile what transform(model, rules) "
                f"returns, or select the operation by its place: module=, call=."
            )
        for rule in entry.rules or ():
            if rule.over != OVER[0]:
                raise PlanError(
                    f"the entry {entry.selector!r} gives {rule!r}, which acts on several parameters together, and "
                    f"Dynamo can split them among several graphs. Compile the transformed model: "
                    f"torch.compile(freegrad_fx.transform(model, rules))."
                )
            if any(isinstance(value, torch.Generator) for value in rule.bound.values()):
                raise PlanError(
                    f"the entry {entry.selector!r} gives the rule {rule.name!r} a generator of its own, which compiled "
                    f"code cannot draw from. Leave out generator= and seed with torch.manual_seed; or use "
                    f"freegrad_fx.transform(model, rules), or a block of freegrad_fx.use(rules, model=model)."
                )
        for kind in entry.sites.classes_in(nn.Module()):
            if issubclass(kind, torch.autograd.Function):
                raise PlanError(
                    f"the entry {entry.selector!r} selects calls of the autograd.Function {kind.__name__}, which "
                    f"Dynamo traces into. Remove the entry (the Function keeps its backward); or call the model in a "
                    f"block of freegrad_fx.use(rules, model=model), which accepts it in any program."
                )


def backend(
    rules: RulesLike,
    inner: str | Callable[..., Any] = "inductor",
    *,
    strict: bool = False,
    **options: Any,
) -> Backend:
    """Create a backend for `torch.compile` that gives activations and parameters a decoupled backward.

    Formula: as for `transform`, for every site of every graph that Dynamo captures:
    ∂x = rule(∂y, x, y) instead of f'(x)·∂y.

    Use it for programs that cannot be traced into one graph: control flow on data, detection models, `generate`,
    methods. The model keeps its class. Code that Dynamo cannot capture runs in Python, where its sites get their rules
    as in a `use` block.

    Args:
        rules: As for `transform`, except None. Sites have the same owner paths, ops, names and call indices.
        inner: The backend that compiles the rewritten graphs, or its name.
        strict: Raise `PlanError` where the default is a warning: for an entry that matches nothing in the first call,
            and a site whose rule cannot act.
        **options: `mode`, `options` and `dynamic`, for `inner`.

    Returns:
        The backend. Its `report()` returns the plan, which grows as the program is captured and runs.

    Raises:
        RuleError: A rule is unknown or not fully bound.
        TableError: A key is not an op, a group or a class.
        PlanError: An entry selects an `autograd.Function`, or its rule has a generator or `over`; or, during
            compilation, a rule cannot act at a site.
        TypeError: An option is not one of the above; or `rules` is None.

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
            f"backend() takes the options {', '.join(_COMPILER_OPTIONS)} for inner, got {', '.join(sorted(others))}. "
            f"Give options of torch.compile to it: torch.compile(model, backend=freegrad_fx.backend(...), ...)."
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
    """Compile a model, or a function, with a decoupled backward for activations and parameters.

    Formula: as for `transform`. Short form of ``torch.compile(model, backend=freegrad_fx.backend(rules), ...)``.

    Args:
        model: A module or a function. It is not changed.
        rules: As for `backend`.
        strict: As for `backend`.
        backend: The backend that compiles the rewritten graphs, or its name.
        mode: The mode of this backend, as for `torch.compile`.
        options: The options of this backend, as for `torch.compile`.
        **others: Other arguments of `torch.compile`: `fullgraph`, `dynamic`, ...

    Returns:
        The result of `torch.compile`. `report` returns its plan, which grows as graphs are captured. For a module,
        the parameters that its rules learn are among its ``parameters()``, and not in its ``state_dict()``.

    Raises:
        RuleError: As for `backend`.
        TableError: As for `backend`.
        PlanError: As for `backend`.
        TypeError: As for `backend`.
    """
    compiler = Backend(
        _table(rules),
        backend,
        strict,
        {"mode": mode, "options": options, "dynamic": others.get("dynamic")},
    )
    compiled = torch.compile(model, backend=compiler, **others)
    # Not with setattr, which would set an attribute of the model
    compiled.__dict__[PLAN] = compiler.report
    if isinstance(compiled, nn.Module):
        given = [rule for entry in compiler.table.entries for rule in entry.rules or ()]
        hold_beside(compiled, learnt_by(given))
        with contextlib.suppress(TypeError, ValueError):  # a forward that is not written in Python
            # Trainers read which columns of the data the model takes
            compiled.forward.__dict__["__signature__"] = inspect.signature(model.forward)
    return compiled
