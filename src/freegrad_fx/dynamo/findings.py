"""What was found in the programs that a backend compiled, and the problems to warn the user about."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..core.scopes import unlearned
from ..errors import FreegradWarning, PlanError
from ..graph.provenance import is_users
from ..plan import Decision, Plan
from ..plan.reach import require_reached
from ..sites.remarks import Opaque
from ..sites.site import Located
from ..table import RuleTable
from . import frames
from .pieces import Occurrence, Piece
from .programs import Program

__all__ = ["Findings"]

_ANY_PROGRAM = "call the model, not compiled, in a freegrad_fx.use(rules, model=model) block, which takes any program"
_REMEDY = (
    "Dynamo left that code to Python, and there rules reach only what Python code calls: functions of PyTorch, outside "
    "of any autograd.Function. TORCH_LOGS=graph_breaks,recompiles shows why. Change the code so that it can be "
    "compiled; or use transform(), if it can capture the model"
)


class Findings:
    """The programs of one backend, and the problems in them. Each problem is reported once.

    Args:
        table: The rule table.
        strict: Raise `PlanError` instead of warning.
    """

    def __init__(self, table: RuleTable, strict: bool) -> None:
        self._table = table
        self._strict = strict
        self._programs: dict[nn.Module | None, Program] = {}
        self._added: weakref.WeakSet[Occurrence] = weakref.WeakSet()
        # The problems, and whether they have been reported
        self._problems: dict[str, bool] = {}
        self._missed: dict[tuple[Program, str], bool] = {}
        self._checked = False

    def reset(self) -> None:
        """Forget all programs and problems."""
        self._programs.clear()
        self._problems.clear()
        self._missed.clear()
        self._checked = False

    def refresh(self) -> None:
        """Read the names of modules and parameters again."""
        for program in self._programs.values():
            program.refresh()

    def program(self, root: nn.Module | None, function: str = "") -> Program:
        """The program of a model.

        Args:
            root: The model; None for code that does not belong to a model.
            function: The name of the function that is running, for such code.
        """
        if root not in self._programs:
            name = type(root).__name__ if root is not None else function or "a function"
            self._programs[root] = Program(root, name, self._table)
        return self._programs[root]

    def plan(self, model: nn.Module | None = None) -> Plan:
        """The plan of a model; see `Backend.report`."""
        found = self._programs
        if model is not None:
            found = {root: program for root, program in found.items() if root is model}
        if len(found) == 1:
            return next(iter(found.values())).plan
        names = ", ".join(program.name for program in self._programs.values())
        if found:
            raise PlanError(
                f"this backend has captured several models ({names}). Name one: report(model)."
            )
        if not names:
            raise PlanError(
                "this backend has captured nothing yet. Call the compiled model before report()."
            )
        raise PlanError(
            f"this backend has captured nothing of that model yet, only: {names}. Call the compiled model before "
            f"report(model)."
        )

    def add(self, piece: Piece, occurrence: Occurrence) -> None:
        """Add a graph that runs to the report."""
        if occurrence in self._added:
            return
        if occurrence.entries != piece.entries:
            names = ", ".join(place.site.name for _, place, _ in occurrence.sites)
            raise PlanError(
                f"a graph that was captured for other sites runs for {names}, to which the table gives other rules"
            )
        self._added.add(occurrence)
        for program, place, decision in occurrence.sites:
            if decision.listed:
                program.add(place, decision)
            if decision.action == "skip":
                self._complain(f"site {place.site.name} keeps its backward: {decision.reason}")
        texts = [
            text
            for _, _, decision in occurrence.sites
            for text in unlearned(decision.rules, piece.learnt)
        ]
        for text in (*texts, *piece.unreached):
            self._complain(text)
        piece.program.note(opaque=piece.opaque, steps=piece.steps)
        if self._strict:
            for note in piece.opaque:
                self._complain(f"not traced: {note}")

    def outside(self, program: Program, place: Located, decision: Decision) -> None:
        """Add a site that runs in Python to the report."""
        program.add_in_python(place, decision)
        if decision.action == "skip":
            self._complain(f"site {place.site.name} keeps its backward: {decision.reason}")
        for text in unlearned(decision.rules, program.identities()):
            self._complain(text)

    def opaque(self, program: Program, note: Opaque) -> None:
        """Add a call in Python, inside of which no rule can act, to the report."""
        program.note(opaque=[note])
        if self._strict:
            self._complain(f"not traced: {note}")

    def compiled_otherwise(
        self, program: Program, function: Callable[..., Any], module: nn.Module | None
    ) -> None:
        """Note that a part of a program is compiled with another backend."""
        name = program.path(module) or getattr(function, "__qualname__", type(function).__name__)
        self._complain(
            f"{name}, which {program.name} calls, is compiled with another backend: it keeps its native backward. "
            f"Remove its torch.compile, or compile it with freegrad_fx.compile"
        )

    def missed(self, program: Program, place: Located) -> None:
        """Note that a site with a rule ran outside of the captured graphs, without the rule."""
        site = place.site
        text = f"{site.name} ({site.source})" if site.source else site.name
        program.miss(place)
        self._missed.setdefault((program, text), False)
        if self._strict:
            raise PlanError(f"strict: {_outside(program, [text])}")

    def torn(self, parameters: Iterable[tuple[Program, str]]) -> None:
        """Note parameters whose rules act on parts of the gradient: several graphs, or a graph and Python, use them."""
        for program, name in parameters:
            self._complain(
                f"the parameter {name} of {program.name} is used in several of the captured graphs that run in one "
                f"call, or in a graph and outside of it: its rule acts on the gradient from each graph, not on their "
                f"sum. Remove the graph breaks between its uses, or compile the model itself instead of a function "
                f"that calls it; or {_ANY_PROGRAM}"
            )

    def after(self, name: str, ran: bool) -> None:
        """Report the new problems after a call.

        Args:
            name: The name of the compiled model or function.
            ran: Whether a captured graph ran.

        Raises:
            PlanError: There is a new problem, and `strict` is set.
        """
        if not ran and not self._missed:
            self._complain(
                f"no captured graph ran in a call of {name}, and no function of PyTorch was called in Python: there is "
                f"nothing to which a rule could be given"
            )
        elif ran and not self._checked:
            self._checked = True
            self._check_entries()
        missed: dict[Program, list[str]] = {}
        for (program, text), reported in self._missed.items():
            if not reported:
                missed.setdefault(program, []).append(text)
        for program, texts in missed.items():
            self._missed.update(dict.fromkeys(((program, text) for text in texts), True))
            self._complain(_outside(program, texts))
        new = [text for text, reported in self._problems.items() if not reported]
        self._problems.update(dict.fromkeys(new, True))
        if new and self._strict:
            raise PlanError("strict: " + "; ".join(new))
        for text in new:
            warnings.warn(text, FreegradWarning, stacklevel=_users_level())

    def _complain(self, text: str) -> None:
        self._problems.setdefault(text, False)

    def _check_entries(self) -> None:
        """Complain about the entries that match no site, or come too late to decide one."""
        plans = [program.plan for program in self._programs.values()]
        names = ", ".join(plan.model for plan in plans)
        ops = sorted({d.site.op for plan in plans for d in plan.decisions})
        for program in self._programs.values() if self._table.reaches else ():
            if program.root is not None:
                paths = {path for path, _ in program.root.named_modules()}
                require_reached(program.plan, program.root, paths)
        for index, entry in enumerate(self._table.entries):
            if not entry.optional and not any(plan.meant[index] for plan in plans):
                self._complain(
                    f"the entry {entry.selector!r} matched nothing in the first call of {names}; the ops found "
                    f"there are: {', '.join(ops) or 'none'}"
                )
            late = [plan.misplaced[index] for plan in plans if index in plan.misplaced]
            if late and not any(plan.hits[index] for plan in plans):
                self._complain(late[0])


def _outside(program: Program, sites: list[str]) -> str:
    return (
        f"outside of the captured graphs of {program.name}, these sites ran with their native backward: "
        f"{', '.join(sites)}. {_REMEDY}"
    )


def _users_level() -> int:
    """The `stacklevel` with which the caller of this function warns about the innermost line of user code."""
    for level, frame in enumerate(frames.frames()):
        if is_users(frame.f_code):
            return level
    return 1
