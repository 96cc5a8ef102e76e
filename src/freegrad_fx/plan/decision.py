"""The decision for one site, and its wording."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..core.rule import Forward, Rule
from ..core.text import shown
from ..sites.site import REPLACE, Located, Site
from .layout import in_bytes, plain

__all__ = ["Bytes", "Decided", "Decision", "backward_of", "named", "site_as_dict"]


@dataclass(frozen=True)
class Bytes:
    """The bytes that a forward keeps for its backward.

    Attributes:
        native: Without rules.
        kept: With the rules of the plan.
    """

    native: int
    kept: int

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.native + other.native, self.kept + other.kept)

    def __str__(self) -> str:
        return f"{in_bytes(self.native)} → {in_bytes(self.kept)}"


@dataclass(frozen=True)
class Decision:
    """What happens at one site.

    Attributes:
        site: The site.
        action: ``"rewrite"``: the site gets rules. ``"ambient"``: it follows `use` blocks. ``"native"``: it keeps its
            backward. ``"skip"``: the table gives it a rule, but no rule can act there.
        rules: The rules of the site. The first receives the incoming gradient.
        forward: What replaces the forward: the canonical name of an operation, or a function. None keeps the forward.
        entry: The index of the table entry that decides the site, or None.
        reason: The reason for the action.
        modes: The modes of the model in which the site exists; ``""`` for all modes.
        frozen: Whether the site is a parameter that gets no rule only because it does not require a gradient.
        also: The indices of the later entries of the table that match the site too.
        remark: What the rules do there that may not be meant; ``""`` if there is nothing to say.
        snr: For a parameter whose forward is replaced: the ratio of signal to noise of the replacement, in dB, for the
            values that the parameter had when the report was made; None if it is not known.
        memory: What the site keeps for the backward, for the example inputs; None if it is not known.
    """

    site: Site
    action: str
    rules: tuple[Rule, ...] = ()
    forward: Forward | None = None
    entry: int | None = None
    reason: str = ""
    modes: str = ""
    frozen: bool = False
    also: tuple[int, ...] = ()
    remark: str = ""
    snr: float | None = field(default=None, compare=False)
    memory: Bytes | None = field(default=None, compare=False)

    @property
    def listed(self) -> bool:
        """Whether a plan lists it. A place at an operation is listed if an entry decides it."""
        return self.site.at == REPLACE or self.entry is not None

    def reads(self, name: str) -> bool:
        """Whether the rules read the input ``"x"`` or the output ``"y"``; those of a `use` block can read both."""
        return self.action == "ambient" or any(name in rule.inputs for rule in self.rules)

    @property
    def uses_operands(self) -> bool:
        """Whether the rule that gets the gradient first uses more of the operation than its first operand."""
        if not self.rules:
            return False
        declaration = self.rules[0].declaration
        # the output of a replaced forward is not that of the operation
        return bool(declaration.needs_operation or (declaration.again and self.forward is None))

    @property
    def packs(self) -> bool:
        """Whether the operation keeps its native backward, and what it saves is packed."""
        return bool(self.rules) and self.rules[0].declaration.packs is not None

    @property
    def acts(self) -> bool:
        """Whether rules or a new forward are inserted at the site."""
        return self.action in ("rewrite", "ambient")


Decided: TypeAlias = list[tuple[Located, Decision]]
"""The sites of one graph, with the decisions."""


def backward_of(decision: Decision) -> str:
    """The backward of a site, as text."""
    if decision.action != "rewrite":
        return f"{decision.action}: {decision.reason}"
    rules = " → ".join(map(str, decision.rules))
    forward = f", FORWARD {named(decision.forward)}" if decision.forward is not None else ""
    forward += f" (SNR {decision.snr:.1f} dB)" if decision.snr is not None else ""
    modes = f" (in {decision.modes} only)" if decision.modes else ""
    return f"{rules}{forward}{modes}"


def named(forward: Any) -> str:
    """The name of a replacement forward."""
    return forward if isinstance(forward, str) else shown(forward)


def site_as_dict(decision: Decision) -> dict[str, Any]:
    """A decision as plain data."""
    rules = [
        {"rule": rule.name, "params": {name: plain(v) for name, v in rule.given.items()}}
        for rule in decision.rules
    ]
    return {
        **vars(decision.site),
        **vars(decision),
        "site": decision.site.name,
        "rules": rules,
        "forward": plain(decision.forward),
        "memory": None if decision.memory is None else dict(vars(decision.memory)),
    }
