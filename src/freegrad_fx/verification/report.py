"""The result of a verification: what differs, and what it can come from."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.markup import html_view
from .comparison import Difference

__all__ = ["Verification"]


@dataclass(frozen=True)
class Verification:
    """Whether a transformed model does what its original does.

    True as a bool if there is no difference. ``print`` it for a readable text.

    Attributes:
        model: The name of the original's class.
        differences: What differs, in the order in which it was found.
        checks: The number of calls that were compared.
        cases: The modes and grad modes in which calls were compared, as text.
        notes: What was not compared or was done differently, and why.
        exact: Whether bits were compared; if not, values up to a tolerance, which `notes` states.
        repeatable: Whether the original itself does the same when it is called twice from the same state. Only tested
            if something differs.
    """

    model: str
    differences: tuple[Difference, ...] = ()
    checks: int = 0
    cases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    exact: bool = True
    repeatable: bool = True

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    @property
    def first(self) -> Difference | None:
        """The first difference; None if nothing differs."""
        return self.differences[0] if self.differences else None

    @property
    def cause(self) -> str:
        """What the first difference can come from, as a sentence; ``""`` if nothing differs."""
        return "" if self.ok else _cause(self)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [self._head(), *(f"  {difference}" for difference in self.differences[:_SHOWN])]
        return "\n".join([*lines, *self._remarks()])

    def _repr_html_(self) -> str:
        rows = [["what", "how it differs", "first in", "case", "call", "inputs"]]
        for d in self.differences[:_SHOWN]:
            where = "" if d.module is None else d.module or "the root"
            rows.append([d.name, d.what, where, d.case, str(d.call), d.inputs])
        return html_view(self._head(), rows, map(str.strip, self._remarks()))

    def _head(self) -> str:
        """What was found, as one sentence."""
        number = len(self.differences)
        found = f"DIFFERENT in {number} place{'s' * (number != 1)}"
        if self.ok:
            found = "the same bits" if self.exact else "the same values up to a tolerance"
        calls = f"{self.checks} call{'s' * (self.checks != 1)} compared ({'; '.join(self.cases)})"
        return f"{self.model}: {found}, {calls}."

    def _remarks(self) -> list[str]:
        """What stands below the differences: how many are not shown, the possible cause, and the notes."""
        more = len(self.differences) - _SHOWN
        lines = [*([f"  and {more} more"] * (more > 0)), *([] if self.ok else [self.cause])]
        return [*lines, *(f"Note: {note}." for note in self.notes)]


_SHOWN = 8


def _cause(found: Verification) -> str:
    first = found.differences[0]
    if not found.repeatable:
        return (
            "The original does not repeat itself: called twice from the same state, it gives different results. It "
            "depends on something that cannot be put back, such as the time, a random generator of its own, or an "
            "operation that is not deterministic (see torch.use_deterministic_algorithms)."
        )
    kinds = {d.kind for d in found.differences}
    cases = {d.case for d in found.differences}
    if first.inputs == "further":
        return (
            "The graph does the same for the given inputs and not for other values: it is specialised to the example, "
            "by a branch on values or a Python number that was computed from a tensor."
        )
    if first.kind == "error":
        return "One of the two raises an error: the graph lacks a check of the original, or has one that it lacks."
    if "random" in kinds:
        return (
            "Other random numbers are drawn: the forward draws them outside of the graph (random, numpy.random, a "
            "generator), or in another number or order."
        )
    if first.kind == "state":
        return (
            "The forward changes its state in a way that the graph does not repeat: an attribute of a module, or an "
            "object that it holds."
        )
    if first.kind in ("memory", "input"):
        return (
            "Memory is written or shared in another way: an in-place operation or a view of the original is a copy in "
            "the graph, or the other way round."
        )
    if first.call > 1:
        return (
            "Only a later call differs: the graph lacks state that the forward keeps between calls (an attribute, a "
            "global, a cache), or holds the value of a parameter as a constant."
        )
    if kinds == {"gradient"}:
        return (
            "Only gradients differ: the graph lacks a detach, a no_grad block, a hook, a custom autograd.Function or "
            "a gradient checkpoint of the forward, or has another one."
        )
    if len(cases) < len(found.cases):
        return (
            f"Not every mode differs ({'; '.join(sorted(cases))} does): the forward branches on a training flag or on "
            f"the grad mode, and the graph holds one branch."
        )
    return (
        "The graph computes something else: a branch on values or on global state, Python state, or an aliased tensor "
        "is a constant in the graph."
    )
